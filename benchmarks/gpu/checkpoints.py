"""Write the checkpoints of the load benchmarks, as fast as the page cache accepts them.

    python -m benchmarks.gpu.checkpoints    (a worker; a cell is a checkpoint)

Each tensor is a different range of the same random bytes, so that no two are equal, and each run writes the same files.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch

from automodel_conv.dtypes import dtype_code
from benchmarks import measure
from benchmarks.gpu.worker import Channel, serve, text_of
from benchmarks.shapes import SMALL, Shape, TensorSpec, checkpoint_tensors, meta_model, qwen3_30b

_BLOCK = 128
_SHIFT_BYTES = 4097
_THREADS = 8
# Largest share of the free disk to use.
_DISK_SHARE = 0.6
_LAYER_BYTES = 1.25e9

WARM_UP, WARM_UP_FP8, SHORT, LONG, FP8 = "warm-up", "warm-up, fp8", "short", "long", "fp8"


class Written(NamedTuple):
    shape: Shape
    is_fp8: bool = False


def checkpoints(layers: int, smoke: bool) -> dict[str, Written]:
    """Return all checkpoints, by name, the shortest first.

    Args:
        layers: layers of the long checkpoint, 1.2 GB each. The short one has a third, so that the two determine a
        slope.
    """
    short = qwen3_30b(max(1, layers // 3))
    return {
        WARM_UP: Written(SMALL),
        WARM_UP_FP8: Written(SMALL, is_fp8=True),
        SHORT: Written(SMALL if smoke else short),
        FP8: Written(SMALL if smoke else short, is_fp8=True),
        LONG: Written(_longer(SMALL) if smoke else qwen3_30b(layers)),
    }


def layers_that_fit(layers: int, free_bytes: float) -> int:
    """Return the number of layers for which all checkpoints and a saved one fit on the disk.

    The checkpoints have 1 + 1/3 + half of 1/3 of the bytes of the long one.
    """
    return max(1, min(layers, int(_DISK_SHARE * free_bytes / (11 / 6 * _LAYER_BYTES))))


def _longer(shape: Shape) -> Shape:
    config = {**shape.config, "num_hidden_layers": 4}
    return Shape("small, longer", shape.source, shape.model_type, config, keys=4 * (4 * 3 + 9) + 3, files=4)


def write(made: Written, directory: str) -> dict[str, Any]:
    """Write config, files and index, only through the page cache, over the files of an interrupted write."""
    start = time.perf_counter()
    shape = made.shape
    shutil.rmtree(directory, ignore_errors=True)
    Path(directory).mkdir()
    model = meta_model(shape)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(directory)
    specs = checkpoint_tensors(shape, model)
    if made.is_fp8:
        specs = [part for spec in specs for part in _quantized(spec)]
        _add_to_config(directory)
    total = sum(spec.nbytes for spec in specs)
    files: dict[str, list[TensorSpec]] = {}
    before = 0
    for spec in specs:
        number = before * shape.files // total + 1
        files.setdefault(f"model-{number:05d}-of-{shape.files:05d}.safetensors", []).append(spec)
        before += spec.nbytes
    sources = _sources(max(spec.nbytes for spec in specs) + _SHIFT_BYTES * len(specs))
    shifts = {spec.name: _SHIFT_BYTES * number for number, spec in enumerate(specs)}
    with ThreadPoolExecutor(_THREADS) as pool:
        for done in [pool.submit(_write_file, Path(directory, f), s, sources, shifts) for f, s in files.items()]:
            done.result()
    index = {"metadata": {"total_size": total}, "weight_map": {s.name: f for f, parts in files.items() for s in parts}}
    Path(directory, "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    return {
        "shape": shape.name,
        "source": shape.source,
        "file_bytes": measure.file_bytes(directory),
        "write_s": round(time.perf_counter() - start, 2),
    }


def _quantized(spec: TensorSpec) -> list[TensorSpec]:
    """Return experts as DeepSeek-V3 and Qwen3-FP8 are published, and the rest unchanged."""
    if ".experts." not in spec.name:
        return [spec]
    grid = tuple(-(-size // _BLOCK) for size in spec.shape)
    codes = TensorSpec(spec.name, torch.float8_e4m3fn, spec.shape)
    return [codes, TensorSpec(f"{spec.name}_scale_inv", torch.float32, grid)]


def _add_to_config(directory: str) -> None:
    path = Path(directory, "config.json")
    config = json.loads(path.read_text())
    config["quantization_config"] = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [_BLOCK, _BLOCK],
    }
    path.write_text(json.dumps(config, indent=1))


def _sources(nbytes: int) -> dict[torch.dtype, memoryview]:
    """Return the bytes to cut tensors from, by dtype: finite values only.

    Scales have a bfloat16's few digits, so that float32 holds every product with a code, and the usual code in torch
    produces the same bytes as this package.
    """
    generator = torch.Generator().manual_seed(0)
    quads = torch.empty(nbytes // 8 + 8, dtype=torch.int64).random_(-(2**63), None, generator=generator)
    numbers = quads.view(torch.int16) & ~0x4000
    codes = quads.view(torch.uint8).clone()  # without NaN: torch does not define which one it becomes
    codes.masked_fill_(codes & 127 == 127, 0)
    scales = torch.rand(nbytes // 4 + 8, generator=generator).to(torch.bfloat16).float()
    made = {torch.bfloat16: numbers, torch.float8_e4m3fn: codes, torch.float32: scales}
    return {dtype: memoryview(tensor.view(torch.uint8).numpy()) for dtype, tensor in made.items()}


def _write_file(
    path: Path, specs: list[TensorSpec], sources: Mapping[torch.dtype, memoryview], shifts: Mapping[str, int]
) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    # Widest elements first, so that each starts at a multiple of its size.
    specs = sorted(specs, key=lambda spec: -spec.dtype.itemsize)
    stop = 0
    for spec in specs:
        start, stop = stop, stop + spec.nbytes
        header[spec.name] = {"dtype": dtype_code(spec.dtype), "shape": spec.shape, "data_offsets": [start, stop]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb", buffering=0) as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for spec in specs:
            shift = shifts[spec.name] // spec.dtype.itemsize * spec.dtype.itemsize
            view = sources[spec.dtype][shift : shift + spec.nbytes]
            while view:
                view = view[os.write(out.fileno(), view) :]


def work(order: Mapping[str, Any], channel: Channel) -> None:
    known = checkpoints(order["layers"], order["smoke"])
    for cell in order["cells"]:
        channel.begin(cell)
        try:
            channel.row(cell, **write(known[cell], os.path.join(order["root"], cell)))
        except Exception as error:  # the loads of other checkpoints can still be measured
            channel.row(cell, error=text_of(error))


if __name__ == "__main__":
    serve(work)
