"""Cut a quantized source into slabs that fit into windows: bytes to read and rectangles to decode; pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import ceil
from typing import NamedTuple

from automodel_conv.dtypes import itemsize
from automodel_conv.errors import ConversionError, message
from automodel_conv.planning.copies import ZEROS_IN_I32
from automodel_conv.schedule.code_rectangles import SourceRectangle, rectangles_of
from automodel_conv.schedule.coded_source import CodedSource
from automodel_conv.schedule.cutting import ranges, slabs
from automodel_conv.schedule.jobs import ALIGN_BYTES, GAP_BYTES, Move, align_up

BYTE_SCALES = 256
"""A scale of one byte has one of so many values."""
GLOBAL_BYTES = 4
ZERO_POINT_BYTES = 4
TABLE_ROW_BYTES = 4


class ScaleKind(NamedTuple):
    """A kind of scales: those of one kind share a table."""

    format: str
    """The format of the codes, one of ``CODE_BITS``."""
    bits: int
    """Bits of a code."""
    scales: str
    """The dtype code of the scales as stored."""
    numbers: str
    """The dtype code of what the codes become."""
    divides: bool
    like_upstream: bool
    has_global: bool
    zero_points: tuple[int, int] | None
    """Packed rows of a source, and which of the eight in the first one its first scale has."""
    grid: tuple[int, int] | None
    """Rows and columns of a source's scales, where each source has a global scale or zero points."""

    @property
    def scale_is_table_row(self) -> bool:
        """Whether a scale itself is the row of the table: one of 256 values, and nothing else decides."""
        return itemsize(self.scales) == 1 and self.zero_points is None

    @property
    def is_shared(self) -> bool:
        """Whether all such scales take one table, whatever their values."""
        return self.scale_is_table_row and not self.has_global

    @property
    def has_table_for_each_source(self) -> bool:
        """Whether each source has a table of its own, with a row for each of the 256 values of a scale."""
        return self.scale_is_table_row and self.has_global

    @property
    def row_bytes(self) -> int:
        """Bytes of a row of the table: a number for each code."""
        return itemsize(self.numbers) << self.bits


class Rectangle(NamedTuple):
    """A geometry of codes that one call of ``dequantize`` decodes, at any places."""

    kind: ScaleKind
    shape: tuple[int, int]
    """Rows and columns of numbers."""
    codes_stride: int
    """Bytes from row to row."""
    target_strides: tuple[int, int]
    """Elements from row to row and from column to column."""
    block: tuple[int, int]
    start: tuple[int, int]
    """The first row and column within their first block."""
    across: int
    """Scales from one row of blocks to the next."""
    in_window: bool
    """Whether its numbers stay in the window, for copies to take them from there; else they are in a target."""


class Position(NamedTuple):
    """The place of a rectangle of codes, and of what it takes."""

    target: int
    """Which of the tensors that are written; 0 for a rectangle in the window."""
    target_offset: int
    """Of its numbers, in elements: in the target, or in the window."""
    codes_bytes: int
    """From the start of the window."""
    scale: int
    """The scale of the first block, counted from the first of the group."""
    source: int
    """Counted within the group."""


class Slab(NamedTuple):
    """A range of the elements of any source of one geometry, and their fate.

    Targets are numbers of the copies that take them, offsets in targets count from where those begin.
    """

    codes: tuple[tuple[int, int], ...]
    """The bytes of the source that are read, from and to."""
    first_byte: int
    """The byte of the source's codes that has the slab's first place in a window."""
    codes_bytes: int
    block_rows: tuple[int, int]
    """The rows of blocks that it reaches into."""
    scales: int
    kind: ScaleKind
    rectangles: tuple[tuple[Rectangle, Position], ...]
    """Places of codes and scales count from the slab's own."""
    moves: tuple[Move, ...]
    """Copies of its numbers, where codes cannot be decoded straight into the targets; offsets count from the first."""
    numbers_bytes: int
    nbytes: int
    """All that it takes of a window, beside the alignment of a new kind of scales."""


def slabs_of(source: CodedSource, moves: Sequence[Move], limit: int, in_place: bool = True) -> Iterator[Slab]:
    """A source in as few slabs as fit into windows."""
    in_place = in_place and all(rectangles_of(move, source) is not None for move in moves)
    for start, stop, cut in slabs(moves, _capacity(source, limit, in_place)):
        regions = [rectangles_of(move, source) for move in cut] if in_place else []
        if None in regions:  # a cut between two halves of a byte
            yield from slabs_of(source, cut, limit, in_place=False)
            continue
        if source.decode.bits == 4:  # whole bytes
            start, stop = start - start % 2, stop + stop % 2
        if in_place:
            yield _slab(source, start, stop, cut, [region for some in regions for region in some or ()], ())
        else:
            whole = [
                SourceRectangle(element, (r1 - r0, c1 - c0), 1, (source.columns, 1), 0, element - start)
                for element, r0, r1, c0, c1 in source.rectangles(start, stop, (0, source.columns))
            ]
            copies = tuple(move._replace(source_offset=move.source_offset - start) for move in cut)
            yield _slab(source, start, stop, cut, whole, copies)


