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
from automodel_conv.execution.code_rectangles import Region, regions_of
from automodel_conv.execution.cutting import ranges, slabs
from automodel_conv.execution.decode_schedule import PACKED, CodedSource
from automodel_conv.execution.jobs import ALIGN_BYTES, GAP_BYTES, SCRATCH, Move, Part, aligned
from automodel_conv.files.checkpoint import Checkpoint
from automodel_conv.planning.copies import Decode

# A scale of one byte has one of 256 values.
_BYTE_SCALES = 256
_GLOBAL_BYTES = 4
_ZERO_POINT_BYTES = 4
CELL_BYTES = 4
"""Bytes of the number of a scale; a load has memory for as many as a window has scales that need one."""


class ScaleKind(NamedTuple):
    """What scales have in common that share a table."""

    format: str
    """Of the codes: "e4m3", "e5m2", "e2m1" or "int4"."""
    scales: str
    """The dtype code of the scales as stored."""
    numbers: str
    """The dtype code of what the codes become."""
    divides: bool
    like_upstream: bool
    has_global: bool
    zero_points: tuple[int, int] | None
    """Packed rows of a source, and the row of the first one in which its first scale has its zero point."""
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
    def row_bytes(self) -> int:
        """Bytes of a row of the table: a number for each code."""
        return itemsize(self.numbers) << (8 if self.format in ("e4m3", "e5m2") else 4)


class ScaleRun(NamedTuple):
    """The scales of one kind in a window: those of one source after those of another; offsets count from its start."""

    kind: ScaleKind
    sources: int
    count: int
    scales_bytes: int
    zero_points_bytes: int
    globals_bytes: int
    table_bytes: int

    @property
    def table_rows(self) -> int:
        """Rows of the table that is made in the window."""
        if self.kind.is_shared:
            return 0
        return _BYTE_SCALES * self.sources if self.kind.has_byte_cells else self.count


class Rectangle(NamedTuple):
    """What one call of ``dequantize`` decodes, all but the places."""

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


class Places(NamedTuple):
    """Where rectangles of one geometry are, in columns."""

    targets: list[int]
    """``SCRATCH``: the window."""
    target_offsets: list[int]
    """In elements."""
    codes_bytes: list[int]
    """From the start of the window."""
    scales: list[int]
    """The scale of the first block, counted from the first of the run."""
    sources: list[int]
    """Counted within the run."""


class CodeWindow(NamedTuple):
    """What fills a window, and what becomes of it."""

    parts: list[Part]
    """Of the files; their target is the number of the window."""
    runs: dict[ScaleKind, ScaleRun]
    rectangles: dict[Rectangle, Places]
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
    for row in sorted(moves, key=lambda row: (checkpoint.file_ids[row], checkpoint.offsets[row])):
        for dtype in dict.fromkeys(move.dtype for move in moves[row]):
            alike = [move for move in moves[row] if move.dtype == dtype]
            source = CodedSource(row, decodes[row], checkpoint, dtype)
            for slab in _slabs(source, alike, limit):
                if not window.takes(slab):
                    yield window.close()
                    number += 1
                    window = _Window(number, limit)
                window.add(slab)
    if window.used:
        yield window.close()


class _Slab(NamedTuple):
    """A range of a source's elements, and what becomes of them."""

    source: CodedSource
    start: int
    stop: int
    cut: Sequence[Move]
    regions: Sequence[Region] | None
    """None: decoded into the window first."""
    block_rows: tuple[int, int]
    """The rows of blocks that it reaches into."""
    kind: ScaleKind

    @property
    def scales(self) -> int:
        return (self.block_rows[1] - self.block_rows[0]) * self.source.across


def _slabs(source: CodedSource, moves: Sequence[Move], limit: int, in_place: bool = True) -> Iterator[_Slab]:
    """A source in as few slabs as fit into windows, with the rectangles that its copies are."""
    in_place = in_place and all(regions_of(move, source) is not None for move in moves)
    for start, stop, cut in slabs(moves, _capacity(source, limit, in_place)):
        regions = [regions_of(move, source) for move in cut] if in_place else []
        if None in regions:  # a cut between two halves of a byte
            yield from _slabs(source, cut, limit, in_place=False)
            continue
        if source.decode.bits == 4:  # whole bytes
            start, stop = start - start % 2, stop + stop % 2
        block_rows = source.block_row(start), source.block_row(stop - 1) + 1
        found = [region for some in regions for region in some or ()] if in_place else None
        yield _Slab(source, start, stop, cut, found, block_rows, _kind(source, block_rows))


