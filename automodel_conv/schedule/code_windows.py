"""Schedule windows of device memory for quantized sources, each with many sources and all their scales.

Pure: integers in, integers out. A window holds the codes of sources that follow each other in the files, then their
scales, gathered so that one table is made for all scales of a kind. Rectangles of codes are decoded straight into the
targets. Where strides do not allow that, whole rows are decoded into the window, and copies take them from there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from automodel_conv.dtypes import itemsize
from automodel_conv.files.checkpoint import Checkpoint
from automodel_conv.planning.copies import ZEROS_IN_I32, Decode
from automodel_conv.schedule.code_slabs import (
    BYTE_SCALES,
    GLOBAL_BYTES,
    TABLE_ROW_BYTES,
    ZERO_POINT_BYTES,
    Position,
    Rectangle,
    ScaleKind,
    Slab,
    slabs_of,
)
from automodel_conv.schedule.coded_source import CodedSource
from automodel_conv.schedule.jobs import ALIGN_BYTES, Move, Read, align_up

# A group of scales loses so many bytes to the alignment of its pieces.
_GROUP_ALIGN_BYTES = 5 * ALIGN_BYTES


class ScaleGroup(NamedTuple):
    """The scales of one kind in a window: those of one source after those of another; offsets count from its start."""

    kind: ScaleKind
    sources: int
    count: int
    scales_bytes: int
    zero_points_bytes: int
    globals_bytes: int
    table_rows_bytes: int
    """The place of the scales' own numbers, I32, which are their rows of the table."""
    table_bytes: int

    @property
    def table_groups(self) -> int:
        """The sources, where each has its own share of scales and rows; else all count as one."""
        return 1 if self.kind.grid is None else self.sources

    @property
    def table_rows(self) -> int:
        """Rows of the table that is made in the window."""
        if self.kind.is_shared:
            return 0
        return BYTE_SCALES * self.sources if self.kind.has_table_for_each_source else self.count


class CodeWindow(NamedTuple):
    """The contents of a window, and their fate."""

    reads: list[Read]
    """Their memory is the number of the window. One read may be several tensors that lie together."""
    groups: dict[ScaleKind, ScaleGroup]
    rectangles: dict[Rectangle, list[Position]]
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
        first: the number of the first window, which its reads have for a memory.

    Raises:
        ConversionError: ``limit`` does not hold two rows of blocks of scales and some elements of a source.
    """
    number = first
    window = _Window(number, limit)
    known: dict[tuple[object, ...], tuple[Slab, ...]] = {}  # sources of one geometry are cut alike
    dtypes, nbytes = checkpoint.dtypes, checkpoint.nbytes
    for row in sorted(moves, key=lambda row: (checkpoint.file_ids[row], checkpoint.offsets[row])):
        decode = decodes[row]
        parts = (decode.scales, decode.zero_points, decode.global_scale)
        others = [None if part is None else dtypes[part] for part in parts]
        for dtype in {move.dtype: None for move in moves[row]}:
            alike = [move for move in moves[row] if move.dtype == dtype]
            read_alike = [(move.box, move.source_offset) for move in alike]
            key = (dtype, nbytes[row], decode.kind, *others, *read_alike)
            if key not in known:
                source = CodedSource(row, decode, checkpoint, dtype)
                numbered = [move._replace(target=n, target_offset=0) for n, move in enumerate(alike)]
                known[key] = tuple(slabs_of(source, numbered, limit))
            for slab in known[key]:
                if not window.takes(slab):
                    yield window.close(checkpoint)
                    number += 1
                    window = _Window(number, limit)
                window.add(slab, row, decode, alike)
    if window.used:
        yield window.close(checkpoint)


class _Taken(NamedTuple):
    """A slab of one source."""

    slab: Slab
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
        self._reads: list[Read] = []

    def takes(self, slab: Slab) -> bool:
        """Whether a slab fits in beside those that are there."""
        return not self._taken or self.used + slab.nbytes + _GROUP_ALIGN_BYTES <= self._limit

    def add(self, slab: Slab, row: int, decode: Decode, moves: Sequence[Move]) -> None:
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
        rectangles: dict[Rectangle, list[Position]] = {}
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
                if rectangle.in_window:
                    target_offset += at // itemsize(slab.kind.numbers)
                else:
                    target, target_offset = targets[target].target, targets[target].target_offset + target_offset
                places = rectangles.get(rectangle)
                if places is None:
                    places = rectangles[rectangle] = []
                places.append(Position(target, target_offset, codes_at + codes_bytes, scales + scale, sources))
            for move in slab.moves:
                moves.append(_placed(move, targets[move.target], at // itemsize(slab.kind.numbers)))
            codes_at, at = codes_at + slab.codes_bytes, at + slab.numbers_bytes
        return CodeWindow(self._reads, groups, rectangles, moves, at)

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
        zero_points_bytes = at = align_up(at)
        for slab, _, decode, _ in alike:
            if decode.zero_points is not None and kind.zero_points is not None:
                across = slab.scales // (slab.block_rows[1] - slab.block_rows[0])
                nbytes = kind.zero_points[0] * across * ZERO_POINT_BYTES
                before = slab.block_rows[0] // ZEROS_IN_I32 * across * ZERO_POINT_BYTES
                self._add(checkpoint, decode.zero_points, before, nbytes, at)
                at += nbytes
        globals_bytes = at = align_up(at)
        for _, _, decode, _ in alike:
            if decode.global_scale is not None:
                self._add(checkpoint, decode.global_scale, 0, GLOBAL_BYTES, at)
                at += GLOBAL_BYTES
        table_rows_bytes = align_up(at)
        count = sum([taken.slab.scales for taken in alike])
        table_bytes = align_up(table_rows_bytes + (0 if kind.scale_is_table_row else count * TABLE_ROW_BYTES))
        group = ScaleGroup(
            kind, len(alike), count, first, zero_points_bytes, globals_bytes, table_rows_bytes, table_bytes
        )
        return group, align_up(table_bytes + group.table_rows * kind.row_bytes)

    def _add(self, checkpoint: Checkpoint, row: int, offset_bytes: int, nbytes: int, start_bytes: int) -> None:
        """Read bytes of a source to a place in the window; with those before if both lie there together."""
        file, offset_bytes = checkpoint.file_ids[row], checkpoint.offsets[row] + offset_bytes
        if self._reads:
            last_file, last_offset, last_nbytes, _, last_start = self._reads[-1]
            follows = (last_file, last_offset + last_nbytes, last_start + last_nbytes)
            if follows == (file, offset_bytes, start_bytes):
                self._reads[-1] = Read(file, last_offset, last_nbytes + nbytes, self._number, last_start)
                return
        self._reads.append(Read(file, offset_bytes, nbytes, self._number, start_bytes))


def _placed(move: Move, of: Move, numbers: int) -> Move:
    """A copy of a slab with its target, and with its source where the numbers are."""
    return move._replace(
        target=of.target,
        target_offset=of.target_offset + move.target_offset,
        source_offset=move.source_offset + numbers,
    )