def _slab(
    source: CodedSource,
    start: int,
    stop: int,
    cut: Sequence[Move],
    regions: Sequence[SourceRectangle],
    moves: tuple[Move, ...],
) -> Slab:
    bits, size = source.decode.bits, itemsize(source.dtype)
    block_rows = source.block_row(start), source.block_row(stop - 1) + 1
    kind, scales = _kind(source, block_rows), (block_rows[1] - block_rows[0]) * source.across
    codes = [(first * bits // 8, -(-last * bits // 8)) for first, last in ranges(cut, GAP_BYTES * 8 // bits)]
    codes_bytes = align_up((stop - start) * bits // 8)
    numbers_bytes = align_up((stop - start) * size) if moves else 0
    nbytes = codes_bytes + numbers_bytes + scales * itemsize(kind.scales)
    if not kind.scale_is_table_row:
        nbytes += scales * (kind.row_bytes + TABLE_ROW_BYTES)
    elif kind.has_table_for_each_source:
        nbytes += BYTE_SCALES * kind.row_bytes
    nbytes += GLOBAL_BYTES if kind.has_global else 0
    nbytes += ZERO_POINT_BYTES * kind.zero_points[0] * source.across if kind.zero_points else 0
    rectangles = tuple(_rectangle(region, source, start, block_rows[0], kind, bool(moves)) for region in regions)
    first_byte = start * bits // 8
    return Slab(
        tuple(codes), first_byte, codes_bytes, block_rows, scales, kind, rectangles, moves, numbers_bytes, nbytes
    )


def _rectangle(
    region: SourceRectangle, source: CodedSource, start: int, first_block_row: int, kind: ScaleKind, in_window: bool
) -> tuple[Rectangle, Position]:
    bits, (block_rows, block_columns), step = source.decode.bits, source.decode.block, region.row_step
    row, column = divmod(region.element, source.columns)
    start_row, across = row % source.height % block_rows, source.across
    if block_rows % step == 0:  # rows of the rectangle, not of the source
        start_row, block_rows = start_row // step, block_rows // step
    elif step % block_rows == 0:
        start_row, block_rows, across = 0, 1, across * (step // block_rows)
    rectangle = Rectangle(
        kind,
        region.shape,
        step * source.columns * bits // 8,
        region.target_strides,
        (block_rows, block_columns),
        (start_row, column % block_columns),
        across,
        in_window,
    )
    scale = (source.block_row(region.element) - first_block_row) * source.across + column // block_columns
    codes_bytes = (region.element - start) * bits // 8
    return rectangle, Position(region.target, region.target_offset, codes_bytes, scale, 0)


def _capacity(source: CodedSource, limit: int, in_place: bool) -> int:
    """Elements of a source that fit into a window with all that they take, in whole rows of blocks where possible.

    Raises:
        ConversionError: not even a few do.
    """
    decode, kind = source.decode, _kind(source, (0, 1))
    a_scale = itemsize(kind.scales) + (
        TABLE_ROW_BYTES if decode.zero_points is None else TABLE_ROW_BYTES + ZERO_POINT_BYTES
    )
    fixed = 8 * ALIGN_BYTES
    if not kind.scale_is_table_row:
        a_scale += kind.row_bytes
    elif kind.has_table_for_each_source:
        fixed += BYTE_SCALES * kind.row_bytes
    block_rows = decode.block[0]
    fixed += (2 if decode.zero_points is None else 2 * ZEROS_IN_I32) * source.across * a_scale
    each = decode.bits / 8 + a_scale * source.scales_per_element
    each += 0 if in_place else itemsize(source.dtype)
    found = int((limit - fixed) / each)
    least = min(ALIGN_BYTES, source.numel)
    if found < least:
        name = source.checkpoint.names[source.row]
        expected = f"device_scratch_bytes of at least {2 * align_up(ceil(fixed + least * each))}"
        raise ConversionError(message(f"the scratch is too small to decode {name}", expected=expected, found=2 * limit))
    if found >= source.numel:
        return found
    for unit in (source.columns * block_rows, source.columns, ALIGN_BYTES):
        if found >= unit:
            return found - found % unit
    return found


def _kind(source: CodedSource, block_rows: tuple[int, int]) -> ScaleKind:
    decode, dtypes = source.decode, source.checkpoint.dtypes
    first, last = block_rows
    packed = (
        None if decode.zero_points is None else (-(-last // ZEROS_IN_I32) - first // ZEROS_IN_I32, first % ZEROS_IN_I32)
    )
    has_global = decode.global_scale is not None
    grid = (last - first, source.across) if packed or has_global else None
    flags = decode.divides, decode.like_upstream, has_global
    return ScaleKind(decode.format, decode.bits, dtypes[decode.scales], source.dtype, *flags, packed, grid)
