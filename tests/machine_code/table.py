"""A Markdown table of the machine code of every launchable variant, without a GPU.

``python -m tests.machine_code.table 90``. To compare several versions of Triton, name the folders where they are
installed: ``--triton .venv/triton-3.6.0``. Loads and stores are counted per thread, by width in bytes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence

import triton

from automodel_conv.kernels.dequantize import DequantizeConstants
from automodel_conv.kernels.variants import Variant
from tests.machine_code.compiled import Code, codes_of
from tests.machine_code.variants import launchable

HEAD = ("kernel", "variant", "sm", "Triton", "instructions", "LDG", "STG", "BAR", "LDS", "STS", "SHFL", "spills")


def text(variant: Variant) -> str:
    """Describe a variant in words, without its kernel."""
    tile = f"{variant.src_vector} x {variant.src} to {variant.dst_vector} x {variant.dst}"
    parts = [tile, f"{variant.tile_rows} x {variant.tile_columns}"]
    parts += [word for word in ("bytewise", "pairs") if getattr(variant, word)]
    if isinstance(variant.details, DequantizeConstants):
        bits, table_row, by_shifts, is_transposed, is_stepped = variant.details
        parts += [f"{bits} bits", f"table rows {table_row}", "shifts" if by_shifts else "divisions"]
        parts += ["transposed"] * is_transposed + ["stepped"] * is_stepped
    return ", ".join(parts)


def rows(variants: Sequence[Variant], codes: Sequence[Code], arch: int) -> Iterator[list[str]]:
    for variant, code in zip(variants, codes, strict=True):
        counts = code.barriers, code.shared_loads, code.shared_stores, code.shuffles, code.local
        widths = _widths(code.loads), _widths(code.stores)
        place = str(arch), triton.__version__
        yield [variant.kernel.name, text(variant), *place, str(code.instructions), *widths, *map(str, counts)]


def _widths(accesses: Counter[int]) -> str:
    return ", ".join(f"{count} x {nbytes}" for nbytes, count in sorted(accesses.items(), reverse=True))


def markdown(lines: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(table_rows) + " |" for table_rows in (HEAD, ["---"] * len(HEAD), *lines))


def _elsewhere(folder: str, arch: int, only: str) -> list[list[str]]:
    """Return the rows for the Triton that is installed in a folder."""
    path = os.pathsep.join([folder, *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "tests.machine_code.table", str(arch), "--only", only, "--json"]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("arch", type=int, nargs="*", default=[90], help="80, 90, 100; default: 90")
    parser.add_argument("--only", default="", help="variants whose kernel or description has this text")
    parser.add_argument("--triton", action="append", default=[], help="a folder with another Triton")
    parser.add_argument("--json", action="store_true", help="the rows as JSON")
    options = parser.parse_args()
    variants = [variant for variant in launchable() if options.only in f"{variant.kernel} {text(variant)}"]
    table_rows = []
    for arch in options.arch:
        of_each = [list(rows(variants, codes_of(variants, arch), arch))]
        of_each += [_elsewhere(folder, arch, options.only) for folder in options.triton]
        table_rows += [line for lines in zip(*of_each, strict=True) for line in lines]
    print(json.dumps(table_rows) if options.json else markdown(table_rows))


if __name__ == "__main__":
    main()
