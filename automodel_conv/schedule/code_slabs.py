"""Cut a quantized source into slabs that fit into windows of device memory; pure.

A slab lists the bytes to read, the scales that they need, the rectangles of codes to decode, and the copies out of the
window that follow. All offsets in a slab are relative to it, so that sources of equal geometry can share slabs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import ceil
from typing import NamedTuple

from automodel_conv.dtypes import itemsize
from automodel_conv.errors import ConversionError, message
from automodel_conv.planning.copies import ZEROS_IN_I32, ZeroPacking
from automodel_conv.schedule.code_rectangles import SourceRectangle, find_rectangles
from automodel_conv.schedule.coded_source import GLOBAL_BYTES, CodedSource
from automodel_conv.schedule.cutting import read_ranges, slabs
from automodel_conv.schedule.jobs import ALIGN_BYTES, GAP_BYTES, Move, align_up

BYTE_SCALES = 256
"""Number of different scales of one byte, so also of table rows for them."""
ZERO_POINT_BYTES = 4
"""Bytes of an element of packed zero points, I32."""
TABLE_ROW_BYTES = 4
"""Bytes of a table row number, I32."""


class ScaleKind(NamedTuple):
    """The properties that scales must share to be in one group of a window, with one lookup table."""

    format: str
    """Format of the codes, one of ``CODE_BITS``."""
    bits: int
    """Bits per code."""
    scale_dtype: str
    """Dtype code of the scales as stored."""
    value_dtype: str
    """Dtype code of the values."""
    divides: bool
    """Whether a scale is divided by the global scale, not multiplied."""
    like_upstream: bool
    """Whether values are rounded as transformers rounds them, not once."""
    has_global: bool
    """Whether there are global scales."""
    has_divisor: bool
    """Whether each global scale is divided by another value."""
    zero_points: tuple[int, int] | None
    """Number of rows of packed zero points, and number of rows of the grid to skip in them, ``ZeroPacking.skipped``.

    Both are those of one source. None if there are no zero points.
    """
    zero_packing: ZeroPacking
    """How zero points are stored."""
    scale_word: tuple[int, ...]
    """Order of the scales, see ``Decode``."""
    grid: tuple[int, int] | None
    """Rows and columns of the scales of a source, if each source has a global scale or zero points; else None."""

    @property
    def scale_is_table_row(self) -> bool:
        """True if the byte of a scale is its table row: it has 256 values, is in place, and has no zero point."""
        return itemsize(self.scale_dtype) == 1 and self.zero_points is None and not self.scale_word

    @property
    def is_shared(self) -> bool:
        """True if one table fits all scales of this kind, in every window, whatever their values."""
        return self.scale_is_table_row and not self.has_global

    @property
    def has_table_for_each_source(self) -> bool:
        """True if each source has a table of its own, with a row for each of the 256 values of a scale."""
        return self.scale_is_table_row and self.has_global

    @property
    def row_bytes(self) -> int:
        """Bytes of a table row, which has a value for each code."""
        return itemsize(self.value_dtype) << self.bits


class Rectangle(NamedTuple):
    """The geometry of a rectangle of codes; one call of ``dequantize`` decodes all rectangles that share it."""

    kind: ScaleKind
    shape: tuple[int, int]
    """Rows and columns of values."""
    codes_stride: int
    """Bytes from one row of codes to the next."""
    target_strides: tuple[int, int]
    """Elements of the target from row to row and from column to column."""
    block: tuple[int, int]
    """Rows and columns of the rectangle that share a scale."""
    start: tuple[int, int]
    """Row and column of the first value within its block."""
    scales_stride: int
    """Scales from one row of blocks to the next."""
    in_window: bool
    """Whether the values go to the window, from where copies move them to the targets; else to a target directly."""


class Position(NamedTuple):
    """The places of one rectangle: its codes and scales in the window, and its values in the window or a target."""

    target: int
    """Number of the tensor that is written; 0 for a rectangle in the window."""
    target_offset: int
    """Element of the target, or of the window, where the first value goes."""
    codes_bytes: int
    """Offset of the first code in the window."""
    scale: int
    """Index of the scale of the first block, among the scales of the ``ScaleGroup``."""
    source: int
    """Index of the source, among the sources of the ``ScaleGroup``."""


class CodeSlab(NamedTuple):
    """A range of the elements of a source, with everything that is read for it and written from it.

    Any source of the same geometry can use it. The target of a rectangle or a move is the index of a move that was
    passed to ``cut_into_slabs``, and its target offset is relative to the start of that move.
    """

    codes: tuple[tuple[int, int], ...]
    """Ranges of bytes of the source that are read: first byte and the byte after the last."""
    first_byte: int
    """Byte of the source that is placed at the start of the slab's codes."""
    codes_bytes: int
    """Bytes of the window for codes."""
    block_rows: tuple[int, int]
    """Rows of blocks that the slab reaches into: the first, and the one after the last."""
    scale_count: int
    """Number of scales in these rows of blocks."""
    global_bytes: int
    """Offset of the slab's global scale among those of the source."""
    kind: ScaleKind
    rectangles: tuple[tuple[Rectangle, Position], ...]
    """Codes to decode; offsets of codes, scales and values count from those of the slab."""
    moves: tuple[Move, ...]
    """Copies of decoded values out of the window; empty if codes are decoded straight into the targets.

    Source offsets are relative to the slab's first value.
    """
    values_bytes: int
    """Bytes of the window for decoded values."""
    nbytes: int
    """Bytes of the window for the whole slab, without the alignment that a new kind of scales adds."""


