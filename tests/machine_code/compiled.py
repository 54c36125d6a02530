"""Machine code of kernels, compiled without a GPU, and its problems.

Triton's wheel brings the assembler and disassembler. Run as a module in a process where Triton's interpreter is off,
this file prints the problems of every launchable variant as JSON: ``python -m tests.machine_code.compiled 90``.
"""

from __future__ import annotations

import json
import re
import struct
import subprocess
import sys
import tempfile
from bisect import bisect
from collections import Counter
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from automodel_conv.kernels.dequantize import DequantizeConstants
from automodel_conv.kernels.launch import OPTIONS
from automodel_conv.kernels.variants import Variant
from tests.machine_code.variants import launchable

THREADS = 32 * OPTIONS["num_warps"]
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

# An H100: 132 SMs at 1.755 GHz share 3.0 TB/s of reads and writes. Each issues 4 warp instructions a clock.
BYTES_PER_CLOCK = 3.0e12 / 132 / 1.755e9
THREADS_PER_CLOCK = 4 * 32
MOST_ISSUE = 0.5
MOST_ISSUE_DECODING = (
    0.75  # a lookup, an address and a shift for each value; only 2.5 bytes move per value of a 4-bit code
)

_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", re.M)
_WIDTH = re.compile(r"\.(128|64|U16|S16|U8|S8)\b")
_NBYTES = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}


class Code(NamedTuple):
    """The counts of a kernel's machine code, with accesses of global memory by width in bytes, per thread."""

    instructions: int
    loads: Counter[int]
    stores: Counter[int]
    local: int  # instructions that access spilled registers or a stack
    stack_bytes: int
    barriers: int  # for all threads of a program
    shared_loads: int  # instructions that read data that other threads wrote into shared memory
    shared_stores: int
    shuffles: int  # between the threads of a warp


def compiled(kernel: Any, values: dict[str, Any], arch: int, **options: Any) -> bytes:
    """Return the machine code of a kernel, as a file for the GPU."""
    signature = {
        name: "constexpr" if name in values else "*i64" if name == "table" else "i32" for name in kernel.arg_names
    }
    return triton.compile(
        ASTSource(fn=kernel, signature=signature, constexprs=values),
        target=GPUTarget("cuda", arch, 32),
        options=OPTIONS | options,
    ).asm["cubin"]


def read(binaries: Sequence[bytes], arch: int) -> list[Code]:
    """Return the counts of several kernels with one call of the disassembler, which takes half a second to start."""
    codes = [_machine_code(binary) for binary in binaries]
    ends = list(accumulate(map(len, codes)))
    names: list[list[str]] = [[] for _ in codes]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "code")
        file.write_bytes(b"".join(codes))
        for address, name in _INSTRUCTION.findall(_tool("nvdisasm", "--binary", f"SM{arch}", file)):
            names[bisect(ends, int(address, 16))].append(name)
        usages = []
        for binary in binaries:
            file.write_bytes(binary)
            usages.append(_tool("cuobjdump", "-res-usage", file))
    if [16 * len(some) for some in names] != [len(code) for code in codes]:
        raise ValueError("instructions of 16 bytes were expected, each on a line of its own")
    return [_code(some, usage) for some, usage in zip(names, usages, strict=True)]


def _machine_code(binary: bytes) -> bytes:
    """Return the one executable section of a 64-bit ELF file."""
    (start,), (size, count) = struct.unpack_from("<Q", binary, 40), struct.unpack_from("<HH", binary, 58)
    sections = []
    for at in range(start, start + size * count, size):
        flags, _, offset, nbytes = struct.unpack_from("<QQQQ", binary, at + 8)
        if flags & 4:  # SHF_EXECINSTR
            sections.append(binary[offset : offset + nbytes])
    (code,) = sections
    return code


def _code(names: list[str], usage: str) -> Code:
    while names and names[-1].partition(".")[0] in ("NOP", "BRA"):
        names.pop()
    accesses: dict[str, Counter[int]] = {"LDG": Counter(), "STG": Counter()}
    for name in names:
        if name[:3] in accesses:
            width = _WIDTH.search(name)
            accesses[name[:3]][_NBYTES[width.group(1)] if width else 4] += 1
    stack, local = (int(re.search(rf"{word}:(\d+)", usage).group(1)) for word in ("STACK", "LOCAL"))
    kinds = Counter(name.partition(".")[0] for name in names)
    return Code(
        len(names),
        accesses["LDG"],
        accesses["STG"],
        kinds["LDL"] + kinds["STL"],
        stack + local,
        kinds["BAR"],
        kinds["LDS"] + kinds["LDSM"],  # LDSM and STSM: matrices, by a whole warp
        kinds["STS"] + kinds["STSM"],
        kinds["SHFL"],
    )


def _tool(name: str, *arguments: Any) -> str:
    return subprocess.run([TOOLS / name, *arguments], check=True, capture_output=True, text=True).stdout


