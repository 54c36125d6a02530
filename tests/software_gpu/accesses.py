"""Which bytes a launch or a copy touches: boxes of elements at many addresses, and whether two share a byte."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class GpuFault(AssertionError):
    """What a GPU would not say: it would fault, write wrong bytes, or do either now and then."""


class Box(NamedTuple):
    """Equal boxes ``[n, m]`` of elements, one at each address."""

    name: str
    starts: np.ndarray  # int64 [k], addresses in bytes
    shape: tuple[int, int]
    strides: tuple[int, int]  # in bytes
    itemsize: int
    is_written: bool

    @property
    def span_bytes(self) -> int:
        """Bytes from the first to the end of the last; 0 where a side is 0."""
        reach = sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))
        return reach + self.itemsize if min(self.shape) else 0

    @property
    def stops(self) -> np.ndarray:
        return self.starts + self.span_bytes

    @property
    def meets_itself(self) -> bool:
        """Whether two elements of one box share a byte, where neither side's steps lie within the other's."""
        sides = sorted(zip(self.strides, self.shape, strict=True))
        end = self.itemsize
        for stride, size in sides:
            if size > 1:
                if stride < end:
                    return True
                end += (size - 1) * stride
        return False


def array_at(address: int, shape: Sequence[int], strides: Sequence[int], dtype: np.dtype | type) -> np.ndarray:
    """The memory at an address, as elements that may lie anywhere."""
    span = np.dtype(dtype).itemsize + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    memory = (ctypes.c_ubyte * span).from_address(address)
    return np.ndarray(tuple(shape), dtype, memory, strides=tuple(strides))


def conflict(boxes: Sequence[Box]) -> str | None:
    """What says that a byte is written and touched again by another box; None where none is."""
    for box in boxes:
        if box.is_written and box.meets_itself:
            return f"elements of {box.name} share memory: {list(box.shape)}, strides {list(box.strides)} in bytes"
    boxes = [box for box in boxes if box.span_bytes and len(box.starts)]
    if not boxes:
        return None
    starts = np.concatenate([box.starts for box in boxes])
    stops = np.concatenate([box.stops for box in boxes])
    owners = np.repeat(np.arange(len(boxes)), [len(box.starts) for box in boxes])
    order = np.argsort(starts, kind="stable")
    reach = np.maximum.accumulate(stops[order])
    begins = np.flatnonzero(np.concatenate([[True], starts[order][1:] >= reach[:-1]]))
    ends = np.append(begins[1:], len(order))
    written = np.array([box.is_written for box in boxes])
    writes = np.add.reduceat(written[owners[order]].astype(np.int64), begins)
    for cluster in np.flatnonzero((ends - begins > 1) & (writes > 0)):
        of_cluster = order[begins[cluster] : ends[cluster]]
        met = _meet(boxes, owners[of_cluster], starts[of_cluster], int(reach[ends[cluster] - 1]))
        if met is not None:
            return met
    return None


def _meet(boxes: Sequence[Box], owners: np.ndarray, starts: np.ndarray, stop: int) -> str | None:
    """Byte by byte, for boxes whose spans overlap: they may yet fill each other's gaps."""
    first = int(starts[0])
    marks = np.zeros(stop - first, np.uint8)  # 1 and the number of the box that writes there
    for is_written in (True, False):
        for owner, start in zip(owners.tolist(), starts.tolist(), strict=True):
            box = boxes[owner]
            if box.is_written != is_written:
                continue
            at = marks[start - first :]
            strides = (*box.strides, 1)
            touched = np.lib.stride_tricks.as_strided(at, (*box.shape, box.itemsize), strides)
            if touched.any():
                other = boxes[int(touched.max()) - 1].name
                return f"{box.name} at {start:#x} shares bytes with {other}, which is written"
            if is_written:
                touched[...] = owner + 1
    return None
