"""Dequantizing on the CPU: GB/s of bfloat16 numbers and peak memory, ours, transformers, torch DCP and NeMo AutoModel.

    python -m benchmarks.dequant [--smoke] [--repetitions N] [--directory DIR] [--json FILE]

matrix      FP8 codes (e4m3) [2048, 7168] with float32 scales of blocks of 128x128, in memory, two torch threads.
            ours: ``code_table`` and ``dequantize_torch``. transformers: ``Fp8Dequantize._dequantize_one``.
            DCP: the loop of ``QuantizedHuggingFaceStorageReader``. NeMo: ``_dequantize_with_torch`` of its DeepSeek-V3
            adapter, where nemo_automodel is installed. plain torch: scales repeated and multiplied.
fp4         The same numbers of codes in FP4 (e2m1), two to a byte, with exponents of 32: ours and transformers.
int4        Likewise in INT4 with bfloat16 scales of 32: ours and compressed-tensors.
layer       One layer of Qwen3-30B-A3B with experts in FP8, from files in the page cache to grouped buffers: ours
            ``load_state_dict``, transformers ``from_pretrained``. DCP: ``dcp.load`` to a tensor an expert and
            projection, so without the grouping.

Every run is a process of its own, which does the same once before it is timed; of a matrix it takes the median of 7.
Memory is the peak above the level at the start. In the first round every result is compared with ours: no number is
printed unless at most one number in 10,000 differs, by one unit in the last place (they round twice, ours once).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.utils import logging as transformers_logging

import automodel_conv as amc
from automodel_conv.kernels.code_tables import code_table
from automodel_conv.kernels.dequantize import dequantize_torch
from automodel_conv.measuring import PeakMemory, ready_memory
from benchmarks import measure
from benchmarks.shapes import SMALL, qwen3_30b, write_checkpoint
from benchmarks.show import show, show_environment

_SHAPE, _SMALL_SHAPE = (2048, 7168), (256, 512)
_BLOCK = 128
_GROUP = 32
_INNER = 7
_MOST_DIFFERENT = 1e-4
Run = Callable[[], Any]


# --- matrices ---------------------------------------------------------------------------------------------------------


class Matrices:
    """The operands, from one seed."""

    def __init__(self, shape: tuple[int, int]):
        generator = torch.Generator().manual_seed(0)
        rows, columns = shape
        self.shape = shape
        self.fp8 = random_codes(shape, generator)
        self.scales = torch.rand(rows // _BLOCK, columns // _BLOCK, generator=generator) * 1e-3
        self.nibbles = torch.randint(256, (rows, columns // 2), dtype=torch.uint8, generator=generator)
        grid = (rows, columns // _GROUP)
        self.exponents = torch.randint(110, 130, grid, dtype=torch.uint8, generator=generator)
        self.group_scales = torch.rand(grid, generator=generator).mul_(1e-3).to(torch.bfloat16)


def random_codes(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Finite e4m3 codes."""
    codes = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
    return torch.where(codes & 127 == 127, codes - 1, codes).view(torch.float8_e4m3fn)


