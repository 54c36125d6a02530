"""What executors do, as integers: bytes to read, codes to decode, elements to copy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from automodel_conv.planning.copies import Decode

GAP_BYTES = 64 << 10
"""Wanted bytes closer than this are read in one call, and what lies between them is thrown away."""

ALIGN_BYTES = 64
"""Tensors of every safetensors dtype may start at multiples of this in scratch, and so may the vectors of any CPU."""

SCRATCH = -1
"""Stands for the thread's scratch where a number of a target stands otherwise."""


def aligned(nbytes: int) -> int:
    """Rounded up to whole alignments."""
    return -(-nbytes // ALIGN_BYTES) * ALIGN_BYTES


def aligned_down(nbytes: int) -> int:
    return nbytes // ALIGN_BYTES * ALIGN_BYTES


class Part(NamedTuple):
    """Bytes of a file and where they go: into the buffer of a target, or into ``SCRATCH``."""

    file: int
    offset_bytes: int
    nbytes: int
    target: int
    start_bytes: int
    row: int


class Move(NamedTuple):
    """A copy out of a source, or in a job out of the scratch; strides and offsets in elements."""

    target: int
    dtype: str
    shape: tuple[int, ...]
    source_strides: tuple[int, ...]
    source_offset: int
    target_strides: tuple[int, ...]
    target_offset: int


class Grid(NamedTuple):
    """Stored numbers, one for each block of some rows of blocks, in the scratch."""

    start_bytes: int
    dtype: str
    shape: tuple[int, int]


class Decoding(NamedTuple):
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


class Job(NamedTuple):
    """Reads, ordered by file and offset, then codes in the scratch that become numbers there, and copies out of it."""

    parts: list[Part]
    moves: list[Move]
    scratch_bytes: int
    decodings: Sequence[Decoding] = ()

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    @property
    def files(self) -> set[int]:
        return {part.file for part in self.parts}

    @property
    def targets(self) -> set[int]:
        return {part.target for part in self.parts if part.target != SCRATCH} | {move.target for move in self.moves}
