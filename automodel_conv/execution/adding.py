"""Add the deltas of adapters to tensors and to the bytes of output files, in bounded memory.

Sums are computed in float32 (in float64 for tensors of float64) and rounded once.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from automodel_conv.execution.buffers import dtype_of
from automodel_conv.execution.factors import Factors
from automodel_conv.execution.workers import run_in_threads
from automodel_conv.execution.writing import SlabProducer
from automodel_conv.planning.copies import Target
from automodel_conv.planning.deltas import Block
from automodel_conv.schedule.writes import Slab

# Elements that are computed at once: their sums and their factors stay in the cache.
_CHUNK = 1 << 18
# Elements of the lines of a block whose products are computed together, counted from the first line of the block. How a
# product is rounded may depend on its number of rows, and must not depend on where a tensor is cut into chunks.
_TILE = 1 << 16
# Elements of a tensor that one thread adds deltas to before it takes the next part.
_RANGE = 16 * _CHUNK
CHUNK_BYTES = 16 * _CHUNK
"""Bytes that one thread needs to compute sums."""


class Sums:
    """Memory for sums, which one thread uses again and again: new memory would be slow on its first use."""

    def __init__(self) -> None:
        self._memory = torch.empty(0)

    def of(self, count: int, like: Tensor) -> Tensor:
        """Return ``count`` elements, 1-D, on the device of ``like``, in the dtype in which its sums are computed."""
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        if (self._memory.dtype, self._memory.device) != (dtype, like.device) or self._memory.numel() < count:
            self._memory = torch.empty(count, dtype=dtype, device=like.device)
        return self._memory[:count]


def add_blocks(memory: Tensor, start: int, blocks: Sequence[Block], factors: Factors, scratch: Sums) -> None:
    """Add blocks of deltas to a range of a tensor's elements, or replace elements by those of deltas without B.

    Args:
        memory: elements of a contiguous tensor, 1-D, of a floating dtype, on any device. Written in place.
        start: index in the tensor of the first element of ``memory``.
        blocks: blocks of the tensor, also those outside ``memory``. Those that replace elements come first.
        factors: the matrices of the deltas.
        scratch: memory of this thread.
    """
    starts = np.array([block.offset for block in blocks], np.int64)
    stops = np.array([block.stop for block in blocks], np.int64)
    for first in range(0, memory.numel(), _CHUNK):
        chunk = memory[first : first + _CHUNK]
        begin, end = start + first, start + first + chunk.numel()
        near = np.flatnonzero((starts < end) & (stops > begin)).tolist()
        parts = [lines for i in near if (lines := _lines_in(blocks[i], begin, end)) is not None]
        if not parts:
            continue
        low, high = min(begin, *(part.block.offset for part in parts)), max(end, *(part.block.stop for part in parts))
        # Tiles that lie partly in another chunk are computed whole. Only their elements in this chunk are kept.
        sums = scratch.of(high - low, memory)
        within = sums[begin - low : end - low].copy_(chunk)
        for part in parts:
            _add(sums, low, part, factors)
        chunk.copy_(within)


class _Lines(NamedTuple):
    """Rows of a block, or of the transposed block if its rows would be further apart."""

    block: Block
    is_transposed: bool


def _lines_in(block: Block, begin: int, end: int) -> _Lines | None:
    """Return the lines of a block that meet elements ``begin`` to ``end`` of its tensor; None if there are none."""
    is_transposed = block.row_stride < block.column_stride
    if is_transposed:
        block = block.transposed()
    span, step = (block.columns - 1) * block.column_stride, max(block.row_stride, 1)
    first = max(0, -((block.offset + span - begin) // step))
    last = min(block.rows - 1, (end - 1 - block.offset) // step)
    if first > last:
        return None
    tile = _lines_of_tile(block)
    first, last = first // tile * tile, min(block.rows - 1, last // tile * tile + tile - 1)
    row, offset = block.row + first * block.row_step, block.offset + first * block.row_stride
    return _Lines(block._replace(row=row, rows=last - first + 1, offset=offset), is_transposed)


def _lines_of_tile(block: Block) -> int:
    """Return the number of lines of a tile, which depends on nothing but the block."""
    return max(1, _TILE // max(block.row_stride, block.columns * block.column_stride, 1))


def _add(sums: Tensor, low: int, lines: _Lines, factors: Factors) -> None:
    """Add lines to the sums of the elements of their tensor from ``low`` on."""
    block, is_transposed = lines
    stack_a, stack_b = factors.of(block.delta)
    a = stack_a[block.matrix]
    shape, strides = (block.rows, block.columns), (block.row_stride, block.column_stride)
    place = sums.as_strided(shape, strides, block.offset - low)
    if stack_b is None:
        values = a.T if is_transposed else a
        place.copy_(values[block.row_slice, block.column_slice])
        return
    b = stack_b[block.matrix]
    left, right = (a.T, b.T) if is_transposed else (b, a)
    left, right = left[block.row_slice].to(sums), right[:, block.column_slice].to(sums)
    scale = factors.deltas[block.delta].scale
    for rows, part in zip(place.split(_lines_of_tile(block)), left.split(_lines_of_tile(block)), strict=True):
        rows.addmm_(part, right, alpha=scale)


def merge_bytes(factors: Factors, threads: int) -> int:
    """Return the bytes of memory that threads need to add deltas."""
    return factors.kept_bytes + threads * CHUNK_BYTES


def add_to_tensors(
    tensors: Mapping[str, Tensor], blocks: Mapping[str, Sequence[Block]], factors: Factors, threads: int
) -> None:
    """Add deltas to tensors in place, each on its own device.

    Args:
        tensors: the tensors by name.
        blocks: blocks of each tensor that has deltas, by its name.
        factors: the matrices of the deltas.
        threads: number of threads for tensors on the CPU.
    """
    on_host, others = [], []
    for name in blocks:
        tensor = tensors[name].detach()
        if tensor.device.type != "cpu" or not tensor.is_contiguous():
            others.append(name)
            continue
        flat = tensor.view(-1)
        on_host += [(name, flat, start) for start in range(0, flat.numel(), _RANGE)]

    def adder() -> Callable[[tuple[str, Tensor, int]], None]:
        scratch = Sums()

        def add(part: tuple[str, Tensor, int]) -> None:
            name, flat, start = part
            add_blocks(flat[start : start + _RANGE], start, blocks[name], factors, scratch)

        return add

    run_in_threads(on_host, threads, adder)
    with full_float32():
        for name in others:
            tensor = tensors[name].detach()
            elements = tensor.reshape(-1)  # a copy if the tensor is not contiguous
            add_blocks(elements, 0, blocks[name], factors, Sums())
            if not tensor.is_contiguous():
                tensor.copy_(elements.view(tensor.shape))


@contextmanager
def full_float32() -> Iterator[None]:
    """Compute products of float32 on CUDA devices in float32 for the length of a block, not in TF32."""
    flags = torch.backends.cuda.matmul
    before = flags.allow_tf32
    flags.allow_tf32 = False
    try:
        yield
    finally:
        flags.allow_tf32 = before


class _Changed(NamedTuple):
    """A target in an output file that has deltas."""

    begin: int
    """Byte of the file at which its data begins."""
    end: int
    dtype: torch.dtype
    blocks: Sequence[Block]


class Additions:
    """The deltas of adapters in output files.

    Args:
        targets: the targets of all files.
        places: output file and offset of each target; see ``slab_schedule``.
        blocks: blocks of each target that has deltas, by its name.
        factors: the matrices of the deltas.
    """

    def __init__(
        self,
        targets: Sequence[Target],
        places: Sequence[tuple[int, int]],
        blocks: Mapping[str, Sequence[Block]],
        factors: Factors,
    ):
        self._factors = factors
        self._changed: dict[int, list[_Changed]] = {}
        for target, (file, begin) in zip(targets, places, strict=True):
            if target.name in blocks:
                end, dtype = begin + target.nbytes, dtype_of(target.dtype, target.name)
                self._changed.setdefault(file, []).append(_Changed(begin, end, dtype, blocks[target.name]))
        for group in self._changed.values():
            group.sort(key=lambda changed: changed.begin)

    def added(self, start: Callable[[], SlabProducer]) -> Callable[[], SlabProducer]:
        """Return the function that starts a producer in a thread, with deltas added to what ``start`` produces."""
        return lambda: _AddingProducer(start(), self)

    def add(self, slab: Slab, memory: memoryview, scratch: Sums) -> None:
        """Add the deltas of a slab to its bytes, in place."""
        for changed in self.in_slab(slab):
            low = max(changed.begin, slab.offset_bytes)
            high = min(changed.end, slab.offset_bytes + slab.nbytes)
            part = memory[low - slab.offset_bytes : high - slab.offset_bytes]
            elements = torch.frombuffer(part, dtype=changed.dtype)
            add_blocks(
                elements, (low - changed.begin) // changed.dtype.itemsize, changed.blocks, self._factors, scratch
            )

    def in_slab(self, slab: Slab) -> list[_Changed]:
        """Return the targets with deltas that lie in a slab, in part or whole."""
        group = self._changed.get(slab.file, [])
        stop = bisect_left(group, slab.offset_bytes + slab.nbytes, key=lambda changed: changed.begin)
        first = bisect_right(group, slab.offset_bytes, hi=stop, key=lambda changed: changed.end)
        return group[first:stop] if slab.nbytes else []


class _AddingProducer:
    """A producer of slabs that adds deltas to those of another one."""

    def __init__(self, producer: SlabProducer, additions: Additions):
        self._producer, self._additions, self._scratch = producer, additions, Sums()

    def __call__(self, slab: Slab) -> list[memoryview]:
        views = self._producer(slab)
        if not self._additions.in_slab(slab):
            return views
        if len(views) > 1 or views[0].readonly:  # memory of the tensors that are saved
            views = [memoryview(bytearray().join(views))]
        self._additions.add(slab, views[0], self._scratch)
        return views

    def try_copy_range(self, slab: Slab, fd: int) -> bool:
        return not self._additions.in_slab(slab) and self._producer.try_copy_range(slab, fd)
