"""The units of work that schedules hand to executors: reads, copies, rectangles of codes, and jobs; pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from automodel_conv.dtypes import itemsize
from automodel_conv.planning.boxes import Box
from automodel_conv.planning.copies import Decode, StridedCopy

GAP_BYTES = 64 << 10
"""Largest gap between wanted bytes that one call reads across; the bytes of the gap are thrown away."""

ALIGN_BYTES = 64
"""Alignment of tensors in scratch; it suits every safetensors dtype and the vectors of any CPU."""


def align_up(nbytes: int) -> int:
    """Round up to a multiple of ``ALIGN_BYTES``."""
    return -(-nbytes // ALIGN_BYTES) * ALIGN_BYTES


def align_down(nbytes: int) -> int:
    """Round down to a multiple of ``ALIGN_BYTES``."""
    return nbytes // ALIGN_BYTES * ALIGN_BYTES


class Read(NamedTuple):
    """A range of bytes of a file, and the place in memory that it is read to."""

    file: int
    """Number of the file, or of the tensor if the source is in memory."""
    offset_bytes: int
    """Offset of the first byte in the file."""
    nbytes: int
    memory: int
    """Number of the memory to fill: a target, a window, or 0 for scratch, as the owner of the read documents."""
    start_bytes: int
    """Offset in that memory of the first byte that is filled."""


class Reads(NamedTuple):
    """Many reads in columns: one int64 array ``[n]`` for each field of ``Read``."""

    file: np.ndarray
    offset_bytes: np.ndarray
    nbytes: np.ndarray
    memory: np.ndarray
    start_bytes: np.ndarray

    @staticmethod
    def from_list(reads: Sequence[Read]) -> Reads:
        """Put reads into columns."""
        return Reads(*np.array(reads, np.int64).reshape(-1, 5).T)

    @property
    def total_bytes(self) -> int:
        return int(self.nbytes.sum())

    @property
    def files(self) -> set[int]:
        """Numbers of the files that are read; the reads must be in order."""
        if not len(self.file):
            return set()
        first, last = int(self.file[0]), int(self.file[-1])
        return {first} if first == last else set(self.file.tolist())

    @property
    def stop_bytes(self) -> np.ndarray:
        """Offset in the file just after the last byte of each read, int64 ``[n]``."""
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
        """Return the reads ordered by file and offset."""
        order = np.lexsort((self.offset_bytes, self.file))
        return self if np.array_equal(order, np.arange(len(order))) else self.take(order)

    def one_by_one(self) -> Iterator[Read]:
        """Iterate over the reads as ``Read`` tuples."""
        return map(Read._make, np.array(self).T.tolist())

    def calls(self) -> Iterator[Reads]:
        """Group reads of one file that are close enough for one call; the reads must be in order."""
        if len(self.file) < 2:
            return iter((self,) if len(self.file) else ())
        gaps = self.offset_bytes[1:] - self.stop_bytes[:-1]
        near = (self.file[1:] == self.file[:-1]) & (gaps >= 0) & (gaps <= GAP_BYTES)
        bounds = [0, *(np.flatnonzero(~near) + 1).tolist(), len(self.file)]
        return (self.take(slice(*bound)) for bound in pairwise(bounds))


def concatenate(parts: Iterable[Reads]) -> Reads:
    """Concatenate the columns of several ``Reads``."""
    columns = zip(*parts, strict=True)
    return Reads(*map(np.concatenate, columns))


class Move(NamedTuple):
    """One strided copy out of a source or scratch, of elements that no read can put in place; offsets in elements."""

    target: int
    """Number of the tensor that is written."""
    dtype: str
    """Dtype code of the source or of the scratch."""
    box: Box
    source_offset: int
    """Element of the source or of the scratch where the copy starts."""
    target_offset: int
    """Element of the target where the copy starts."""

    @property
    def group_key(self) -> tuple[int, str, Box]:
        """The fields that all moves of one ``Copies`` share."""
        return self.target, self.dtype, self.box

    def placed(self, whole: Move, first: int) -> Move:
        """Return this move of a slab with its real target, and with its source offset counted from the memory's start.

        Args:
            whole: the move of the source that this one is a part of.
            first: element of the memory where the slab starts.
        """
        return Move(
            whole.target, self.dtype, self.box, first + self.source_offset, whole.target_offset + self.target_offset
        )


class Copies(NamedTuple):
    """Moves of equal geometry from one memory to one tensor, with their offsets in columns, in elements."""

    target: int
    """Number of the tensor that is written."""
    dtype: str
    """Dtype code that the memory is viewed as."""
    box: Box
    source_offsets: list[int]
    """Element of the memory where each copy starts."""
    target_offsets: list[int]
    """Element of the target where each copy starts."""

    def as_strided_copy(self) -> StridedCopy:
        """Return the same copies for a target with the memory as its only source."""
        ordinals = (0,) * len(self.source_offsets)
        return StridedCopy(self.box, ordinals, tuple(self.source_offsets), tuple(self.target_offsets))


def group_moves(moves: Iterable[Move]) -> list[Copies]:
    """Group equal moves out of one memory into columns, in the order in which they write."""
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
    """A grid of stored scales or packed zero points in scratch, row-major."""

    start_bytes: int
    """Offset of the first element in the scratch."""
    dtype: str
    """Dtype code of the elements."""
    shape: tuple[int, int]
    """Rows and columns. Scales have one row for each row of blocks; see ``ZEROS_IN_I32`` for packed zero points."""


class CodeRectangle(NamedTuple):
    """A rectangle of codes in scratch, and the place in the same scratch that its values are decoded to."""

    decode: Decode
    dtype: str
    """Dtype code of the values."""
    shape: tuple[int, int]
    """Rows and columns of values."""
    start: tuple[int, int]
    """Row and column of the first value within its block."""
    codes_bytes: int
    """Offset of the first code in the scratch."""
    codes_stride: int
    """Bytes from one row of codes to the next."""
    values_bytes: int
    """Offset of the first value in the scratch, in bytes."""
    values_stride: int
    """Elements from one row of values to the next."""
    scales: Grid
    zero_points: Grid | None
    zero_row: int
    """Index, in the first packed row of ``zero_points``, of the zero point for row 0 of ``scales``: 0 to 7."""
    global_bytes: int | None
    """Offset of the global scale in the scratch, if the source has one. Its divisor, if there is one, follows it."""
    block_row: int
    """Row of ``scales`` for the first row of the rectangle."""
    block_column: int
    """Column of ``scales`` for the first column of the rectangle."""
    has_divisor: bool = False
    """Whether the global scale is divided by another value."""


class ReadInPlace(NamedTuple):
    """A job that reads bytes straight to their final place."""

    reads: Reads
    """In order of file and offset; the memories are the tensors that are written."""

    @property
    def total_bytes(self) -> int:
        """Bytes of all reads."""
        return self.reads.total_bytes

    @property
    def files(self) -> set[int]:
        """Numbers of the files that are read."""
        return self.reads.files

    @property
    def place(self) -> tuple[int, int]:
        """File and offset of the first read."""
        return int(self.reads.file[0]), int(self.reads.offset_bytes[0])

    @property
    def targets(self) -> set[int]:
        """Numbers of the tensors that the job writes."""
        return set(self.reads.memory.tolist())


class SlabRead(NamedTuple):
    """A range of bytes of a part of a source, and the place in the scratch of a slab that it is read to."""

    part: int
    """Index of the part: 0 for the source itself, then the parts of its ``Decode`` in their order."""
    offset_bytes: int
    """Offset of the first byte in the part."""
    nbytes: int
    start_bytes: int
    """Offset of the first byte that is filled, in the scratch of the slab."""


class SourceSlab(NamedTuple):
    """A range of the elements of a source, with everything that is read for it and copied from it through scratch.

    Any source of the same geometry can use it. The target of a move is the index of a move of the source, and its
    target offset is relative to that move. Source offsets of moves, and offsets in the scratch, are relative to the
    slab.
    """

    reads: tuple[SlabRead, ...]
    moves: tuple[Move, ...]
    nbytes: int
    """Bytes of scratch."""
    rectangles: tuple[CodeRectangle, ...] = ()
    """Codes to decode; empty if the source is not quantized. The rows of their ``Decode`` have no meaning."""


class SlabSource(NamedTuple):
    """A source of which a job reads slabs."""

    places: tuple[tuple[int, int], ...]
    """File and offset in bytes of each of its parts."""
    moves: Sequence[Move]
    """The copies out of it."""
    decode: Decode | None = None
    """How its codes are decoded; None if it is not quantized."""


class PlacedSlab(NamedTuple):
    """A slab of one source, and its place in the scratch of a job."""

    slab: SourceSlab
    source: SlabSource
    start_bytes: int = 0
    """Offset of the slab in the scratch."""


class ReadAndCopy(NamedTuple):
    """A job that reads bytes into the scratch of a thread, decodes codes there, and copies to the targets.

    Slabs are shared by all sources of one geometry, so that a job is small and quick to create. Its reads and copies
    are computed when they are needed, each time that a property is read.
    """

    slabs: tuple[PlacedSlab, ...]
    """In the order of their file. A slab with rectangles is the only one."""

    def listed_reads(self) -> list[Read]:
        """Return the reads in order of file and offset; the scratch is the only memory."""
        reads = []
        for slab, source, start in self.slabs:
            for part, offset_bytes, nbytes, start_bytes in slab.reads:
                file, base = source.places[part]
                reads.append(Read(file, base + offset_bytes, nbytes, 0, start + start_bytes))
        return sorted(reads)

    @property
    def reads(self) -> Reads:
        """In order of file and offset; the scratch is the only memory."""
        return Reads.from_list(self.listed_reads())

    @property
    def total_bytes(self) -> int:
        """Bytes of all reads."""
        return sum([read.nbytes for placed in self.slabs for read in placed.slab.reads])

    @property
    def scratch_bytes(self) -> int:
        """Bytes of scratch that the job uses."""
        return max([placed.start_bytes + placed.slab.nbytes for placed in self.slabs])

    @property
    def copies(self) -> list[Copies]:
        """Copies from the scratch to the targets, after decoding."""
        return group_moves(
            move.placed(source.moves[move.target], start // itemsize(move.dtype))
            for slab, source, start in self.slabs
            for move in slab.moves
        )

    @property
    def rectangles(self) -> list[CodeRectangle]:
        """Codes to decode; empty if no source is quantized."""
        return [
            rectangle._replace(decode=placed.source.decode)
            for placed in self.slabs
            for rectangle in placed.slab.rectangles
        ]

    @property
    def files(self) -> set[int]:
        """Numbers of the files that are read."""
        return {placed.source.places[read.part][0] for placed in self.slabs for read in placed.slab.reads}

    @property
    def place(self) -> tuple[int, int]:
        """File and offset of the first read."""
        slab, source, _ = self.slabs[0]
        return min(
            [(file, base + read.offset_bytes) for read in slab.reads for file, base in [source.places[read.part]]]
        )

    @property
    def targets(self) -> set[int]:
        """Numbers of the tensors that the job writes."""
        return {source.moves[move.target].target for slab, source, _ in self.slabs for move in slab.moves}


Job = ReadInPlace | ReadAndCopy
