"""Schedule the decoding of quantized sources on a GPU: turn the moves out of them into windows; pure.

A window of device memory holds the codes of consecutive sources, and then their scales. The scales are gathered by
kind, so that one lookup table is computed for all scales of a kind. Rectangles of codes are decoded straight into the
targets. If strides do not allow that, whole rows are decoded into the window, and copies move values to the targets.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from automodel_conv.dtypes import itemsize
from automodel_conv.files.checkpoint import Checkpoint
from automodel_conv.planning.copies import Decode
from automodel_conv.schedule.code_slabs import (
    BYTE_SCALES,
    TABLE_ROW_BYTES,
    ZERO_POINT_BYTES,
    CodeSlab,
    Position,
    Rectangle,
    ScaleKind,
    cut_into_slabs,
)
from automodel_conv.schedule.coded_source import GLOBAL_BYTES, CodedSource, geometry_of
from automodel_conv.schedule.jobs import ALIGN_BYTES, Move, Read, align_up

# A group of scales loses at most this to the alignment of its parts.
_GROUP_ALIGN_BYTES = 5 * ALIGN_BYTES


class ScaleGroup(NamedTuple):
    """The scales of one kind in a window, source after source, and the table computed from them.

    Offsets are in bytes from the start of the window.
    """

    kind: ScaleKind
    sources: int
    """Number of sources; a source with two slabs in the window counts twice."""
    count: int
    """Number of scales."""
    scales_bytes: int
    """Offset of the scales."""
    zero_points_bytes: int
    """Offset of the packed zero points, if there are any."""
    globals_bytes: int
    """Offset of the global scales, if there are any: one F32 for each source. Their divisors, if any, follow them."""
    table_rows_bytes: int
    """Offset of the table row of each scale, I32 ``[count]``; unused if a scale is its own table row."""
    table_bytes: int
    """Offset of the table."""

    @property
    def table_groups(self) -> int:
        """Number of equal groups that scales and table rows divide into: one for each source, or one for all."""
        return 1 if self.kind.grid is None else self.sources

    @property
    def table_rows(self) -> int:
        """Number of rows of the table in the window; 0 if a table outside the windows is used."""
        if self.kind.is_shared:
            return 0
        return BYTE_SCALES * self.sources if self.kind.has_table_for_each_source else self.count


class CodeWindow(NamedTuple):
    """A window of quantized sources: its reads, not yet packed into chunks, and the decoding and copies after them."""

    reads: list[Read]
    """Reads that fill the window; their memory is its number. One read may cover several consecutive tensors."""
    groups: dict[ScaleKind, ScaleGroup]
    rectangles: dict[Rectangle, list[Position]]
    """Codes to decode: the positions of all rectangles, by geometry."""
    moves: list[Move]
    """Copies of decoded values out of the window, after all rectangles are decoded."""
    nbytes: int


def code_windows(
    moves: Mapping[int, Sequence[Move]],
    checkpoint: Checkpoint,
    decodes: Mapping[int, Decode],
    limit: int,
    first: int,
) -> Iterator[CodeWindow]:
    """Fill windows of at most ``limit`` bytes with quantized sources, in the order of the files.

    Args:
        moves: the copies out of each quantized source, by source row; their dtype is that of the target.
        decodes: the ``Decode`` of each of these sources, by row.
        limit: bytes of a window.
        first: number of the first window, which its reads carry as their memory.

    Raises:
        ConversionError: ``limit`` does not hold two rows of blocks of scales and some elements of a source.
    """
    number = first
    window = _Window(number, limit)
    slabs_by_geometry: dict[tuple[object, ...], tuple[CodeSlab, ...]] = {}
    places = list(zip(checkpoint.file_ids, checkpoint.offsets, strict=True))
    for row in sorted(moves, key=places.__getitem__):
        decode = decodes[row]
        geometry = geometry_of(row, decode, checkpoint)
        for dtype in {move.dtype: None for move in moves[row]}:
            to_dtype = [move for move in moves[row] if move.dtype == dtype]
            key = (dtype, geometry, *[(move.box, move.source_offset) for move in to_dtype])
            if key not in slabs_by_geometry:
                source = CodedSource(row, decode, checkpoint, dtype)
                numbered = [move._replace(target=n, target_offset=0) for n, move in enumerate(to_dtype)]
                slabs_by_geometry[key] = tuple(cut_into_slabs(source, numbered, limit))
            for slab in slabs_by_geometry[key]:
                placed = _PlacedSlab(slab, row, decode, to_dtype)
                if not window.add(placed):
                    yield window.close(checkpoint)
                    number += 1
                    window = _Window(number, limit)
                    window.add(placed)
    if window.used:
        yield window.close(checkpoint)


class _PlacedSlab(NamedTuple):
    """A slab in a window, with the source that it belongs to."""

    slab: CodeSlab
    row: int
    decode: Decode
    moves: Sequence[Move]
    """Moves of the source. The ``target`` of a rectangle or move of the slab is an index of this list."""


class _Window:
    """A window that is being filled with slabs."""

    def __init__(self, number: int, limit: int):
        self.used = 0
        self._number = number
        self._limit = limit
        self._slabs: list[_PlacedSlab] = []
        self._by_kind: dict[ScaleKind, list[_PlacedSlab]] = {}
        self._reads: list[list[int]] = []  # file, offset in the file, bytes and place in the window of each read

    def add(self, placed: _PlacedSlab) -> bool:
        """Add a slab if it fits into the rest of the window, and return whether it did; an empty one takes any slab."""
        slab = placed.slab
        if self._slabs and self.used + slab.nbytes + _GROUP_ALIGN_BYTES > self._limit:
            return False
        self.used += slab.nbytes
        self._slabs.append(placed)
        same_kind = self._by_kind.get(slab.kind)
        if same_kind is None:
            self.used += _GROUP_ALIGN_BYTES
            same_kind = self._by_kind[slab.kind] = []
        same_kind.append(placed)
        return True

    def close(self, checkpoint: Checkpoint) -> CodeWindow:
        """Lay out the window: codes, then for each kind its scales and its table, then decoded values."""
        moves: list[Move] = []
        rectangles: dict[Rectangle, list[Position]] = {}
        end = sum([placed.slab.codes_bytes for placed in self._slabs])
        groups: dict[ScaleKind, ScaleGroup] = {}
        for kind, placed_slabs in self._by_kind.items():
            groups[kind], end = self._lay_out(kind, placed_slabs, end, checkpoint)
        seen: dict[ScaleKind, tuple[int, int]] = dict.fromkeys(groups, (0, 0))  # sources and scales
        codes_start, values_start = 0, end
        value_bytes = {kind: itemsize(kind.value_dtype) for kind in groups}
        for slab, row, _, source_moves in self._slabs:
            for first, last in slab.codes:
                self._read(checkpoint, row, first, last - first, codes_start + first - slab.first_byte)
            sources, scales = seen[slab.kind]
            seen[slab.kind] = sources + 1, scales + slab.scale_count
            first_value = values_start // value_bytes[slab.kind]
            for rectangle, (target, target_offset, codes_bytes, scale, _) in slab.rectangles:
                if rectangle.in_window:
                    target_offset += first_value
                else:
                    move = source_moves[target]
                    target, target_offset = move.target, move.target_offset + target_offset
                places = rectangles.get(rectangle)
                if places is None:
                    places = rectangles[rectangle] = []
                places.append(Position(target, target_offset, codes_start + codes_bytes, scales + scale, sources))
            for move in slab.moves:
                moves.append(move.placed(source_moves[move.target], first_value))
            codes_start, values_start = codes_start + slab.codes_bytes, values_start + slab.values_bytes
        reads = [Read(file, offset, nbytes, self._number, start) for file, offset, nbytes, start in self._reads]
        return CodeWindow(reads, groups, rectangles, moves, values_start)

    def _lay_out(
        self, kind: ScaleKind, placed_slabs: Sequence[_PlacedSlab], at: int, checkpoint: Checkpoint
    ) -> tuple[ScaleGroup, int]:
        """Lay out the scales of a kind and their table from byte ``at`` on; return them and where they end."""
        scales_bytes, scale_bytes = at, itemsize(kind.scale_dtype)
        for slab, _, decode, _ in placed_slabs:
            nbytes = slab.scale_count * scale_bytes
            grid_columns = slab.scale_count // (slab.block_rows[1] - slab.block_rows[0])
            self._read(checkpoint, decode.scales, slab.block_rows[0] * grid_columns * scale_bytes, nbytes, at)
            at += nbytes
        zero_points_bytes = at = align_up(at)
        for slab, _, decode, _ in placed_slabs:
            if decode.zero_points is not None and kind.zero_points is not None:
                grid_columns = slab.scale_count // (slab.block_rows[1] - slab.block_rows[0])
                row_bytes = kind.zero_packing.columns(grid_columns) * ZERO_POINT_BYTES
                nbytes = kind.zero_points[0] * row_bytes
                offset_bytes = kind.zero_packing.rows(*slab.block_rows)[0] * row_bytes
                self._read(checkpoint, decode.zero_points, offset_bytes, nbytes, at)
                at += nbytes
        globals_bytes = at = align_up(at)
        globals_of = [(decode.global_scale, slab.global_bytes) for slab, _, decode, _ in placed_slabs]
        divisors = [(decode.global_divisor, slab.global_bytes) for slab, _, decode, _ in placed_slabs]
        for part, offset_bytes in (*globals_of, *divisors):
            if part is not None:
                self._read(checkpoint, part, offset_bytes, GLOBAL_BYTES, at)
                at += GLOBAL_BYTES
        table_rows_bytes = align_up(at)
        count = sum([placed.slab.scale_count for placed in placed_slabs])
        table_bytes = align_up(table_rows_bytes + (0 if kind.scale_is_table_row else count * TABLE_ROW_BYTES))
        group = ScaleGroup(
            kind=kind,
            sources=len(placed_slabs),
            count=count,
            scales_bytes=scales_bytes,
            zero_points_bytes=zero_points_bytes,
            globals_bytes=globals_bytes,
            table_rows_bytes=table_rows_bytes,
            table_bytes=table_bytes,
        )
        return group, align_up(table_bytes + group.table_rows * kind.row_bytes)

    def _read(self, checkpoint: Checkpoint, row: int, offset_bytes: int, nbytes: int, start_bytes: int) -> None:
        """Add a read of bytes of a tensor to a place in the window; lengthen the last read if this continues it."""
        file, offset_bytes = checkpoint.file_ids[row], checkpoint.offsets[row] + offset_bytes
        if self._reads:
            last = self._reads[-1]
            last_file, last_offset, last_nbytes, last_start = last
            if (last_file, last_offset + last_nbytes, last_start + last_nbytes) == (file, offset_bytes, start_bytes):
                last[2] += nbytes
                return
        self._reads.append([file, offset_bytes, nbytes, start_bytes])