def cut_into_slabs(source: CodedSource, moves: Sequence[Move], limit: int, in_place: bool = True) -> Iterator[CodeSlab]:
    """Cut a source into as few slabs as fit into windows of ``limit`` bytes.

    Args:
        source: the quantized source.
        moves: the copies out of it.
        limit: bytes of a window.
        in_place: decode straight into the targets if the strides of all moves allow it; else decode whole rows into the
            window, and copy from there.

    Raises:
        ConversionError: ``limit`` is too small for this source.
    """
    for _, _, in_section in slabs(moves, source.section, source.section):
        yield from _cut_section(source, in_section, limit, in_place)


def _cut_section(source: CodedSource, moves: Sequence[Move], limit: int, in_place: bool) -> Iterator[CodeSlab]:
    """Cut one section of a source into slabs; the arguments are those of ``cut_into_slabs``."""
    in_place = in_place and all(find_rectangles(move, source) is not None for move in moves)
    for start, stop, parts in slabs(moves, _capacity(source, limit, in_place)):
        per_move = [find_rectangles(move, source) for move in parts] if in_place else []
        if None in per_move:  # the cut is between the two codes of a byte
            yield from _cut_section(source, parts, limit, in_place=False)
            continue
        if source.decode.bits == 4:  # widen to whole bytes
            start, stop = start - start % 2, stop + stop % 2
        if in_place:
            in_parts = [rectangle for rectangles in per_move for rectangle in rectangles or ()]
            yield _slab(source, start, stop, parts, in_parts, ())
        else:
            whole_rows = [
                SourceRectangle(element, (r1 - r0, c1 - c0), 1, (source.columns, 1), 0, element - start)
                for element, r0, r1, c0, c1 in source.rectangles(start, stop, (0, source.columns))
            ]
            copies = tuple(move._replace(source_offset=move.source_offset - start) for move in parts)
            yield _slab(source, start, stop, parts, whole_rows, copies)


