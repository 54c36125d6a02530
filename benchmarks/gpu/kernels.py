"""Kernels against ``copy_`` of the same bytes and against what people write in torch, on layers of real models."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from automodel_conv.kernels import interleave as interleaving
from automodel_conv.kernels import transpose as transposing
from benchmarks.gpu.timing import median_ms
from benchmarks.operations import OPERATIONS, Case, Experts, Way
from benchmarks.quantized import QUANTIZED, Quantized

# E, I, H of the published config.json. In this order, so that what comes last is left out where time is short.
LAYERS = (
    Experts("Qwen3-235B-A22B", 128, 1536, 4096),
    Experts("Mixtral-8x7B", 8, 14336, 4096),
    Experts("gpt-oss-120b", 128, 2880, 2880, note="in bf16; published in mxfp4"),
    Experts("Qwen3-30B-A3B", 128, 768, 2048),
    Experts("DeepSeek-V3", 64, 2048, 7168, note="64 of 256 experts, in bf16; published in fp8"),
    Experts("Qwen3-235B-A22B at 8 mod 16", 128, 1536, 4096, note="sources at 8 mod 16 bytes", phase_bytes=8),
)
SMOKE_LAYERS = (Experts("tiny", 2, 24, 48), Experts("tiny at 8 mod 16", 2, 24, 48, phase_bytes=8))

BF16, F32 = torch.bfloat16, torch.float32
# Operation, destination, source.
MEASURED = {name: (name, BF16, BF16) for name in OPERATIONS} | {
    "concatenate, bf16 to fp32": ("concatenate", F32, BF16),
    "concatenate, fp32 to bf16": ("concatenate", BF16, F32),
}
SWEPT = ("concatenate transposed", "interleave columns", "deinterleave columns")
TILES = ((64, 64), (64, 128), (128, 64), (64, 32), (32, 32))


def ways(case: Case | Quantized) -> dict[str, Way]:
    """What is compared on a case, ours first."""
    if isinstance(case, Quantized):
        return case.ways()
    compared = {
        "ours": case.kernel,
        "ours, addresses known": case.with_addresses(),
        "stack, cat, transpose": case.idiom,
        "copy_ loop": case.loop(),
    }
    if case.verb == "strided_copy":
        compared["_foreach_copy_"] = case.foreach()
    return compared


def measure_layers(layers: tuple[Experts, ...], device: torch.device, deadline: float) -> Iterator[dict[str, Any]]:
    """One row for each layer and operation; none begins after ``deadline``, by ``time.monotonic``.

    Raises:
        Mismatch: a way gave wrong bytes; it and what follows is not timed then.
    """
    for layer in layers:
        for name in (*MEASURED, *QUANTIZED):
            if time.monotonic() > deadline:
                return
            case = _case(name, layer, device)
            yield {
                "layer": layer.name,
                "note": layer.note,
                "experts": layer.experts,
                "intermediate": layer.intermediate,
                "hidden": layer.hidden,
                "operation": name,
                **measure_case(case, device),
            }
            del case
            if device.type == "cuda":
                torch.cuda.empty_cache()


def _case(name: str, layer: Experts, device: torch.device) -> Case | Quantized:
    if name in QUANTIZED:
        return QUANTIZED[name](layer, device)
    operation, dst, src = MEASURED[name]
    return OPERATIONS[operation](layer, dst, src, device)


def measure_case(
    case: Case | Quantized, device: torch.device, time_ms: Callable[..., float] = median_ms
) -> dict[str, Any]:
    """Median milliseconds of each way, None where memory did not suffice; all ways are verified before any is timed."""
    compared = ways(case)
    fits = {name: _within_memory(lambda name=name: case.verify(name, compared[name])) for name in compared}
    found: dict[str, float | None] = {"copy_": time_ms(_copy(case.bytes_moved, device), device)}
    for name, way in compared.items():
        found[name] = None
        if fits[name]:
            _within_memory(lambda name=name, way=way: found.update({name: time_ms(way, device)}))
    return {"bytes_moved": case.bytes_moved, "ms": found}


def sweep(layers: tuple[Experts, ...], device: torch.device, deadline: float) -> Iterator[dict[str, Any]]:
    """The transposing kernels with other tiles."""
    for layer in layers:
        for operation in SWEPT:
            case = OPERATIONS[operation](layer, BF16, BF16, device)
            roof = median_ms(_copy(case.bytes_moved, device), device)
            for tile in TILES:
                if time.monotonic() > deadline:
                    return
                with tiles(tile):
                    case.verify(f"{operation} with tiles {tile}", case.kernel)
                    ms = median_ms(case.kernel, device)
                yield {
                    "layer": layer.name,
                    "operation": operation,
                    "tile": list(tile),
                    "bytes_moved": case.bytes_moved,
                    "ms": {"copy_": roof, "ours": ms},
                }


@contextmanager
def tiles(tile: tuple[int, int]) -> Iterator[None]:
    """Elements of 2 bytes go in tiles of this many rows and columns."""
    changed: Mapping[tuple[int, int], tuple[int, int]] = {(2, 2): tile}
    with (
        mock.patch.dict(transposing._TILES, changed),
        mock.patch.dict(interleaving._INTERLEAVE_TILES, changed),
        mock.patch.dict(interleaving._DEINTERLEAVE_TILES, changed),
    ):
        yield


def _copy(bytes_moved: int, device: torch.device) -> Callable[[], Tensor]:
    """``copy_`` of half as many bytes: each is read and written."""
    src = torch.empty(bytes_moved // 16, dtype=torch.int64, device=device).random_(-(2**63), None)
    dst = torch.empty_like(src)
    return lambda: dst.copy_(src)


def _within_memory(run: Callable[[], object]) -> bool:
    """False where the device has not the memory."""
    try:
        run()
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return False
    return True
