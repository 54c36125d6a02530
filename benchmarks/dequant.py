"""Benchmark quantized weights to bfloat16 on the CPU: seconds, GB/s of output and peak memory, against peers.

    python -m benchmarks.dequant [--smoke] [--repetitions N] [--layer-repetitions N] [--threads N]
                                 [--method NAME ...] [--directory DIR] [--json FILE] [--table FILE]

One matrix of an expert of DeepSeek-V3, [2048, 7168], in memory:

fp8         e4m3, a float32 scale per block of 128 x 128.
mxfp4       e2m1, two codes per byte, an e8m0 scale per 32 codes of a row.
int4        eight codes per int32, a bfloat16 scale per 32 codes of a row.

ours                    ``code_table`` and ``dequantize_torch``, with torch's own threads.
ours, worker threads    the same on several bands of rows at once, one thread each, as in a load.
transformers            ``Fp8Dequantize._dequantize_one``.
dcp                     ``QuantizedHuggingFaceStorageReader._dequantize_tensor``.
nemo                    NeMo AutoModel's ``_dequantize_with_torch``; left out if it is not installed.
compressed-tensors      ``PackedQuantizationCompressor.decompress``; left out if it is not installed.
plain torch             float32 times scales that ``repeat_interleave`` has expanded.

A layer of 32 such experts (1.4 GB of FP8 in a tensor per expert and projection, 2.8 GB of bfloat16), from files in the
page cache, grouped to ``[E, 2I, H]`` and ``[E, H, I]``:

ours                    ``load_state_dict``.
transformers            ``AutoModelForCausalLM.from_pretrained``, which dequantizes FP8 if there is no GPU.
dcp                     ``QuantizedHuggingFaceStorageReader`` into tensors per expert, allocated with ``torch.empty``:
                        it does not group.

Every run is a process of its own. A matrix is dequantized once before the timing and then several times; the median
counts. Each time uses new memory, tables included. A layer is loaded once, after a tiny one and after memory was
touched and freed, see ``benchmarks.peers``. Memory is the peak of anonymous memory above the level at the start of the
timing. All use the same number of threads if it can be set.

Peers round twice, to float32 and then to bfloat16. This package rounds once, so the bytes may differ. In the first
round each run also counts the elements that differ from ours, and computes the digest of ours. No figure is printed if
these digests differ, if more than one element in 10,000 differs, or if any differs by more than one unit in the last
place.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.table import Table
from safetensors.torch import save_file
from torch import Tensor

import automodel_conv as amc
from automodel_conv.cli.demo_process import fill_with_random_bits
from automodel_conv.cli.measuring import PeakMemory, ready_memory
from automodel_conv.execution import host_decoding as decoding
from automodel_conv.execution.workers import run_in_threads
from automodel_conv.kernels.code_tables import CODE_VALUES, code_table
from automodel_conv.kernels.dequantize_torch import dequantize_torch
from benchmarks import measure, options
from benchmarks.grouped import per_expert
from benchmarks.shapes import SMALL, Shape, checkpoint_tensors, meta_model
from benchmarks.show import show, show_environment

MATRIX = (2048, 7168)
TINY_MATRIX = (256, 384)
MOST_DIFFERING = 1e-4
MOST_ULP = 1
_BLOCK = 128
_GROUP = 32
_LAPS = 7
_NEMO = "nemo_automodel"
_COMPRESSED = "compressed_tensors"


def expert_shape(experts: int, hidden: int, intermediate: int) -> Shape:
    """Return a layer in which only the experts count."""
    sizes = {"num_experts": experts, "hidden_size": hidden, "moe_intermediate_size": intermediate}
    return Shape(
        f"a layer of {experts} experts, hidden {hidden}, intermediate {intermediate}",
        "hidden_size, moe_intermediate_size of config.json of deepseek-ai/DeepSeek-V3",
        "qwen3_moe",
        {**SMALL.config, "num_hidden_layers": 1, **sizes},
        keys=experts * 3 + 9 + 3,
        files=4,
    )


LAYER = expert_shape(32, MATRIX[1], MATRIX[0])
TINY_LAYER = expert_shape(4, 256, _BLOCK)


class Matrix(NamedTuple):
    """A quantized matrix."""

    code_format: str
    bits: int
    block: tuple[int, int]
    shape: tuple[int, int]
    codes: Tensor  # uint8 [R, bytes]
    scales: Tensor


def matrix(case: str, shape: tuple[int, int]) -> Matrix:
    """Return a random matrix, the same each time."""
    generator = torch.Generator().manual_seed(0)
    rows, columns = shape
    bits = 8 if case == "fp8" else 4
    codes = torch.randint(0, 256, (rows, columns * bits // 8), dtype=torch.uint8, generator=generator)
    if case == "fp8":
        codes.masked_fill_(codes & 127 == 127, 0)  # NaN
        scales = torch.rand(-(-rows // _BLOCK), -(-columns // _BLOCK), generator=generator) * 1e-2
        return Matrix("e4m3", bits, (_BLOCK, _BLOCK), shape, codes, scales)
    grid = rows, columns // _GROUP
    if case == "mxfp4":
        exponents = torch.randint(110, 130, grid, dtype=torch.uint8, generator=generator)
        return Matrix("e2m1", bits, (1, _GROUP), shape, codes, exponents.view(torch.float8_e8m0fnu))
    scales = (torch.rand(grid, generator=generator) * 1e-2).to(torch.bfloat16)
    return Matrix("int4", bits, (1, _GROUP), shape, codes, scales)


Call = Callable[[], Tensor]


def ours(of: Matrix, threads: int) -> Call:
    def call() -> Tensor:
        out = torch.empty(of.shape, dtype=torch.bfloat16)
        _decode(of, out, slice(0, of.shape[0]))
        return out

    return call


def ours_by_workers(of: Matrix, threads: int) -> Call:
    step = -(-of.shape[0] // threads // of.block[0]) * of.block[0]
    bands = [slice(row, min(row + step, of.shape[0])) for row in range(0, of.shape[0], step)]

    def call() -> Tensor:
        out = torch.empty(of.shape, dtype=torch.bfloat16)
        run_in_threads(bands, threads, lambda: lambda rows: _decode(of, out, rows))
        return out

    return call


def _decode(of: Matrix, out: Tensor, rows: slice) -> None:
    """Decode a band of rows in whole blocks, with tables as large as those of a load."""
    height, entries = of.block[0], of.scales.shape[1] << of.bits
    step = max(1, decoding.TABLE_ENTRIES // entries) * height
    for row in range(rows.start, rows.stop, step):
        band = slice(row, min(row + step, rows.stop))
        table, table_rows = code_table(of.code_format, of.scales[row // height : -(-band.stop // height)], out.dtype)
        dequantize_torch([out[band]], [of.codes[band]], [table_rows], table, bits=of.bits, block=of.block)


def by_transformers(of: Matrix, threads: int) -> Call:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    operation: Any = Fp8Dequantize(None)
    codes = of.codes.view(torch.float8_e4m3fn if of.bits == 8 else torch.int8)
    return lambda: operation._dequantize_one(codes, of.scales, torch.bfloat16)


def by_dcp(of: Matrix, threads: int) -> Call:
    import torch.distributed.checkpoint.quantized_hf_storage as storage

    reader: Any = storage.QuantizedHuggingFaceStorageReader(".", target_dtype=torch.bfloat16)
    rows, columns = of.scales.shape
    where = ((0, rows), (0, columns), slice(0, of.shape[0]), slice(0, of.shape[1]))
    codes = of.codes.view(torch.float8_e4m3fn)
    return lambda: reader._dequantize_tensor(codes, of.scales, torch.Size(of.shape), where)


def by_nemo(of: Matrix, threads: int) -> Call:
    loop = import_module(f"{_NEMO}.components.models.deepseek_v3.state_dict_adapter")._dequantize_with_torch
    codes = of.codes.view(torch.float8_e4m3fn)
    return lambda: loop(codes, of.scales, torch.bfloat16, _BLOCK)


def by_compressed_tensors(of: Matrix, threads: int) -> Call:
    quantization = import_module(f"{_COMPRESSED}.quantization")
    compressor = import_module(f"{_COMPRESSED}.compressors").BaseCompressor.get_value_from_registry("pack-quantized")
    args = quantization.QuantizationArgs(num_bits=4, type="int", strategy="group", group_size=_GROUP, symmetric=True)
    scheme = quantization.QuantizationScheme(targets=["Linear"], weights=args, format="pack-quantized")
    stored = {
        "weight_packed": of.codes.view(torch.int32),
        "weight_scale": of.scales,
        "weight_shape": torch.tensor(of.shape),
    }
    return lambda: compressor.decompress(stored, scheme)["weight"]


def by_plain_torch(of: Matrix, threads: int) -> Call:
    def call() -> Tensor:
        if of.bits == 8:
            numbers = of.codes.view(torch.float8_e4m3fn).float()
        else:
            values = torch.tensor(CODE_VALUES[of.code_format])
            numbers = torch.stack([values[(of.codes & 15).int()], values[(of.codes >> 4).int()]], 2).flatten(1)
        wide = of.scales.float().repeat_interleave(of.block[0], 0).repeat_interleave(of.block[1], 1)
        return (numbers * wide).to(torch.bfloat16)

    return call


Made = Callable[[], dict[str, Tensor]]
"""A finished load: its tensors by name, experts grouped or not."""


def load_with_ours(directory: str, threads: int) -> Made:
    loaded = amc.load_state_dict(directory, threads=threads)
    return lambda: loaded


def load_with_transformers(directory: str, threads: int) -> Made:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory).state_dict


def load_with_dcp(directory: str, threads: int) -> Made:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.quantized_hf_storage import QuantizedHuggingFaceStorageReader

    checkpoint = amc.open_checkpoint(directory)
    made = {
        name: torch.empty(shape, dtype=torch.bfloat16)
        for name, shape in zip(checkpoint.names, checkpoint.shapes, strict=True)
        if not name.endswith("_scale_inv")
    }
    reader = QuantizedHuggingFaceStorageReader(directory, thread_count=threads, target_dtype=torch.bfloat16)
    dcp.load(made, storage_reader=reader)
    return lambda: made


def write_checkpoint(shape: Shape, directory: str) -> None:
    """Write experts in FP8 with scales and the rest in bfloat16, and wait until they are on the disk."""
    model = meta_model(shape)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(directory)
    config_path = Path(directory, "config.json")
    config = json.loads(config_path.read_text())
    config["quantization_config"] = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [_BLOCK, _BLOCK],
    }
    config_path.write_text(json.dumps(config, indent=2))
    generator = torch.Generator().manual_seed(0)
    specs = checkpoint_tensors(shape, model)
    share = -(-len(specs) // shape.files)
    weight_map: dict[str, str] = {}
    for number in range(shape.files):
        file = f"model-{number + 1:05d}-of-{shape.files:05d}.safetensors"
        tensors: dict[str, Tensor] = {}
        for spec in specs[number * share : (number + 1) * share]:
            if ".experts." not in spec.name:
                tensors[spec.name] = torch.empty(spec.shape, dtype=spec.dtype)
                fill_with_random_bits(tensors[spec.name], generator)
                continue
            codes = torch.randint(0, 256, spec.shape, dtype=torch.uint8, generator=generator)
            codes.masked_fill_(codes & 127 == 127, 0)  # NaN
            tensors[spec.name] = codes.view(torch.float8_e4m3fn)
            grid = [-(-size // _BLOCK) for size in spec.shape]
            tensors[f"{spec.name}_scale_inv"] = torch.rand(grid, generator=generator) * 1e-2
        path = os.path.join(directory, file)
        save_file(tensors, path, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    index = {"metadata": {}, "weight_map": weight_map}
    Path(directory, "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


Prepare = Callable[[Matrix, int], Call]
MATRICES: Mapping[str, Prepare] = {
    "fp8: ours": ours,
    "fp8: ours, worker threads": ours_by_workers,
    "fp8: transformers": by_transformers,
    "fp8: dcp": by_dcp,
    "fp8: nemo": by_nemo,
    "fp8: plain torch": by_plain_torch,
    "mxfp4: ours": ours,
    "mxfp4: ours, worker threads": ours_by_workers,
    "mxfp4: transformers": by_transformers,
    "mxfp4: plain torch": by_plain_torch,
    "int4: ours": ours,
    "int4: ours, worker threads": ours_by_workers,
    "int4: compressed-tensors": by_compressed_tensors,
    "int4: plain torch": by_plain_torch,
}
LAYERS: Mapping[str, Callable[[str, int], Made]] = {
    "layer: ours": load_with_ours,
    "layer: transformers": load_with_transformers,
    "layer: dcp": load_with_dcp,
}
METHODS = (*MATRICES, *LAYERS)
CASES = ("fp8", "mxfp4", "int4", "layer")
_NEEDS = {"fp8: nemo": _NEMO, "int4: compressed-tensors": _COMPRESSED}


def work(method: str, directory: str, shape: tuple[int, int], threads: int, repetition: int) -> dict[str, Any]:
    """Perform one run in this process."""
    warnings.simplefilter("ignore")  # dcp warns that there is no process group
    torch.set_num_threads(threads)
    if method in LAYERS:
        return _work_layer(method, directory, threads, repetition)
    of = matrix(method.split(":")[0], shape)
    call = MATRICES[method](of, threads)
    call()
    laps, output = [], torch.empty(0)
    with PeakMemory() as peak:
        for _ in range(_LAPS):
            del output
            start = time.perf_counter()
            output = call()
            laps.append(time.perf_counter() - start)
    result = {
        "seconds": statistics.median(laps),
        "laps": laps,
        "output_bytes": output.nbytes,
        "anonymous_bytes": peak.anonymous_bytes,
    }
    return result | (compared({"": output}, {"": ours(of, threads)()}) if repetition == 0 else {})


def _work_layer(method: str, directory: str, threads: int, repetition: int) -> dict[str, Any]:
    from transformers.utils import logging

    logging.disable_progress_bar()
    load = LAYERS[method]
    load(os.path.join(directory, "tiny"), threads)
    layer = os.path.join(directory, "layer")
    ready_memory(3 * sum(file.stat().st_size for file in os.scandir(layer)))
    with PeakMemory() as peak:
        start = time.perf_counter()
        made = load(layer, threads)
        seconds = time.perf_counter() - start
    tensors = made()
    result = {
        "seconds": seconds,
        "output_bytes": sum(tensor.nbytes for tensor in tensors.values()),
        "anonymous_bytes": peak.anonymous_bytes,
    }
    return result | (compared(tensors, load_with_ours(layer, threads)()) if repetition == 0 else {})


def compared(made: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Any]:
    """Count the elements that differ from ours, and their distance in units in the last place.

    Add a digest of ours.

    Args:
        made: tensors per expert, or grouped like ``wanted``.

    Raises:
        RuntimeError: names, shapes or dtypes differ.
    """
    known = dict(wanted)
    if not set(made) <= set(known):
        known = {part: view for name, tensor in wanted.items() for part, view in _experts(name, tensor)}
    kinds = [{name: (t.shape, t.dtype) for name, t in tensors.items()} for tensors in (made, known)]
    if kinds[0] != kinds[1]:
        raise RuntimeError("the methods do not produce tensors of the same names, shapes and dtypes")
    differing = most = 0
    for name, tensor in made.items():
        bits, expected = (t.reshape(-1).view(torch.int16) for t in (tensor.contiguous(), known[name].contiguous()))
        at = (bits != expected).nonzero().view(-1)
        if len(at):
            differing += len(at)
            most = max(most, int((_ordered(bits[at]) - _ordered(expected[at])).abs().max()))
    elements = sum(tensor.numel() for tensor in made.values())
    return {"digest": measure.digest(wanted), "elements": elements, "differing": differing, "most_ulp": most}


def _experts(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    yield from per_expert(name, tensor).items() if ".experts." in name else [(name, tensor)]


def _ordered(bits: Tensor) -> Tensor:
    """Return values of 16 bits as integers in the same order, so that neighbors differ by one."""
    wide = bits.int()
    return torch.where(wide < 0, -(wide & 0x7FFF), wide)


def run(
    smoke: bool, methods: list[str], repetitions: tuple[int, int], threads: int, directory: str | None
) -> dict[str, Any]:
    """Return all runs.

    Args:
        repetitions: number of repetitions of a matrix and of a layer.

    Raises:
        RuntimeError: a method returns other values than ours, or a run failed.
    """
    shape, layer = (TINY_MATRIX, TINY_LAYER) if smoke else (MATRIX, LAYER)
    left_out = [method for method in methods if method in _NEEDS and find_spec(_NEEDS[method]) is None]
    with tempfile.TemporaryDirectory(prefix="benchmark-dequant-", dir=directory) as root:
        big = os.path.join(root, "layer")
        if any(method in LAYERS for method in methods):
            show(f"  writing {layer.name} to {root}", err=True)
            write_checkpoint(layer, big)
            write_checkpoint(TINY_LAYER, os.path.join(root, "tiny"))
        runs: dict[str, list[dict[str, Any]]] = {}
        for case in CASES:
            commands = {
                method: ["-m", "benchmarks.dequant", "--worker", method, root, *map(str, shape), str(threads)]
                for method in methods
                if method.startswith(case) and method not in left_out
            }

            def before(case: str = case) -> None:
                if case == "layer":
                    measure.read_through(big)

            rounds = repetitions[case == "layer"]
            results = measure.run_interleaved(commands, rounds, before) if commands else {}
            check(results)
            runs |= results
    return {
        "shape": shape,
        "layer": layer.name,
        "source": layer.source,
        "threads": threads,
        "left_out": left_out,
        "runs": runs,
    }


def check(runs: Mapping[str, list[dict[str, Any]]]) -> None:
    """Check the values of all methods.

    Raises:
        RuntimeError: a method returns other values than ours, or ours differ between runs.
    """
    first = {method: method_runs[0] for method, method_runs in runs.items()}
    if len({result["digest"] for result in first.values()}) > 1:
        raise RuntimeError(f"ours does not produce the same values each time: {first}")
    for method, result in first.items():
        if result["differing"] > MOST_DIFFERING * result["elements"] or result["most_ulp"] > MOST_ULP:
            raise RuntimeError(
                f"{method} does not produce our values: {result['differing']} of {result['elements']} differ, "
                f"by up to {result['most_ulp']} units in the last place"
            )


def table(result: Mapping[str, Any]) -> Table:
    runs = result["runs"]
    rounds = dict.fromkeys(str(len(method_runs)) for method_runs in runs.values())
    shown = Table(
        title=f"to bfloat16: a matrix {list(result['shape'])} in memory; {result['layer']} from the page cache; "
        f"{result['threads']} threads, {' or '.join(rounds)} runs each: median (20th-80th percentile)",
        title_justify="left",
    )
    shown.add_column("method")
    for title in ("ms", "GB/s of output", "ours is", "peak / output", "differ", "ulp"):
        shown.add_column(title, justify="right")
    for case in CASES:
        of_case = {method: method_runs for method, method_runs in runs.items() if method.startswith(case)}
        ours_seconds = _seconds(runs[f"{case}: ours"]) if f"{case}: ours" in runs else None
        for method, method_runs in of_case.items():
            seconds, output = _seconds(method_runs), method_runs[0]["output_bytes"]
            peak = _peak(method_runs)
            shown.add_row(
                method,
                measure.spread([run["seconds"] for run in method_runs]).text(1e3, 1),
                f"{output / 1e9 / seconds:.2f}",
                f"{seconds / ours_seconds:.2f}x" if ours_seconds else "",
                "-" if peak is None else f"{peak:.2f}x",
                f"{method_runs[0]['differing']} of {method_runs[0]['elements']}",
                str(method_runs[0]["most_ulp"]),
            )
        shown.add_section()
    for method in result["left_out"]:
        shown.add_row(method, "left out: it is not installed")
    return shown


def targets(result: Mapping[str, Any]) -> list[str]:
    """Return the aims, and whether they were reached."""
    runs = result["runs"]
    lines = []
    for way in ("ours", "ours, worker threads"):
        for case in CASES:
            mine = runs.get(f"{case}: {way}")
            peers = {
                m: _seconds(method_runs) for m, method_runs in runs.items() if m.startswith(case) and "ours" not in m
            }
            if mine is None or not peers:
                continue
            if f"{case}: nemo" in peers:
                lines.append(_line(f"{case}: {way}", "5x nemo", peers[f"{case}: nemo"] / _seconds(mine), 5))
            name = min(peers, key=lambda method: peers[method])
            lines.append(_line(f"{case}: {way}", f"faster than {name}", peers[name] / _seconds(mine), 1))
            peak = _peak(mine)
            if case == "layer" and peak is not None:
                holds = "holds" if peak <= 1.1 else "DOES NOT HOLD"
                lines.append(f"  {case}: {way}, peak at most 1.1x the output: {peak:.2f}x, {holds}")
    return lines


def _line(who: str, what: str, ratio: float, least: float) -> str:
    return f"  {who}, {what}: {ratio:.2f}x, {'holds' if ratio >= least else 'DOES NOT HOLD'}"


def _seconds(runs: list[dict[str, Any]]) -> float:
    return statistics.median(run["seconds"] for run in runs)


def _peak(runs: list[dict[str, Any]]) -> float | None:
    """Return the peak of anonymous memory over the size of the output."""
    peaks = [run["anonymous_bytes"] for run in runs if run["anonymous_bytes"] is not None]
    return max(peaks) / runs[0]["output_bytes"] if peaks else None


def main(arguments: list[str] | None = None) -> None:
    parser = options.parser("dequant", __doc__, repetitions=5, room="1.4 GB")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes; the times are meaningless")
    parser.add_argument("--layer-repetitions", type=int, help="default: the value of --repetitions")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--method", action="append", choices=METHODS, help="default: all")
    parser.add_argument("--table", metavar="FILE", help="only print the table of a result file")
    options.add_worker(parser, 5)
    given = parser.parse_args(arguments)
    if given.worker:
        method, directory, rows, columns, threads = given.worker
        result = work(method, directory, (int(rows), int(columns)), int(threads), given.repetition)
        sys.stdout.write(json.dumps(result) + "\n")
        return
    if given.table:
        _show(measure.read_json(given.table))
        return
    environment = measure.environment()
    methods = given.method or list(METHODS)
    repetitions = given.repetitions, given.layer_repetitions or given.repetitions
    result = run(given.smoke, methods, repetitions, given.threads, given.directory)
    result = {"environment": environment, **result}
    _show(result)
    measure.write_json(given.json, result)


def _show(result: Mapping[str, Any]) -> None:
    show_environment(result["environment"])
    show(table(result))
    for line in targets(result):
        show(line)


if __name__ == "__main__":
    main()
