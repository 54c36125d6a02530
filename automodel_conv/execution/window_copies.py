"""Empty full windows of device memory: decode their codes, and copy their contents to the targets."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Sequence

from torch import Tensor

from automodel_conv.dtypes import itemsize
from automodel_conv.execution.buffers import dtype_of
from automodel_conv.execution.copy_batch import CopyBatch
from automodel_conv.execution.stats import CopyCounts
from automodel_conv.execution.window_decoding import WindowDecoder
from automodel_conv.kernels.launch import MAX_STRIDE, Launches, start
from automodel_conv.kernels.strided_copy_torch import strided_copy_torch
from automodel_conv.kernels.variants import Variant
from automodel_conv.schedule.code_slabs import Position, Rectangle
from automodel_conv.schedule.device import Window


class WindowCopies:
    """The work that empties all windows of a load: decoding of their codes, and copies to the targets.

    Args:
        windows: the windows of the load, in order.
        tensors: the targets, by number.
        regions: device memory that windows use in rotation: window ``n`` uses region ``n % len(regions)``.
    """

    def __init__(self, windows: Sequence[Window], tensors: Sequence[Tensor], regions: Sequence[Tensor]):
        self._windows = windows
        self._tensors = tensors
        self._regions = regions
        self._lock = threading.Lock()
        groups = [group for window in windows for group in window.scale_groups.values()]
        self._decoder = WindowDecoder(groups, tensors, regions[0].device) if groups else None

    def release(self) -> None:
        """Release the device memory of the decoder."""
        self._decoder = None

    def variants(self, most: int) -> frozenset[Variant]:
        """Return at most ``most`` variants of kernels to compile: those that write the most bytes.

        Windows of equal geometry need the same variants, so the bytes of only the first of them are counted.
        """
        nbytes: Counter[frozenset[Variant]] = Counter()
        seen: set[object] = set()
        for number, window in enumerate(self._windows):
            geometries = {(c.dtype, c.box, self._tensors[c.target].dtype) for c in window.copies}
            if not geometries <= seen:
                nbytes += self._batch(number).variants()
            if not window.rectangles.keys() <= seen:
                for rectangle, places, launches in self._decode_launches(number):
                    nbytes[launches.variants] += len(places) * _nbytes(rectangle)
            seen |= geometries
            seen |= window.rectangles.keys()
        chosen: frozenset[Variant] = frozenset()
        for variants, _ in nbytes.most_common():
            if len(chosen | variants) <= most:
                chosen |= variants
        return chosen

    def run(self, number: int, chosen: frozenset[Variant] | None) -> CopyCounts:
        """Queue the decoding of a full window and the copies out of it, on the current stream.

        Args:
            number: number of the window.
            chosen: the variants that may be launched; None for no kernels.

        Returns:
            How many copies and decoded rectangles are the work of kernels, and how many that of torch.
        """
        window, region = self._windows[number], self._region(number)
        copies = self._batch(number).plan(chosen is not None, chosen)
        launches, counts, by_kernels = [], copies.counts, set()
        if chosen is not None:
            for rectangle, places, decoding in self._decode_launches(number):
                if decoding.variants <= chosen:
                    launches.append(decoding)
                    by_kernels.add(rectangle)
                    counts += CopyCounts(len(places), 0)
        with self._lock:  # so that only one window at a time uses scratch
            if self._decoder is not None:
                self._decoder.compute_tables(window.scale_groups.values(), region)
                for rectangle, places in window.rectangles.items():
                    if rectangle not in by_kernels:
                        self._decoder.decode_by_torch(rectangle, places, window.scale_groups[rectangle.kind], region)
                        counts += CopyCounts(0, len(places))
            start(*launches, *copies.launches)  # one upload
            strided_copy_torch(*copies.by_torch)
        return counts

    def _region(self, number: int) -> Tensor:
        """Return the memory of a window, uint8."""
        return self._regions[number % len(self._regions)]

    def _decode_launches(self, number: int) -> Iterator[tuple[Rectangle, Sequence[Position], Launches]]:
        """Return ``(geometry, positions, launches)`` of the rectangles that kernels can decode."""
        window = self._windows[number]
        for rectangle, places in window.rectangles.items():
            widest = max(rectangle.shape[1], rectangle.codes_stride, *rectangle.target_strides)
            if self._decoder is not None and widest <= MAX_STRIDE:
                group = window.scale_groups[rectangle.kind]
                yield rectangle, places, self._decoder.launches(rectangle, places, group, self._region(number))

    def _batch(self, number: int) -> CopyBatch:
        """Return the copies out of a window, ordered so that copies that fill each other's gaps are adjacent."""
        region = self._region(number)
        typed: dict[str, Tensor] = {}
        batch = CopyBatch()
        for copies in self._windows[number].copies:
            if copies.dtype not in typed:
                typed[copies.dtype] = region.view(dtype_of(copies.dtype, "a source"))
            batch.add(copies.as_strided_copy(), [typed[copies.dtype]], self._tensors[copies.target])
        return batch


def _nbytes(rectangle: Rectangle) -> int:
    """Return the bytes of the values of a rectangle."""
    rows, columns = rectangle.shape
    return rows * columns * itemsize(rectangle.kind.value_dtype)
