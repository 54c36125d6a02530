"""From copies out of quantized sources to windows of device memory, each with many sources and all their scales.

Pure: integers in, integers out. A window holds the codes of sources that follow each other in the files, then their
scales, gathered so that one table is made for all scales of a kind. Rectangles of codes are decoded straight into the
targets. Where strides do not allow that, whole rows are decoded into the window, and copies take them from there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from automodel_conv.dtypes import itemsize
from automodel_conv.errors import ConversionError, message
from automodel_conv.execution.code_rectangles import SourceRectangle, rectangles_of
from automodel_conv.execution.coded_source import PACKED, CodedSource
from automodel_conv.execution.cutting import ranges, slabs
from automodel_conv.execution.jobs import ALIGN_BYTES, GAP_BYTES, SCRATCH, Move, Part, aligned
from automodel_conv.files.checkpoint import Checkpoint
from automodel_conv.planning.copies import Decode

BYTE_SCALES = 256
"""A scale of one byte has one of so many values."""
_GLOBAL_BYTES = 4
_ZERO_POINT_BYTES = 4
_CELL_BYTES = 4
# What a group of scales loses to the alignment of its pieces.
_GROUP_ALIGN_BYTES = 5 * ALIGN_BYTES


class ScaleKind(NamedTuple):
    """What scales have in common that share a table."""

    format: str
    """The format of the codes: "e4m3", "e5m2", "e2m1" or "int4"."""
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
    def has_byte_cells(self) -> bool:
        """Whether a scale itself is the row of the table: one of 256 values, and nothing else decides."""
        return itemsize(self.scales) == 1 and self.zero_points is None

    @property
    def is_shared(self) -> bool:
        """Whether all such scales take one table, whatever their values."""
        return self.has_byte_cells and not self.has_global

    @property
    def has_table_for_each_source(self) -> bool:
        """Whether each source has a table of its own, with a row for each of the 256 values of a scale."""
        return self.has_byte_cells and self.has_global

    @property
    def row_bytes(self) -> int:
        """Bytes of a row of the table: a number for each code."""
        return itemsize(self.numbers) << self.bits


class ScaleGroup(NamedTuple):
    """The scales of one kind in a window: those of one source after those of another; offsets count from its start."""

    kind: ScaleKind
    sources: int
    count: int
    scales_bytes: int
    zero_points_bytes: int
    globals_bytes: int
    cells_bytes: int
    """Where each scale's own number is made, I32, if that is its row of the table."""
    table_bytes: int

    @property
    def sources_apart(self) -> int:
        """The sources, where each has its own share of scales and rows; else all count as one."""
        return 1 if self.kind.grid is None else self.sources

    @property
    def table_rows(self) -> int:
        """Rows of the table that is made in the window."""
        if self.kind.is_shared:
            return 0
        return BYTE_SCALES * self.sources if self.kind.has_table_for_each_source else self.count


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


class Place(NamedTuple):
    """Where a rectangle is."""

    target: int
    """``SCRATCH``: the window."""
    target_offset: int
    """In elements."""
    codes_bytes: int
    """From the start of the window."""
    scale: int
    """The scale of the first block, counted from the first of the group."""
    source: int
    """Counted within the group."""


class CodeWindow(NamedTuple):
    """The contents of a window, and their fate."""

    parts: list[Part]
    """They are read from files; their target is the number of the window. One part may be several tensors that lie
    together."""
    groups: dict[ScaleKind, ScaleGroup]
    rectangles: dict[Rectangle, list[Place]]
    moves: list[Move]
    """Copies of numbers out of the window, once they are decoded."""
    nbytes: int


