"""Measure kernels against ``copy_`` of the same bytes and against the usual code in torch, on layers of real models.

    python -m benchmarks.gpu.kernels    (a worker; a cell is an operation on a layer)

Every way is verified bit by bit just before it is timed, and is not timed if a byte is wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.timing import median_ms, why_broken
from benchmarks.gpu.worker import SILENT, Channel, serve, text_of
from benchmarks.operations import OPERATIONS, Case, Experts, Mismatch, Way
from benchmarks.quantized import QUANTIZED, Quantized

# E, I, H of the published config.json. The last ones are left out if time is short.
LAYERS = (
    Experts("Qwen3-235B-A22B", 128, 1536, 4096),
    Experts("gpt-oss-120b", 128, 2880, 2880, note="in bf16; published in mxfp4"),
    Experts("Qwen3-235B-A22B at 8 mod 16", 128, 1536, 4096, note="sources at 8 mod 16 bytes", phase_bytes=8),
    Experts("DeepSeek-V3", 64, 2048, 7168, note="64 of 256 experts, in bf16; published in fp8"),
    Experts("Qwen3-30B-A3B", 128, 768, 2048),
    Experts("Mixtral-8x7B", 8, 14336, 4096),
)
SMOKE_LAYERS = (Experts("tiny", 2, 24, 48), Experts("tiny at 8 mod 16", 2, 24, 48, phase_bytes=8))

BF16, F32 = torch.bfloat16, torch.float32
# Operation, destination, source.
MEASURED = {name: (name, BF16, BF16) for name in OPERATIONS} | {
    "concatenate, bf16 to fp32": ("concatenate", F32, BF16),
    "concatenate, fp32 to bf16": ("concatenate", BF16, F32),
}

TimeMs = Callable[[Callable[[], object], torch.device], float]


def layers(smoke: bool) -> tuple[Experts, ...]:
    return SMOKE_LAYERS if smoke else LAYERS


def cells(smoke: bool) -> dict[str, tuple[Experts, str]]:
    """Return layer and operation, by the name of the cell."""
    return {f"{layer.name}: {name}": (layer, name) for layer in layers(smoke) for name in (*MEASURED, *QUANTIZED)}


def make_case(name: str, layer: Experts, device: torch.device) -> Case | Quantized:
    """Return the buffers of an operation on a layer."""
    if name in QUANTIZED:
        return QUANTIZED[name](layer, device)
    operation, dst, src = MEASURED[name]
    return OPERATIONS[operation](layer, dst, src, device)


def ways(case: Case | Quantized) -> dict[str, Callable[[], Way]]:
    """Return the ways to compare on a case, ours first.

    Each is created when it is needed.
    """
    if isinstance(case, Quantized):
        return {name: lambda way=way: way for name, way in case.ways().items()}
    compared: dict[str, Callable[[], Way]] = {
        "ours": lambda: case.kernel,
        "ours, addresses known": case.with_addresses,
        "stack, cat, transpose": lambda: case.idiom,
        "copy_ loop": case.loop,
    }
    if case.verb == "strided_copy":
        compared["_foreach_copy_"] = case.foreach
    return compared


class Attempts:
    """Ways that are tried one by one, and the failure of each; see ``benchmarks.gpu.working``."""

    def __init__(self, device: torch.device, channel: Channel, without: Mapping[str, str]):
        self._device = device
        self._channel = channel
        self.wrong: dict[str, str] = {}
        self.failed: dict[str, str] = dict(without)  # they killed a worker
        self.no_memory: set[str] = set()

    @contextmanager
    def of(self, way: str) -> Iterator[None]:
        """Catch and record all errors of one way, so that they affect only this way."""
        self._channel.way(way)
        try:
            yield
        except Mismatch as error:
            self.wrong[way] = text_of(error)
        except torch.OutOfMemoryError:
            self.no_memory.add(way)
            torch.cuda.empty_cache()
        except Exception as error:  # a way may be third-party code, which can raise anything
            self.failed[way] = text_of(error)
        if why := why_broken(self._device):
            self._channel.broken(f"{self.failed.get(way, '')}\nthe device: {why}".strip())

    def is_sound(self, way: str) -> bool:
        return way not in self.wrong and way not in self.failed and way not in self.no_memory


def measure_case(
    case: Case | Quantized,
    device: torch.device,
    *,
    channel: Channel = SILENT,
    without: Mapping[str, str] | None = None,
    time_ms: TimeMs = median_ms,
) -> dict[str, Any]:
    """Return the median milliseconds of each way (None if memory ran out), and the errors by way.

    All ways are verified before any is timed.

    Args:
        without: ways to skip, and why.
    """
    attempts = Attempts(device, channel, without or {})
    sound: dict[str, Way] = {}
    for name, make in ways(case).items():
        if attempts.is_sound(name):
            with attempts.of(name):
                way = make()
                case.verify(name, way)
                sound[name] = way
    # The buffers of copy_ are freed after it is timed.
    runs: dict[str, Callable[[], Way]] = {"copy_": lambda: copy(case.bytes_moved, device)}
    runs |= {name: lambda way=way: way for name, way in sound.items()}
    ms: dict[str, float | None] = {}
    for name, create in runs.items():
        if attempts.is_sound(name):
            with attempts.of(name):
                ms[name] = time_ms(create(), device)
    ms |= dict.fromkeys(attempts.no_memory)
    return {"bytes_moved": case.bytes_moved, "ms": ms, "wrong": attempts.wrong, "failed": attempts.failed}


def copy(bytes_moved: int, device: torch.device) -> Callable[[], Tensor]:
    """Return ``copy_`` of half of the bytes: each is read and written.

    Buffers are allocated at the first call.
    """
    buffers: list[Tensor] = []

    def run() -> Tensor:
        if not buffers:
            src = torch.empty(bytes_moved // 16, dtype=torch.int64, device=device).random_(-(2**63), None)
            buffers.extend((torch.empty_like(src), src))
        return buffers[0].copy_(buffers[1])

    return run


def work(order: Mapping[str, Any], channel: Channel) -> None:
    device = torch.device(order["device"])
    known = cells(order["smoke"])
    for cell in order["cells"]:
        channel.begin(cell)
        with a_cell(cell, device, channel):
            layer, name = known[cell]
            without = order["without"].get(cell)
            measured = measure_case(make_case(name, layer, device), device, channel=channel, without=without)
            channel.row(cell, **described(layer), operation=name, **measured)


@contextmanager
def a_cell(cell: str, device: torch.device, channel: Channel) -> Iterator[None]:
    """Turn a failure outside of any way into a failure of the cell."""
    try:
        yield
    except Exception as error:  # the next cell may work
        if why := why_broken(device):
            channel.broken(f"{text_of(error)}\nthe device: {why}")
        channel.row(cell, error=text_of(error))
    if device.type == "cuda":
        torch.cuda.empty_cache()


def described(layer: Experts) -> dict[str, Any]:
    return {
        "layer": layer.name,
        "note": layer.note,
        "experts": layer.experts,
        "intermediate": layer.intermediate,
        "hidden": layer.hidden,
    }


if __name__ == "__main__":
    serve(work)
