"""CUDA devices as the streaming loader wants them."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from automodel_conv.execution.protocols import Device


class CudaStream:
    """See ``device.Stream``."""

    def __init__(self, device: torch.device, behind: torch.cuda.Stream):
        self._device = device
        self._stream = torch.cuda.Stream(device)
        # Tensors may still be written there, and memory that was freed a moment ago be in use.
        self._stream.wait_stream(behind)

    def copy_all(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
        with torch.cuda.stream(self._stream):
            for dst, src in pairs:
                dst.copy_(src, non_blocking=True)

    def run(self, work: Callable[[], None]) -> None:
        with torch.cuda.stream(self._stream):
            work()

    def scratch(self, nbytes: int) -> Tensor:
        with torch.cuda.stream(self._stream):
            return torch.empty(nbytes, dtype=torch.uint8, device=self._device)

    def record(self, event: torch.cuda.Event | None = None) -> torch.cuda.Event:
        if event is None:
            event = torch.cuda.Event(blocking=True)  # threads that wait leave their core to those that read
        event.record(self._stream)
        return event

    def wait(self, event: torch.cuda.Event) -> None:
        self._stream.wait_event(event)


class CudaDevice:
    """See ``device.Device``. Its streams are behind the current one of the thread that makes it."""

    def __init__(self, device: torch.device):
        self._device = device
        self._current = torch.cuda.current_stream(device)

    def pinned(self, nbytes: int) -> Tensor:
        """torch rounds this up to a power of two, and keeps it for the next time."""
        return torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=True)

    def scratch(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device=self._device)

    def stream(self) -> CudaStream:
        return CudaStream(self._device, self._current)


def transfer_device(device: torch.device) -> Device | None:
    """What streams to tensors of a device; None for the CPU, which files are read straight to."""
    return None if device.type == "cpu" else CudaDevice(device)