def _ours(codes: Tensor, scales: Tensor, code_format: str, bits: int, block: tuple[int, int]) -> Tensor:
    out = torch.empty(codes.shape[0], codes.shape[1] * 8 // bits, dtype=torch.bfloat16)
    made = code_table(code_format, scales, torch.bfloat16)
    dequantize_torch([out], [codes.view(torch.uint8)], [made.cells], made.table, bits=bits, block=block)
    return out


def _by_transformers(codes: Tensor, scales: Tensor) -> Tensor:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    return Fp8Dequantize(None)._dequantize_one(codes, scales, torch.bfloat16)


def _by_dcp(m: Matrices) -> Run:
    from torch.distributed.checkpoint.quantized_hf_storage import QuantizedHuggingFaceStorageReader

    with tempfile.TemporaryDirectory() as directory:
        reader = QuantizedHuggingFaceStorageReader(directory, target_dtype=torch.bfloat16)
    rows, columns = m.shape
    whole = ((0, rows // _BLOCK), (0, columns // _BLOCK), slice(0, rows), slice(0, columns))
    return lambda: reader._dequantize_tensor(m.fp8, m.scales, m.fp8.shape, whole)


def _by_nemo(m: Matrices) -> Run:
    from nemo_automodel.components.models.deepseek_v3.state_dict_adapter import (  # type: ignore[import-not-found]
        _dequantize_with_torch,
    )

    return lambda: _dequantize_with_torch(m.fp8, m.scales, torch.bfloat16, _BLOCK)


def _plainly(m: Matrices) -> Tensor:
    wide = m.scales.repeat_interleave(_BLOCK, 0).repeat_interleave(_BLOCK, 1)
    return (m.fp8.float() * wide).to(torch.bfloat16)


def _by_compressed_tensors(m: Matrices) -> Run:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    args = QuantizationArgs(num_bits=4, type="int", strategy="group", group_size=_GROUP)
    scheme = QuantizationScheme(targets=["Linear"], weights=args, format="pack-quantized")
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    stored = {
        "weight_packed": m.nibbles.view(torch.int32),
        "weight_scale": m.group_scales,
        "weight_shape": torch.tensor(m.shape),
    }
    return lambda: compressor.decompress(stored, scheme)["weight"]


MATRICES: dict[str, Callable[[Matrices], Run]] = {
    "matrix: ours": lambda m: lambda: _ours(m.fp8, m.scales, "e4m3", 8, (_BLOCK, _BLOCK)),
    "matrix: transformers": lambda m: lambda: _by_transformers(m.fp8, m.scales),
    "matrix: DCP": _by_dcp,
    "matrix: NeMo": _by_nemo,
    "matrix: plain torch": lambda m: lambda: _plainly(m),
    "fp4: ours": lambda m: lambda: _ours(m.nibbles, m.exponents, "e2m1", 4, (1, _GROUP)),
    "fp4: transformers": lambda m: lambda: _by_transformers(m.nibbles.view(torch.int8), m.exponents),
    "int4: ours": lambda m: lambda: _ours(m.nibbles, m.group_scales, "int4", 4, (1, _GROUP)),
    "int4: compressed-tensors": _by_compressed_tensors,
}


# --- a layer ----------------------------------------------------------------------------------------------------------


def write_quantized(shape: Any, directory: str) -> None:
    """The checkpoint of a shape with its experts in FP8."""
    write_checkpoint(shape, directory)
    generator = torch.Generator().manual_seed(1)
    weight_map = {}
    for path in sorted(Path(directory).glob("*.safetensors")):
        tensors = {}
        for name, tensor in load_file(path).items():
            if ".experts." in name:
                grid = [-(-size // _BLOCK) for size in tensor.shape]
                tensors[name + "_scale_inv"] = torch.rand(grid, generator=generator) * 1e-3
                tensor = random_codes(tuple(tensor.shape), generator)
            tensors[name] = tensor
        save_file(tensors, path, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, path.name)
    index = {"metadata": {}, "weight_map": weight_map}
    (Path(directory) / "model.safetensors.index.json").write_text(json.dumps(index))
    file = Path(directory) / "config.json"
    kept = ["lm_head", "q_proj", "k_proj", "v_proj", "o_proj", "gate"]
    quantization = {"quant_method": "fp8", "weight_block_size": [_BLOCK] * 2, "modules_to_not_convert": kept}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": quantization}))


def _layer_by_transformers(directory: str) -> dict[str, Tensor]:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory).state_dict()


def _layer_by_dcp(directory: str) -> dict[str, Tensor]:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.quantized_hf_storage import QuantizedHuggingFaceStorageReader

    checkpoint = amc.open_checkpoint(directory)
    tensors = {
        name: torch.empty(shape, dtype=torch.bfloat16)
        for name, shape in zip(checkpoint.names, checkpoint.shapes, strict=True)
        if ".experts." in name and name.endswith(".weight")
    }
    reader = QuantizedHuggingFaceStorageReader(directory, thread_count=2, target_dtype=torch.bfloat16)
    dcp.load(tensors, storage_reader=reader)
    return tensors


LAYERS: dict[str, Callable[[str], dict[str, Tensor]]] = {
    "layer: ours": amc.load_state_dict,
    "layer: transformers": _layer_by_transformers,
    "layer: DCP, not grouped": _layer_by_dcp,
}


# --- one run ----------------------------------------------------------------------------------------------------------


def work(method: str, directory: str, small: bool, repetition: int) -> dict[str, Any]:
    """One run, in this process."""
    if method in MATRICES:
        run = MATRICES[method](matrices := Matrices(_SMALL_SHAPE if small else _SHAPE))
        run()
        times = [_timed(run)[0] for _ in range(_INNER)]
        with PeakMemory() as peak:
            made = run()
        ours = MATRICES[method.partition(":")[0] + ": ours"](matrices)
        differ = _differing({"": made}, {"": ours()}) if not repetition else None
        return _said(statistics.median(times), peak, made.nbytes, differ)
    LAYERS[method](os.path.join(directory, "warm-up"))
    big = os.path.join(directory, "big")
    ready_memory(4 * sum(file.stat().st_size for file in os.scandir(big)))
    with PeakMemory() as peak:
        seconds, made = _timed(lambda: LAYERS[method](big))
    differ = None
    if not repetition:
        rules = [] if "DCP" in method else None
        wanted = amc.load_state_dict(big, rules=rules)
        differ = _differing({name: tensor for name, tensor in made.items() if name in wanted}, wanted)
    return _said(seconds, peak, sum(t.nbytes for t in made.values()), differ)


def _timed(run: Run) -> tuple[float, Any]:
    start = time.perf_counter()
    made = run()
    return time.perf_counter() - start, made


def _said(seconds: float, peak: PeakMemory, out_bytes: int, differ: list[int] | None) -> dict[str, Any]:
    return {"seconds": seconds, "anonymous_bytes": peak.anonymous_bytes, "out_bytes": out_bytes, "differ": differ}


def _differing(made: dict[str, Tensor], wanted: dict[str, Tensor]) -> list[int]:
    """How many numbers differ, of how many, and by how many units in the last place at most."""
    count = total = most = 0
    for name, tensor in made.items():
        units = tensor.contiguous().view(torch.int16).int() - wanted[name].contiguous().view(torch.int16).int()
        count += int(units.count_nonzero())
        total += units.numel()
        most = max(most, int(units.abs().max()) if units.numel() else 0)
    return [count, total, most]


# --- all runs ---------------------------------------------------------------------------------------------------------


def run(small: bool, repetitions: int, directory: str | None) -> dict[str, Any]:
    """All runs.

    Raises:
        RuntimeError: a result differs too much from ours, or a run failed.
    """
    shape = SMALL if small else qwen3_30b(1)
    left_out = {"matrix: NeMo"} if importlib.util.find_spec("nemo_automodel") is None else set()
    if importlib.util.find_spec("compressed_tensors") is None:
        left_out.add("int4: compressed-tensors")
    methods = [method for method in (*MATRICES, *LAYERS) if method not in left_out]
    with tempfile.TemporaryDirectory(prefix="benchmark-dequant-", dir=directory) as root:
        write_quantized(shape, os.path.join(root, "big"))
        write_quantized(SMALL, os.path.join(root, "warm-up"))
        command = ["-m", "benchmarks.dequant", *(["--smoke"] if small else []), "--worker"]
        commands = {method: [*command, method, root] for method in methods}
        runs = measure.run_interleaved(commands, repetitions, lambda: measure.read_through(os.path.join(root, "big")))
    for method, of in runs.items():
        count, total, most = of[0]["differ"]
        if count > _MOST_DIFFERENT * total or most > 1:
            raise RuntimeError(f"{method} differs from ours in {count} of {total} numbers, by up to {most} units")
    return {"matrix": list(_SMALL_SHAPE if small else _SHAPE), "layer": shape.name, "runs": runs}


def table(result: dict[str, Any]) -> Table:
    shown = Table(title=f"{result['matrix']}; {result['layer']}; median (20th-80th percentile)", title_justify="left")
    for column in ("method", "ms", "GB/s out", "ours is", "peak / output", "differ, of 10^6"):
        shown.add_column(column, justify="left" if column == "method" else "right")
    medians = {method: statistics.median(run["seconds"] for run in of) for method, of in result["runs"].items()}
    for method, of in result["runs"].items():
        seconds = measure.spread([run["seconds"] for run in of])
        peak = max(run["anonymous_bytes"] or 0 for run in of) / of[0]["out_bytes"]
        count, total, _ = of[0]["differ"]
        shown.add_row(
            method,
            seconds.text(1e3, 1),
            f"{of[0]['out_bytes'] / seconds.median / 1e9:.2f}",
            f"{seconds.median / medians[method.partition(':')[0] + ': ours']:.2f}x",
            f"{peak:.2f}",
            f"{count / total * 1e6:.1f}",
        )
    return shown


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.dequant",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--smoke", action="store_true", help="a tiny matrix and model: shows only that all runs")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--directory", help="where a temporary directory is made; it needs 2 GB")
    parser.add_argument("--json", metavar="FILE", help="write all runs and the environment")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--repetition", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker:
        warnings.simplefilter("ignore")
        torch.set_num_threads(2)
        transformers_logging.disable_progress_bar()
        found = work(*options.worker, options.smoke, options.repetition)
        sys.stdout.write(json.dumps(found) + "\n")
        return
    environment = measure.environment()
    result = run(options.smoke, options.repetitions, options.directory)
    show_environment(environment)
    show(table(result))
    measure.write_json(options.json, {"environment": environment, **result})


if __name__ == "__main__":
    main()
