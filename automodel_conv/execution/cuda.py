"""CUDA devices: the implementation of ``protocols`` for loads to a GPU and saves from one."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from automodel_conv.execution.protocols import Device


class CudaStream:
    """A CUDA stream; implements ``protocols.Stream``."""

    def __init__(self, device: torch.device, behind: torch.cuda.Stream):
        self._device = device
        self._stream = torch.cuda.Stream(device)
        # The other stream may still write to tensors, or use memory that has just been freed.
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
            event = torch.cuda.Event(blocking=True)  # a thread that waits leaves its core to the readers
        event.record(self._stream)
        return event

    def wait(self, event: torch.cuda.Event) -> None:
        self._stream.wait_event(event)


class CudaDevice:
    """A CUDA device; implements ``protocols.Device``.

    Its streams wait for what is queued on the stream that was current in the thread that created it.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._current = torch.cuda.current_stream(device)

    def pinned(self, nbytes: int) -> Tensor:
        """Allocate pinned memory; torch rounds it up to a power of two, and keeps it to use it again."""
        return torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=True)

    def scratch(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device=self._device)

    def stream(self) -> CudaStream:
        return CudaStream(self._device, self._current)


def transfer_device(device: torch.device) -> Device | None:
    """Return the device that bytes are streamed through, or None for the CPU, whose tensors are read into directly."""
    return None if device.type == "cpu" else CudaDevice(device)