def _capacity(source: CodedSource, limit: int, in_place: bool) -> int:
    """Elements of a source that fit into a window with all that they take, in whole rows of blocks where possible.

    Raises:
        ConversionError: not even a few do.
    """
    decode, kind = source.decode, _kind(source, (0, 1))
    a_scale = itemsize(kind.scales) + (CELL_BYTES if decode.zero_points is None else CELL_BYTES + _ZERO_POINT_BYTES)
    fixed = 8 * ALIGN_BYTES
    if not kind.has_byte_cells:
        a_scale += kind.row_bytes
    elif kind.has_global:
        fixed += _BYTE_SCALES * kind.row_bytes
    block_rows = decode.block[0]
    fixed += (2 if decode.zero_points is None else 2 * PACKED) * source.across * a_scale
    each = decode.bits / 8 + a_scale * source.across / (source.columns * block_rows)
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
    return ScaleKind(decode.format, dtypes[decode.scales], source.dtype, *flags, packed, grid)


class _Window:
    """A window that is being filled with slabs."""

    def __init__(self, number: int, limit: int):
        self.used = 0
        self._number = number
        self._limit = limit
        self._slabs: list[_Slab] = []
        self._by_kind: dict[ScaleKind, list[_Slab]] = {}

    def takes(self, slab: _Slab) -> bool:
        """Whether a slab fits in beside those that are there."""
        return not self._slabs or self.used + self._cost(slab) <= self._limit

    def add(self, slab: _Slab) -> None:
        self.used += self._cost(slab)
        self._slabs.append(slab)
        self._by_kind.setdefault(slab.kind, []).append(slab)

    def _cost(self, slab: _Slab) -> int:
        """Bytes of a window that a slab takes, and of the numbers of its scales, which all windows share."""
        kind, numel = slab.kind, slab.stop - slab.start
        nbytes = aligned(numel * slab.source.decode.bits // 8) + slab.scales * itemsize(kind.scales)
        if not kind.has_byte_cells:
            nbytes += slab.scales * (kind.row_bytes + CELL_BYTES)
        elif kind.has_global:
            nbytes += _BYTE_SCALES * kind.row_bytes
        if kind.zero_points:
            nbytes += _ZERO_POINT_BYTES * kind.zero_points[0] * slab.source.across
        if slab.regions is None:
            nbytes += aligned(numel * itemsize(kind.numbers))
        return nbytes + _GLOBAL_BYTES + (0 if kind in self._by_kind else 4 * ALIGN_BYTES)

    def close(self) -> CodeWindow:
        """The window, laid out: codes, then scales by kind with the table that is made of them, then numbers."""
        parts: list[Part] = []
        moves: list[Move] = []
        at, codes_at = 0, []
        for slab in self._slabs:
            codes_at.append(at)
            at = aligned(at + (slab.stop - slab.start) * slab.source.decode.bits // 8)
        runs = {}
        for kind, alike in self._by_kind.items():
            runs[kind], at = self._run(kind, alike, at, parts)
        rectangles: dict[Rectangle, Places] = {}
        seen: dict[ScaleKind, tuple[int, int]] = dict.fromkeys(runs, (0, 0))  # sources and scales
        for slab, codes_bytes in zip(self._slabs, codes_at, strict=True):
            sources, scales = seen[slab.kind]
            seen[slab.kind] = sources + 1, scales + slab.scales
            regions = slab.regions
            if regions is None:
                regions, at = _into_window(slab, at, moves)
            for region in regions:
                _add(rectangles, region, slab, codes_bytes, scales, sources)
            self._add_codes(slab, codes_bytes, parts)
        return CodeWindow(parts, runs, rectangles, moves, at)

    def _add_codes(self, slab: _Slab, codes_bytes: int, parts: list[Part]) -> None:
        source, bits = slab.source, slab.source.decode.bits
        for first, last in ranges(slab.cut, GAP_BYTES * 8 // bits):
            first, last = first * bits // 8, -(-last * bits // 8)
            parts.append(
                source.part(source.row, first, last - first, codes_bytes + first - slab.start * bits // 8, self._number)
            )

    def _run(self, kind: ScaleKind, alike: Sequence[_Slab], at: int, parts: list[Part]) -> tuple[ScaleRun, int]:
        """Lay out the scales of a kind from ``at`` on; returns them and where they end."""
        first = at
        for slab in alike:
            at = self._add_blocks(slab, slab.source.decode.scales, slab.block_rows, kind.scales, at, parts)
        zero_points_bytes = at = aligned(at)
        for slab in alike:
            if slab.source.decode.zero_points is not None:
                packed = slab.block_rows[0] // PACKED, -(-slab.block_rows[1] // PACKED)
                at = self._add_blocks(slab, slab.source.decode.zero_points, packed, "I32", at, parts)
        globals_bytes = at = aligned(at)
        for slab in alike:
            if slab.source.decode.global_scale is not None:
                parts.append(slab.source.part(slab.source.decode.global_scale, 0, _GLOBAL_BYTES, at, self._number))
                at += _GLOBAL_BYTES
        table_bytes = aligned(at)
        count = sum(slab.scales for slab in alike)
        run = ScaleRun(kind, len(alike), count, first, zero_points_bytes, globals_bytes, table_bytes)
        return run, aligned(table_bytes + run.table_rows * kind.row_bytes)

    def _add_blocks(
        self, slab: _Slab, row: int, block_rows: tuple[int, int], dtype: str, at: int, parts: list[Part]
    ) -> int:
        row_bytes = slab.source.across * itemsize(dtype)
        nbytes = (block_rows[1] - block_rows[0]) * row_bytes
        parts.append(slab.source.part(row, block_rows[0] * row_bytes, nbytes, at, self._number))
        return at + nbytes


def _into_window(slab: _Slab, at: int, moves: list[Move]) -> tuple[list[Region], int]:
    """Rectangles of numbers that lie in the window from ``at`` on, as the source has them; the copies follow."""
    source, size = slab.source, itemsize(slab.source.dtype)
    shift = at // size - slab.start
    regions = [
        Region(element, (r1 - r0, c1 - c0), 1, (source.columns, 1), SCRATCH, element + shift)
        for element, r0, r1, c0, c1 in source.rectangles(slab.start, slab.stop, (0, source.columns))
    ]
    moves += [move._replace(source_offset=move.source_offset + shift) for move in slab.cut]
    return regions, aligned(at + (slab.stop - slab.start) * size)


def _add(
    rectangles: dict[Rectangle, Places], region: Region, slab: _Slab, codes_bytes: int, scales: int, sources: int
) -> None:
    """Add a rectangle to those of its geometry.

    Args:
        codes_bytes: where the codes of the slab begin.
        scales, sources: of its kind, before those of the slab.
    """
    source, step = slab.source, region.row_step
    bits, (block_rows, block_columns) = source.decode.bits, source.decode.block
    row, column = divmod(region.element, source.columns)
    start, across = row % source.height % block_rows, source.across
    if block_rows % step == 0:  # rows of the rectangle, not of the source
        start, block_rows = start // step, block_rows // step
    elif step % block_rows == 0:
        start, block_rows, across = 0, 1, across * (step // block_rows)
    rectangle = Rectangle(
        slab.kind,
        region.shape,
        step * source.columns * bits // 8,
        region.target_strides,
        (block_rows, block_columns),
        (start, column % block_columns),
        across,
    )
    places = rectangles.get(rectangle)
    if places is None:
        places = rectangles[rectangle] = Places([], [], [], [], [])
    cell = (source.block_row(region.element) - slab.block_rows[0]) * source.across + column // block_columns
    places.targets.append(region.target)
    places.target_offsets.append(region.target_offset)
    places.codes_bytes.append(codes_bytes + (region.element - slab.start) * bits // 8)
    places.scales.append(scales + cell)
    places.sources.append(sources)