def code_windows(
    moves: Mapping[int, Sequence[Move]],
    checkpoint: Checkpoint,
    decodes: Mapping[int, Decode],
    limit: int,
    first: int,
) -> Iterator[CodeWindow]:
    """Windows of quantized sources, in the order of the files, each of at most ``limit`` bytes.

    Args:
        moves: by source row; their dtype is that of the target.
        first: the number of the first window, which its parts have for a target.

    Raises:
        ConversionError: ``limit`` does not hold two rows of blocks of scales and some elements of a source.
    """
    number = first
    window = _Window(number, limit)
    known: dict[tuple[object, ...], tuple[_Slab, ...]] = {}  # sources of one geometry are cut alike
    dtypes, nbytes = checkpoint.dtypes, checkpoint.nbytes
    for row in sorted(moves, key=lambda row: (checkpoint.file_ids[row], checkpoint.offsets[row])):
        decode = decodes[row]
        others = [None if part is None else dtypes[part] for part in decode[3:6]]
        for dtype in {move.dtype: None for move in moves[row]}:
            alike = [move for move in moves[row] if move.dtype == dtype]
            key = (dtype, nbytes[row], *decode[:3], *decode[6:], *others, *[move[2:6] for move in alike])
            if key not in known:
                source = CodedSource(row, decode, checkpoint, dtype)
                known[key] = tuple(_slabs(source, [Move(n, *m[1:6], 0) for n, m in enumerate(alike)], limit))
            for slab in known[key]:
                if not window.takes(slab):
                    yield window.close(checkpoint)
                    number += 1
                    window = _Window(number, limit)
                window.add(slab, row, decode, alike)
    if window.used:
        yield window.close(checkpoint)


class _Slab(NamedTuple):
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
    rectangles: tuple[tuple[Rectangle, Place], ...]
    """Places of codes and scales count from the slab's own."""
    moves: tuple[Move, ...]
    """Copies of its numbers, where codes cannot be decoded straight into the targets; offsets count from the first."""
    numbers_bytes: int
    nbytes: int
    """All that it takes of a window, beside the alignment of a new kind of scales."""


