"""Uploads of tables through pinned memory that is allocated once, so that the host never waits."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

_BLOCK_BYTES = 1 << 20  # the table of a layer of 128 experts is 4 KiB


def _pinned(count: int) -> Tensor:
    """Allocate ``count`` int64 elements of pinned memory; torch caches the memory after it is dropped."""
    return torch.empty(count, dtype=torch.int64, device="cpu", pin_memory=True)


class Staging:
    """Hands out places in a block of pinned memory, one after the other, and allocates a new block when it is full.

    No place is handed out twice. A full block is dropped, not reused here. torch records the stream of every copy out
    of pinned memory, even out of a part of it, and reuses a dropped block only after all of these copies are done
    (ATen/core/CachingHostAllocator.h, "HostAllocator design"). So any thread may stage for any stream of any device
    without an event. In practice about two blocks alternate.

    Args:
        allocate: returns the given number of int64 elements of pinned memory.
        block_bytes: size of a block. A larger table gets memory of its own.
    """

    def __init__(self, allocate: Callable[[int], Tensor] = _pinned, block_bytes: int = _BLOCK_BYTES):
        self._allocate = allocate
        self._block_size = block_bytes // 8
        self._lock = threading.Lock()
        self._block = torch.empty(0, dtype=torch.int64, device="cpu")
        self._used = 0  # elements of the block that were handed out

    def __call__(self, table: np.ndarray) -> Tensor:
        """Copy an int64 table into pinned memory; the caller copies it with ``non_blocking=True`` and drops it."""
        place = self._place(table.size)
        place.numpy()[:] = table.reshape(-1)
        return place.view(table.shape)

    def _place(self, count: int) -> Tensor:
        if count > self._block_size:
            return self._allocate(count)
        with self._lock:
            if self._used + count > len(self._block):
                self._block, self._used = self._allocate(self._block_size), 0
            start, self._used = self._used, self._used + count
            return self._block[start : self._used]


_STAGING = Staging()


def upload(table: np.ndarray, device: torch.device) -> Tensor:
    """Copy an int64 table to a device by one asynchronous transfer on the current stream."""
    if device.type == "cpu":
        return torch.from_numpy(np.ascontiguousarray(table))
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        # A graph copies again at each replay, so the memory must stay its own. Newer versions of torch ensure that if
        # memory is pinned during the capture; older ones refuse to pin during it.
        return torch.from_numpy(np.ascontiguousarray(table)).pin_memory().to(device, non_blocking=True)
    return _STAGING(table).to(device, non_blocking=True)
