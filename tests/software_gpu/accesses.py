"""The bytes that a launch or a copy touches: boxes of elements at many addresses, and whether two share a byte."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class GpuFault(AssertionError):
    """A fault that a GPU would not report: it would crash, write wrong bytes, or do either now and then."""


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
        """Return the bytes from the first element to the end of the last; 0 if a side is 0."""
        reach = sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))
        return reach + self.itemsize if min(self.shape) else 0

    @property
    def stops(self) -> np.ndarray:
        return self.starts + self.span_bytes

    @property
    def meets_itself(self) -> bool:
        """Return whether two elements of one box share a byte, if neither stride nests within the other."""
        sides = sorted(zip(self.strides, self.shape, strict=True))
        end = self.itemsize
        for stride, size in sides:
            if size > 1:
                if stride < end:
                    return True
                end += (size - 1) * stride
        return False


def array_at(address: int, shape: Sequence[int], strides: Sequence[int], dtype: np.dtype | type) -> np.ndarray:
    """Return the memory at an address as elements, which need no alignment."""
    span = np.dtype(dtype).itemsize + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    memory = (ctypes.c_ubyte * span).from_address(address)
    return np.ndarray(tuple(shape), dtype, memory, strides=tuple(strides))


def conflict(boxes: Sequence[Box]) -> str | None:
    """Return a text about a byte that one box writes and another touches, or None if there is none."""
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
    """Compare boxes whose spans overlap byte by byte: they may still fill each other's gaps."""
    first = int(starts[0])
    marks = np.zeros(stop - first, np.uint8)  # 1 plus the number of the box that writes the byte
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