def _slabs(source: CodedSource, moves: Sequence[Move], limit: int, in_place: bool = True) -> Iterator[_Slab]:
    """A source in as few slabs as fit into windows."""
    in_place = in_place and all(rectangles_of(move, source) is not None for move in moves)
    for start, stop, cut in slabs(moves, _capacity(source, limit, in_place)):
        regions = [rectangles_of(move, source) for move in cut] if in_place else []
        if None in regions:  # a cut between two halves of a byte
            yield from _slabs(source, cut, limit, in_place=False)
            continue
        if source.decode.bits == 4:  # whole bytes
            start, stop = start - start % 2, stop + stop % 2
        if in_place:
            yield _slab(source, start, stop, cut, [region for some in regions for region in some or ()], ())
        else:
            whole = [
                SourceRectangle(element, (r1 - r0, c1 - c0), 1, (source.columns, 1), SCRATCH, element - start)
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
) -> _Slab:
    bits, size = source.decode.bits, itemsize(source.dtype)
    block_rows = source.block_row(start), source.block_row(stop - 1) + 1
    kind, scales = _kind(source, block_rows), (block_rows[1] - block_rows[0]) * source.across
    codes = [(first * bits // 8, -(-last * bits // 8)) for first, last in ranges(cut, GAP_BYTES * 8 // bits)]
    codes_bytes = aligned((stop - start) * bits // 8)
    numbers_bytes = aligned((stop - start) * size) if moves else 0
    nbytes = codes_bytes + numbers_bytes + scales * itemsize(kind.scales)
    if not kind.has_byte_cells:
        nbytes += scales * (kind.row_bytes + _CELL_BYTES)
    elif kind.has_table_for_each_source:
        nbytes += BYTE_SCALES * kind.row_bytes
    nbytes += _GLOBAL_BYTES if kind.has_global else 0
    nbytes += _ZERO_POINT_BYTES * kind.zero_points[0] * source.across if kind.zero_points else 0
    rectangles = tuple(_rectangle(region, source, start, block_rows[0], kind) for region in regions)
    first_byte = start * bits // 8
    return _Slab(
        tuple(codes), first_byte, codes_bytes, block_rows, scales, kind, rectangles, moves, numbers_bytes, nbytes
    )


def _rectangle(
    region: SourceRectangle, source: CodedSource, start: int, first_block_row: int, kind: ScaleKind
) -> tuple[Rectangle, Place]:
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
    )
    scale = (source.block_row(region.element) - first_block_row) * source.across + column // block_columns
    codes_bytes = (region.element - start) * bits // 8
    return rectangle, Place(region.target, region.target_offset, codes_bytes, scale, 0)


def _capacity(source: CodedSource, limit: int, in_place: bool) -> int:
    """Elements of a source that fit into a window with all that they take, in whole rows of blocks where possible.

    Raises:
        ConversionError: not even a few do.
    """
    decode, kind = source.decode, _kind(source, (0, 1))
    a_scale = itemsize(kind.scales) + (_CELL_BYTES if decode.zero_points is None else _CELL_BYTES + _ZERO_POINT_BYTES)
    fixed = 8 * ALIGN_BYTES
    if not kind.has_byte_cells:
        a_scale += kind.row_bytes
    elif kind.has_table_for_each_source:
        fixed += BYTE_SCALES * kind.row_bytes
    block_rows = decode.block[0]
    fixed += (2 if decode.zero_points is None else 2 * PACKED) * source.across * a_scale
    each = decode.bits / 8 + a_scale * source.scales_per_element
    each += 0 if in_place else itemsize(source.dtype)
    found = int((limit - fixed) / each)
    if found < ALIGN_BYTES:
        name = source.checkpoint.names[source.row]
        expected = f"device_scratch_bytes of at least {2 * int(fixed + ALIGN_BYTES * each + ALIGN_BYTES)}"
        raise ConversionError(message(f"the scratch is too small to decode {name}", expected=expected, found=2 * limit))
    for unit in (source.columns * block_rows, source.columns):
        if found >= unit:
            return found - found % unit
    return found - found % ALIGN_BYTES


def _kind(source: CodedSource, block_rows: tuple[int, int]) -> ScaleKind:
    decode, dtypes = source.decode, source.checkpoint.dtypes
    first, last = block_rows
    packed = None if decode.zero_points is None else (-(-last // PACKED) - first // PACKED, first % PACKED)
    has_global = decode.global_scale is not None
    grid = (last - first, source.across) if packed or has_global else None
    flags = decode.divides, decode.like_upstream, has_global
    return ScaleKind(decode.format, decode.bits, dtypes[decode.scales], source.dtype, *flags, packed, grid)


class _Taken(NamedTuple):
    """A slab of one source."""

    slab: _Slab
    row: int
    decode: Decode
    moves: Sequence[Move]


class _Window:
    """A window that is being filled with slabs."""

    def __init__(self, number: int, limit: int):
        self.used = 0
        self._number = number
        self._limit = limit
        self._taken: list[_Taken] = []
        self._by_kind: dict[ScaleKind, list[_Taken]] = {}
        self._parts: list[Part] = []

    def takes(self, slab: _Slab) -> bool:
        """Whether a slab fits in beside those that are there."""
        return not self._taken or self.used + slab.nbytes + _GROUP_ALIGN_BYTES <= self._limit

    def add(self, slab: _Slab, row: int, decode: Decode, moves: Sequence[Move]) -> None:
        taken = _Taken(slab, row, decode, moves)
        self.used += slab.nbytes
        self._taken.append(taken)
        of_kind = self._by_kind.get(slab.kind)
        if of_kind is None:
            self.used += _GROUP_ALIGN_BYTES
            of_kind = self._by_kind[slab.kind] = []
        of_kind.append(taken)

    def close(self, checkpoint: Checkpoint) -> CodeWindow:
        """The window, laid out: codes, then scales by kind with the table that is made of them, then numbers."""
        moves: list[Move] = []
        rectangles: dict[Rectangle, list[Place]] = {}
        at = sum([taken.slab.codes_bytes for taken in self._taken])
        groups: dict[ScaleKind, ScaleGroup] = {}
        for kind, alike in self._by_kind.items():
            groups[kind], at = self._lay_out(kind, alike, at, checkpoint)
        seen: dict[ScaleKind, tuple[int, int]] = dict.fromkeys(groups, (0, 0))  # sources and scales
        codes_at = 0
        for slab, row, _, targets in self._taken:
            for first, last in slab.codes:
                self._add(checkpoint, row, first, last - first, codes_at + first - slab.first_byte)
            sources, scales = seen[slab.kind]
            seen[slab.kind] = sources + 1, scales + slab.scales
            for rectangle, (target, target_offset, codes_bytes, scale, _) in slab.rectangles:
                if target == SCRATCH:
                    target_offset += at // itemsize(slab.kind.numbers)
                else:
                    target, target_offset = targets[target].target, targets[target].target_offset + target_offset
                places = rectangles.get(rectangle)
                if places is None:
                    places = rectangles[rectangle] = []
                places.append(Place(target, target_offset, codes_at + codes_bytes, scales + scale, sources))
            for move in slab.moves:
                moves.append(_placed(move, targets[move.target], at // itemsize(slab.kind.numbers)))
            codes_at, at = codes_at + slab.codes_bytes, at + slab.numbers_bytes
        return CodeWindow(self._parts, groups, rectangles, moves, at)

    def _lay_out(
        self, kind: ScaleKind, alike: Sequence[_Taken], at: int, checkpoint: Checkpoint
    ) -> tuple[ScaleGroup, int]:
        """Lay out the scales of a kind from ``at`` on; returns them and where they end."""
        first, scale_bytes = at, itemsize(kind.scales)
        for slab, _, decode, _ in alike:
            nbytes = slab.scales * scale_bytes
            across = slab.scales // (slab.block_rows[1] - slab.block_rows[0])
            self._add(checkpoint, decode.scales, slab.block_rows[0] * across * scale_bytes, nbytes, at)
            at += nbytes
        zero_points_bytes = at = aligned(at)
        for slab, _, decode, _ in alike:
            if decode.zero_points is not None and kind.zero_points is not None:
                across = slab.scales // (slab.block_rows[1] - slab.block_rows[0])
                nbytes = kind.zero_points[0] * across * _ZERO_POINT_BYTES
                before = slab.block_rows[0] // PACKED * across * _ZERO_POINT_BYTES
                self._add(checkpoint, decode.zero_points, before, nbytes, at)
                at += nbytes
        globals_bytes = at = aligned(at)
        for _, _, decode, _ in alike:
            if decode.global_scale is not None:
                self._add(checkpoint, decode.global_scale, 0, _GLOBAL_BYTES, at)
                at += _GLOBAL_BYTES
        cells_bytes = aligned(at)
        count = sum([taken.slab.scales for taken in alike])
        table_bytes = aligned(cells_bytes + (0 if kind.has_byte_cells else count * _CELL_BYTES))
        group = ScaleGroup(kind, len(alike), count, first, zero_points_bytes, globals_bytes, cells_bytes, table_bytes)
        return group, aligned(table_bytes + group.table_rows * kind.row_bytes)

    def _add(self, checkpoint: Checkpoint, row: int, offset_bytes: int, nbytes: int, start_bytes: int) -> None:
        """Read bytes of a source to a place in the window; with those before if both lie there together."""
        file, offset_bytes = checkpoint.file_ids[row], checkpoint.offsets[row] + offset_bytes
        if self._parts:
            last_file, last_offset, last_nbytes, _, last_start, last_row = self._parts[-1]
            follows = (last_file, last_offset + last_nbytes, last_start + last_nbytes)
            if follows == (file, offset_bytes, start_bytes):
                self._parts[-1] = Part(file, last_offset, last_nbytes + nbytes, self._number, last_start, last_row)
                return
        self._parts.append(Part(file, offset_bytes, nbytes, self._number, start_bytes, row))


def _placed(move: Move, of: Move, numbers: int) -> Move:
    """A copy of a slab with its target, and with its source where the numbers are."""
    return move._replace(
        target=of.target,
        target_offset=of.target_offset + move.target_offset,
        source_offset=move.source_offset + numbers,
    )
