"""What executors do, as integers: bytes to read, codes to decode, elements to copy; pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from automodel_conv.planning.boxes import Box
from automodel_conv.planning.copies import Decode, StridedCopy

GAP_BYTES = 64 << 10
"""Wanted bytes closer than this are read in one call, and what lies between them is thrown away."""

ALIGN_BYTES = 64
"""Tensors of every safetensors dtype may start at multiples of this in scratch, and so may the vectors of any CPU."""


def align_up(nbytes: int) -> int:
    """Rounded up to whole alignments."""
    return -(-nbytes // ALIGN_BYTES) * ALIGN_BYTES


def align_down(nbytes: int) -> int:
    """Rounded down to whole alignments."""
    return nbytes // ALIGN_BYTES * ALIGN_BYTES


class Read(NamedTuple):
    """Bytes of a file, and where they go."""

    file: int
    offset_bytes: int
    nbytes: int
    memory: int
    """Which of several memories; whoever holds the read says of what."""
    start_bytes: int
    """From the first byte of that memory."""


class Reads(NamedTuple):
    """Many reads, column by column: int64 arrays ``[n]``; see ``Read``."""

    file: np.ndarray
    offset_bytes: np.ndarray
    nbytes: np.ndarray
    memory: np.ndarray
    start_bytes: np.ndarray

    @staticmethod
    def from_list(reads: Sequence[Read]) -> Reads:
        """Reads that are given one by one."""
        return Reads(*np.array(reads, np.int64).reshape(-1, 5).T)

    @property
    def total_bytes(self) -> int:
        return int(self.nbytes.sum())

    @property
    def files(self) -> set[int]:
        """The files that are read; the reads must be in order."""
        if not len(self.file):
            return set()
        first, last = int(self.file[0]), int(self.file[-1])
        return {first} if first == last else set(self.file.tolist())

    @property
    def stop_bytes(self) -> np.ndarray:
        """For each read, the offset in the file just after its last byte."""
        return self.offset_bytes + self.nbytes

    def take(self, which: slice | np.ndarray) -> Reads:
        """Select reads by a numpy index."""
        return Reads(
            self.file[which],
            self.offset_bytes[which],
            self.nbytes[which],
            self.memory[which],
            self.start_bytes[which],
        )

    def in_order(self) -> Reads:
        """Ordered by file and offset."""
        order = np.lexsort((self.offset_bytes, self.file))
        return self if np.array_equal(order, np.arange(len(order))) else self.take(order)

    def one_by_one(self) -> Iterator[Read]:
        return map(Read._make, np.array(self).T.tolist())

    def calls(self) -> Iterator[Reads]:
        """Groups of reads that lie near enough in one file for one call; the reads must be in order."""
        if len(self.file) < 2:
            return iter((self,) if len(self.file) else ())
        gaps = self.offset_bytes[1:] - self.stop_bytes[:-1]
        near = (self.file[1:] == self.file[:-1]) & (gaps >= 0) & (gaps <= GAP_BYTES)
        bounds = [0, *(np.flatnonzero(~near) + 1).tolist(), len(self.file)]
        return (self.take(slice(*bound)) for bound in pairwise(bounds))


def concatenate(several: Iterable[Reads]) -> Reads:
    """Concatenate reads."""
    columns = zip(*several, strict=True)
    return Reads(*map(np.concatenate, columns))


class Move(NamedTuple):
    """One copy out of a source or a scratch; offsets in elements."""

    target: int
    """Which of the tensors that are written."""
    dtype: str
    """That the source, or the scratch, has."""
    box: Box
    source_offset: int
    target_offset: int

    @property
    def group_key(self) -> tuple[int, str, Box]:
        """What moves that are columns of one ``Copies`` have in common."""
        return self.target, self.dtype, self.box


class Copies(NamedTuple):
    """Equal copies out of one memory to one tensor, column by column; offsets in elements."""

    target: int
    """Which of the tensors that are written."""
    dtype: str
    """That the memory is seen as."""
    box: Box
    source_offsets: list[int]
    target_offsets: list[int]

    def as_strided_copy(self) -> StridedCopy:
        """The same copies, for a target whose only source is the memory."""
        ordinals = (0,) * len(self.source_offsets)
        return StridedCopy(self.box, ordinals, tuple(self.source_offsets), tuple(self.target_offsets))


def group_moves(moves: Iterable[Move]) -> list[Copies]:
    """Group equal moves out of one memory as columns, ordered by where they write."""
    groups: dict[tuple[int, str, Box], Copies] = {}
    by_place = sorted(moves, key=lambda move: (move.target, move.target_offset))
    for target, dtype, box, source_offset, target_offset in by_place:
        key = target, dtype, box
        copies = groups.get(key)
        if copies is None:
            copies = groups[key] = Copies(target, dtype, box, [], [])
        copies.source_offsets.append(source_offset)
        copies.target_offsets.append(target_offset)
    return list(groups.values())


class Grid(NamedTuple):
    """Stored numbers, one for each block of some rows of blocks, in the scratch."""

    start_bytes: int
    dtype: str
    shape: tuple[int, int]


class CodeRectangle(NamedTuple):
    """A rectangle of codes in the scratch that becomes numbers in the scratch."""

    decode: Decode
    dtype: str
    """Of the numbers."""
    shape: tuple[int, int]
    start: tuple[int, int]
    """Its first row and column within its first block."""
    codes_bytes: int
    codes_stride: int
    """Bytes from row to row."""
    numbers_bytes: int
    numbers_stride: int
    """Elements from row to row."""
    scales: Grid
    zero_points: Grid | None
    """Packed; the first row holds that of the block row ``zero_row`` below its first."""
    zero_row: int
    global_bytes: int | None
    block_row: int
    """Of the rectangle's first row, counted in the grids."""
    block_column: int


class ReadInPlace(NamedTuple):
    """A job: bytes that are read straight to where they belong."""

    reads: Reads
    """In order; their memories are the tensors that are written."""

    @property
    def targets(self) -> set[int]:
        return set(self.reads.memory.tolist())


class ReadAndCopy(NamedTuple):
    """A job: bytes that are read into a thread's scratch, decoded there if they are codes, and copied out of it."""

    reads: Reads
    """In order; the scratch is their only memory."""
    scratch_bytes: int
    copies: Sequence[Copies]
    rectangles: Sequence[CodeRectangle] = ()

    @property
    def targets(self) -> set[int]:
        return {copies.target for copies in self.copies}


Job = ReadInPlace | ReadAndCopy
