"""The memory that tensors hold, the only memory that a kernel may touch."""

from __future__ import annotations

import gc
import threading
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from tests.software_gpu.accesses import Box, GpuFault


class Touched(NamedTuple):
    """A box that was touched, and the storages that hold it."""

    box: Box
    storages: tuple[StorageWeakRef, ...]

    @property
    def is_alive(self) -> bool:
        return not all(storage.expired() for storage in self.storages)


class Allocations:
    """An index of the storages of all live tensors, which finds the storage of an access.

    All tensors are scanned only if an address is in no known storage.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: dict[tuple[int, int], StorageWeakRef] = {}
        self._starts = self._stops = np.empty(0, np.int64)
        self._storages: list[StorageWeakRef] = []
        self._host_only: set[StorageWeakRef] = set()

    def note(self, tensor: Tensor) -> None:
        """Add the memory of a tensor without a scan."""
        storage = tensor.untyped_storage()
        span = storage.data_ptr(), storage.data_ptr() + storage.nbytes()
        with self._lock:
            if span not in self._known or self._known[span].expired():
                self._known[span] = StorageWeakRef(storage)
                self._starts = self._stops = np.empty(0, np.int64)  # to be sorted again

    def keep_from_kernels(self, tensor: Tensor) -> None:
        """Forbid kernels to touch the memory of a tensor, which belongs to the host."""
        self._host_only.add(StorageWeakRef(tensor.untyped_storage()))

    def allocated_bytes(self) -> int:
        """Return the bytes of all storages."""
        gc.collect()
        return sum(stop - start for start, stop, _ in _living())

    def check(self, boxes: Sequence[Box]) -> list[Touched]:
        """Return the boxes that are not empty, with the storages that hold them.

        Raises:
            GpuFault: a box leaves the memory of every live tensor, or is in the host's memory.
        """
        with self._lock:
            return [
                Touched(box, tuple(self._storages[number] for number in self._check(box)))
                for box in boxes
                if box.span_bytes and len(box.starts)
            ]

    def _check(self, box: Box) -> set[int]:
        for look in (self._sort, self._look, None):
            number = np.searchsorted(self._starts, box.starts, side="right") - 1
            inside = number >= 0
            inside[inside] = box.stops[inside] <= self._stops[number[inside]]
            numbers = set(np.unique(number[inside]).tolist())
            if inside.all() and not any(self._storages[n].expired() for n in numbers):
                if any(self._storages[n] in self._host_only for n in numbers):
                    raise GpuFault(f"a kernel touches the host's memory: {box.name}")
                return numbers
            if look:
                look()
        outside = int(np.flatnonzero(~inside)[0])
        raise GpuFault(
            f"{box.name} leaves memory: {box.span_bytes} bytes at {int(box.starts[outside]):#x} are in no tensor; "
            f"{list(box.shape)}, strides {list(box.strides)} in bytes"
        )

    def _look(self) -> None:
        self._known = {(start, stop): storage for start, stop, storage in _living()}
        self._sort()

    def _sort(self) -> None:
        # Storages of the same memory, such as those of two of its arrays, count as the longest of them.
        kept: list[tuple[int, int]] = []
        self._known = {span: storage for span, storage in self._known.items() if not storage.expired()}
        for span in sorted(self._known, key=lambda span: (span[0], -span[1])):
            if not kept or span[1] > kept[-1][1]:
                kept.append(span)
        self._starts = np.array([start for start, _ in kept], np.int64)
        self._stops = np.array([stop for _, stop in kept], np.int64)
        self._storages = [self._known[span] for span in kept]
        self._host_only = {storage for storage in self._host_only if not storage.expired()}


_PLAIN = (Tensor, torch.nn.Parameter)


def _living() -> list[tuple[int, int, StorageWeakRef]]:
    """Return the first and last address of each storage in host memory that a tensor holds."""
    storages: dict[tuple[int, int], StorageWeakRef] = {}
    for tensor in [thing for thing in gc.get_objects() if type(thing) in _PLAIN]:
        if tensor.device.type == "cpu" and tensor.layout == torch.strided:
            storage = tensor.untyped_storage()
            if storage.nbytes():
                storages.setdefault((storage.data_ptr(), storage.nbytes()), StorageWeakRef(storage))
    return [(start, start + nbytes, storage) for (start, nbytes), storage in storages.items()]