def problems(variant: Variant, code: Code) -> list[str]:
    """Return the ways in which the machine code of a variant breaks the variant's promises."""
    errors = []
    if code.local or code.stack_bytes:
        errors.append(f"spills: {code.local} accesses, {code.stack_bytes} bytes of stack")
    expected = _accesses(variant, "src") + _lookups(variant) + Counter({8: variant.kernel.operands})
    if code.loads != expected:
        errors.append(f"loads by width {dict(code.loads)}, expected {dict(expected)}")
    expected = _accesses(variant, "dst")
    if code.stores != expected:
        errors.append(f"stores by width {dict(code.stores)}, expected {dict(expected)}")
    errors += _exchanged(variant, code)
    if variant.src_vector > 1 or variant.dst_vector > 1:
        clocks = (_tile_nbytes(variant, "src") + _tile_nbytes(variant, "dst")) / BYTES_PER_CLOCK
        issue = code.instructions * THREADS / THREADS_PER_CLOCK / clocks
        most = MOST_ISSUE_DECODING if _decoding(variant) else MOST_ISSUE
        if issue > most:
            errors.append(f"{code.instructions} instructions take {issue:.2f} of the issue slots, at most {most}")
    return errors


def exchanges(variant: Variant) -> int:
    """Return how often threads may exchange data through shared memory, all of them at once.

    Only transposed data is stored by another thread than the one that loaded it: one tile of elements or of pairs.
    Each half of the pairs is exchanged if they are split, or if they are not moved as words.
    """
    if variant.kernel.name == "copy_tiles":
        return 0
    decoding = _decoding(variant)
    if decoding is not None:
        return int(decoding.is_transposed)
    if variant.kernel.name == "transpose_tiles" or (variant.kernel.name == "interleave_tiles" and variant.pairs):
        return 1
    return 2


def _decoding(variant: Variant) -> DequantizeConstants | None:
    return variant.details if isinstance(variant.details, DequantizeConstants) else None


def _exchanged(variant: Variant, code: Code) -> list[str]:
    """Check that each exchange is a write, a barrier and a read of at most an element, with a barrier between two.

    Elements that are moved one by one may differ: their addresses do not show what is contiguous, and in Triton 3.6.0
    the lanes of a warp then run along the wrong side, or exchange once more. Decoding may not.
    """
    times = exchanges(variant)
    one_by_one = variant.src_vector == variant.dst_vector == 1 and _decoding(variant) is None
    elements = _tile_nbytes(variant, "dst") // _size(variant, "dst") // THREADS
    barriers = {max(0, 2 * times - 1), *((0, 1) if one_by_one else ())}
    accesses = max(times, one_by_one) * elements
    errors = []
    if code.barriers not in barriers:
        errors.append(f"barriers: {code.barriers}, expected {sorted(barriers)}")
    if max(code.shared_loads, code.shared_stores) > accesses:
        errors.append(f"shared memory: {code.shared_loads} loads, {code.shared_stores} stores, at most {accesses}")
    if code.shuffles:
        errors.append(f"shuffles: {code.shuffles}, expected none")
    return errors


def _size(variant: Variant, side: str) -> int:
    return getattr(tl, getattr(variant, side)).primitive_bitwidth // 8


def _tile_nbytes(variant: Variant, side: str) -> int:
    matrices = 2 if variant.kernel.name in ("interleave_tiles", "deinterleave_tiles") else 1
    decoding = _decoding(variant)
    values = 8 // decoding.bits if decoding and side == "dst" else 1
    return matrices * values * variant.tile_rows * variant.tile_columns * _size(variant, side)


def _accesses(variant: Variant, side: str) -> Counter[int]:
    """Return the accesses of a thread by width, if all are as wide as promised."""
    paired = variant.pairs and (side == "dst") == (variant.kernel.name == "interleave_tiles")
    width = _size(variant, side) * getattr(variant, f"{side}_vector") * (2 if paired else 1)
    if side == "src" and variant.bytewise:
        width = 1
    return Counter({width: _readers(variant, side) * _tile_nbytes(variant, side) // THREADS // width})


def _readers(variant: Variant, side: str) -> int:
    """Return how many values that are decoded one by one read the same byte."""
    decoding = _decoding(variant)
    return 8 // decoding.bits if decoding and side == "src" and variant.src_vector == 1 else 1


def _lookups(variant: Variant) -> Counter[int]:
    """Return the reads of table rows, one per vector of codes, and of values, one per code."""
    decoding = _decoding(variant)
    if decoding is None:
        return Counter()
    codes = variant.tile_rows * variant.tile_columns // THREADS
    table_row = getattr(tl, decoding.table_row).primitive_bitwidth // 8
    return Counter({table_row: codes * _readers(variant, "src") // variant.src_vector}) + Counter(
        {_size(variant, "dst"): codes * 8 // decoding.bits}
    )


def codes_of(variants: Sequence[Variant], arch: int) -> list[Code]:
    return read(
        [compiled(variant.kernel.function, variant.kernel.constants(variant), arch) for variant in variants], arch
    )


def main(arch: int) -> None:
    variants = launchable()
    checked = [(v, problems(v, code)) for v, code in zip(variants, codes_of(variants, arch), strict=True)]
    wrong = {str(variant): texts for variant, texts in checked if texts}
    print(json.dumps({"checked": len(checked), "wrong": wrong, "triton": triton.__version__}, indent=1))


if __name__ == "__main__":
    main(int(sys.argv[1]))