def _slab(
    source: CodedSource,
    start: int,
    stop: int,
    parts: Sequence[Move],
    source_rectangles: Sequence[SourceRectangle],
    moves: tuple[Move, ...],
) -> CodeSlab:
    """Return the slab of elements ``start`` to ``stop``, with the parts of moves that read it.

    Args:
        source_rectangles: the rectangles to decode.
        moves: the copies out of the window; empty if the rectangles are decoded straight into the targets.
    """
    bits, size = source.decode.bits, itemsize(source.dtype)
    block_rows = source.block_row(start), source.block_row(stop - 1) + 1
    kind, scale_count = _kind(source, block_rows), (block_rows[1] - block_rows[0]) * source.grid_columns
    codes = [(first * bits // 8, -(-last * bits // 8)) for first, last in read_ranges(parts, GAP_BYTES * 8 // bits)]
    codes_bytes = align_up((stop - start) * bits // 8)
    values_bytes = align_up((stop - start) * size) if moves else 0
    nbytes = codes_bytes + values_bytes + scale_count * itemsize(kind.scale_dtype)
    if not kind.scale_is_table_row:
        nbytes += scale_count * (kind.row_bytes + TABLE_ROW_BYTES)
    elif kind.has_table_for_each_source:
        nbytes += BYTE_SCALES * kind.row_bytes
    nbytes += GLOBAL_BYTES * (kind.has_global + kind.has_divisor)
    nbytes += ZERO_POINT_BYTES * kind.zero_points[0] * source.zero_columns if kind.zero_points else 0
    rectangles = tuple(_rectangle(r, source, start, block_rows[0], kind, bool(moves)) for r in source_rectangles)
    return CodeSlab(
        codes=tuple(codes),
        first_byte=start * bits // 8,
        codes_bytes=codes_bytes,
        block_rows=block_rows,
        scale_count=scale_count,
        global_bytes=source.global_bytes(start),
        kind=kind,
        rectangles=rectangles,
        moves=moves,
        values_bytes=values_bytes,
        nbytes=nbytes,
    )


def _rectangle(
    rect: SourceRectangle, source: CodedSource, start: int, first_block_row: int, kind: ScaleKind, in_window: bool
) -> tuple[Rectangle, Position]:
    """Return the geometry of a rectangle, and its place in the slab that starts at element ``start``."""
    bits, (block_rows, block_columns), step = source.decode.bits, source.decode.block, rect.row_step
    row, column = divmod(rect.element, source.columns)
    start_row, scales_stride = row % source.matrix_rows % block_rows, source.grid_columns
    if block_rows % step == 0:  # count rows of the rectangle, not rows of the source
        start_row, block_rows = start_row // step, block_rows // step
    elif step % block_rows == 0:
        start_row, block_rows, scales_stride = 0, 1, scales_stride * (step // block_rows)
    rectangle = Rectangle(
        kind=kind,
        shape=rect.shape,
        codes_stride=step * source.columns * bits // 8,
        target_strides=rect.target_strides,
        block=(block_rows, block_columns),
        start=(start_row, column % block_columns),
        scales_stride=scales_stride,
        in_window=in_window,
    )
    scale = (source.block_row(rect.element) - first_block_row) * source.grid_columns + column // block_columns
    codes_bytes = (rect.element - start) * bits // 8
    return rectangle, Position(rect.target, rect.target_offset, codes_bytes, scale, 0)


def _capacity(source: CodedSource, limit: int, in_place: bool) -> int:
    """Return how many elements of a source fit into a window with their scales, tables and values.

    They are whole rows of blocks if possible.

    Raises:
        ConversionError: fewer than ``ALIGN_BYTES`` elements fit, and not the whole source.
    """
    decode, kind = source.decode, _kind(source, (0, 1))
    scale_bytes = itemsize(kind.scale_dtype) + (
        TABLE_ROW_BYTES if decode.zero_points is None else TABLE_ROW_BYTES + ZERO_POINT_BYTES
    )
    fixed_bytes = 8 * ALIGN_BYTES
    if not kind.scale_is_table_row:
        scale_bytes += kind.row_bytes
    elif kind.has_table_for_each_source:
        fixed_bytes += BYTE_SCALES * kind.row_bytes
    block_rows = decode.block[0]
    rows_per_read = 1 if decode.zero_points is None or decode.zero_packing.by_columns else ZEROS_IN_I32
    fixed_bytes += 2 * rows_per_read * source.grid_columns * scale_bytes
    element_bytes = decode.bits / 8 + scale_bytes * source.scales_per_element
    element_bytes += 0 if in_place else itemsize(source.dtype)
    capacity = int((limit - fixed_bytes) / element_bytes)
    least = min(ALIGN_BYTES, source.section)
    if capacity < least:
        name = source.checkpoint.names[source.row]
        expected = f"device_scratch_bytes of at least {2 * align_up(ceil(fixed_bytes + least * element_bytes))}"
        raise ConversionError(message(f"the scratch is too small to decode {name}", expected=expected, found=2 * limit))
    if capacity >= source.section:
        return capacity
    for unit in (source.columns * block_rows, source.columns, ALIGN_BYTES):
        if capacity >= unit:
            return capacity - capacity % unit
    return capacity


def _kind(source: CodedSource, block_rows: tuple[int, int]) -> ScaleKind:
    """Return the kind of the scales in a range of rows of blocks."""
    decode, dtypes = source.decode, source.checkpoint.dtypes
    first, last = block_rows
    zero_points = None
    if decode.zero_points is not None:
        packed_first, packed_last = decode.zero_packing.rows(first, last)
        zero_points = packed_last - packed_first, decode.zero_packing.skipped(first)
    has_global = decode.global_scale is not None
    return ScaleKind(
        format=decode.format,
        bits=decode.bits,
        scale_dtype=dtypes[decode.scales],
        value_dtype=source.dtype,
        divides=decode.divides,
        like_upstream=decode.like_upstream,
        has_global=has_global,
        has_divisor=decode.global_divisor is not None,
        zero_points=zero_points,
        zero_packing=decode.zero_packing,
        scale_word=decode.scale_word,
        grid=(last - first, source.grid_columns) if zero_points or has_global else None,
    )
