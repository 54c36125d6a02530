"""Tables on their way to a device: through pinned memory that is pinned once, so that nobody waits."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

_BLOCK_BYTES = 1 << 20  # a table of a layer of 128 experts is 4 KiB


def _pinned(numbers: int) -> Tensor:
    """Int64 numbers of pinned memory; torch keeps it when it is dropped, for the next time."""
    return torch.empty(numbers, dtype=torch.int64, device="cpu", pin_memory=True)


class Staging:
    """Hands out places in pinned memory, one after the other, and a new block where one is full.

    No place is handed out twice. A full block is dropped, not taken again: torch notes the stream of every copy out of
    pinned memory, also out of a part of it, and gives a dropped block to nobody before all of these copies are done
    (ATen/core/CachingHostAllocator.h, "HostAllocator design"). So any thread may stage for any stream of any device,
    and no event is needed here; two blocks or so take turns.
    """

    def __init__(self, allocate: Callable[[int], Tensor] = _pinned, block_bytes: int = _BLOCK_BYTES):
        self._allocate = allocate
        self._block_numbers = block_bytes // 8
        self._lock = threading.Lock()
        self._block, self._stop = torch.empty(0, dtype=torch.int64, device="cpu"), 0  # up to where places are taken

    def __call__(self, table: np.ndarray) -> Tensor:
        """An int64 table in pinned memory, to be copied from there with ``non_blocking=True`` and then dropped."""
        place = self._place(table.size)
        place.numpy()[:] = table.reshape(-1)
        return place.view(table.shape)

    def _place(self, numbers: int) -> Tensor:
        if numbers > self._block_numbers:
            return self._allocate(numbers)
        with self._lock:
            if self._stop + numbers > len(self._block):
                self._block, self._stop = self._allocate(self._block_numbers), 0
            start, self._stop = self._stop, self._stop + numbers
            return self._block[start : self._stop]


_STAGING = Staging()


def upload(table: np.ndarray, device: torch.device) -> Tensor:
    """An int64 table on a device, by one transfer that nobody waits for, on the current stream."""
    if device.type == "cpu":
        return torch.from_numpy(np.ascontiguousarray(table))
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        # A graph copies again at each replay, from memory that must stay its own: newer torch sees to that, if asked
        # during the capture; older ones refuse to pin then.
        return torch.from_numpy(np.ascontiguousarray(table)).pin_memory().to(device, non_blocking=True)
    return _STAGING(table).to(device, non_blocking=True)
