"""From copies out of quantized sources to jobs: which codes and scales are read together, and what they become.

Pure: integers in, integers out. A slab of a source, its codes with the scales they need, is read into scratch and
becomes numbers beside it, of the dtype of the targets, from where copies take them. Scales that two slabs share are
read for each.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from automodel_conv.dtypes import itemsize
from automodel_conv.errors import ConversionError, message
from automodel_conv.execution.cutting import ranges, slabs
from automodel_conv.execution.jobs import ALIGN_BYTES, GAP_BYTES, SCRATCH, Decoding, Grid, Job, Move, Part, aligned
from automodel_conv.files.checkpoint import Checkpoint
from automodel_conv.planning.copies import Decode

# Zero points in a packed I32, along the rows.
PACKED = 8


def decoded(
    moves: Mapping[int, Sequence[Move]], checkpoint: Checkpoint, decodes: Mapping[int, Decode], limit: int
) -> Iterator[Job]:
    """Slabs of quantized sources, one a job, in the order of the files, in at most ``limit`` bytes of scratch.

    Args:
        moves: by source row; their dtype is that of the target.

    Raises:
        ConversionError: the scratch does not hold two rows of blocks of scales and some elements.
    """
    file_ids, offsets = checkpoint.file_ids, checkpoint.offsets
    for row in sorted(moves, key=lambda row: (file_ids[row], offsets[row])):
        for dtype in dict.fromkeys(move.dtype for move in moves[row]):
            alike = [move for move in moves[row] if move.dtype == dtype]
            source = CodedSource(row, decodes[row], checkpoint, dtype)
            for start, stop, cut in slabs(alike, source.capacity(limit)):
                yield source.job(start, stop, cut)


class CodedSource:
    """A quantized source and the numbers it becomes."""

    def __init__(self, row: int, decode: Decode, checkpoint: Checkpoint, dtype: str):
        self.row, self.decode, self.checkpoint, self.dtype = row, decode, checkpoint, dtype
        rows, self.columns = decode.matrix
        numel = checkpoint.nbytes[row] * 8 // decode.bits
        block_rows, block_columns = decode.block
        self.down, self.across = -(-rows // block_rows), -(-self.columns // block_columns)
        # Matrices that follow each other are one where blocks do not end within them.
        matrices = numel // (rows * self.columns)
        self.height = rows if rows % block_rows else rows * matrices
        self.blocks_high = self.down if rows % block_rows else self.down * matrices

    def capacity(self, limit: int) -> int:
        """Elements of a slab that fits into ``limit`` bytes with all it takes."""
        row_bytes = self.across * itemsize(self.checkpoint.dtypes[self.decode.scales])
        fixed = 2 * row_bytes + 6 * ALIGN_BYTES
        each = self.decode.bits / 8 + itemsize(self.dtype) + row_bytes / (self.columns * self.decode.block[0])
        if self.decode.zero_points is not None:
            fixed += 2 * 4 * self.across
            each += 4 * self.across / (self.columns * self.decode.block[0] * PACKED)
        found = int((limit - fixed) / each)
        if found < ALIGN_BYTES:
            name = self.checkpoint.names[self.row]
            expected = f"at least {int(fixed + ALIGN_BYTES * each)} bytes for each thread"
            raise ConversionError(message(f"the scratch is too small to decode {name}", expected=expected, found=limit))
        # Whole rows are decoded best.
        return found - found % self.columns if found >= self.columns else found

    def job(self, start: int, stop: int, cut: Sequence[Move]) -> Job:
        """What reads and decodes elements ``start`` to ``stop`` for the moves ``cut``."""
        bits = self.decode.bits
        if bits == 4:  # whole bytes
            start, stop = start - start % 2, stop + stop % 2
        parts: list[Part] = []
        for first, last in ranges(cut, GAP_BYTES * 8 // bits):
            first, last = first * bits // 8, -(-last * bits // 8)
            parts.append(self._part(self.row, first, last - first, first - start * bits // 8))
        at = aligned((stop - start) * bits // 8)
        first, last = self.block_row(start), self.block_row(stop - 1) + 1
        scales, at = self._grid(self.decode.scales, first, last, at, parts)
        zero_points = None
        if self.decode.zero_points is not None:
            zero_points, at = self._grid(self.decode.zero_points, first // PACKED, -(-last // PACKED), at, parts)
        global_bytes = None
        if self.decode.global_scale is not None:
            global_bytes = at
            parts.append(self._part(self.decode.global_scale, 0, 4, at))
            at = aligned(at + 4)
        size = itemsize(self.dtype)
        decodings = [
            Decoding(
                self.decode,
                self.dtype,
                (r1 - r0, c1 - c0),
                (r0 % self.decode.block[0], c0 % self.decode.block[1]),
                (element - start) * bits // 8,
                self.columns * bits // 8,
                at + (element - start) * size,
                self.columns,
                scales,
                zero_points,
                first % PACKED,
                global_bytes,
                self.block_row(element) - first,
                c0 // self.decode.block[1],
            )
            for element, r0, r1, c0, c1 in self.rectangles(start, stop, _columns(cut, self.columns, bits))
        ]
        shift = at // size - start
        moves = [move._replace(source_offset=move.source_offset + shift) for move in cut]
        return Job(sorted(parts), moves, at + (stop - start) * size, decodings)

    def _part(self, row: int, offset_bytes: int, nbytes: int, start_bytes: int) -> Part:
        checkpoint = self.checkpoint
        return Part(checkpoint.file_ids[row], checkpoint.offsets[row] + offset_bytes, nbytes, SCRATCH, start_bytes, row)

    def _grid(self, row: int, first: int, last: int, at: int, parts: list[Part]) -> tuple[Grid, int]:
        dtype = self.checkpoint.dtypes[row]
        row_bytes = self.across * itemsize(dtype)
        parts.append(self._part(row, first * row_bytes, (last - first) * row_bytes, at))
        return Grid(at, dtype, (last - first, self.across)), aligned(at + (last - first) * row_bytes)

    def block_row(self, element: int) -> int:
        """The row of blocks in which an element lies, counted over all matrices."""
        matrix, row = divmod(element // self.columns, self.height)
        return matrix * self.blocks_high + row // self.decode.block[0]

    def rectangles(self, start: int, stop: int, columns: tuple[int, int]) -> Iterator[tuple[int, int, int, int, int]]:
        """A range of elements as rectangles: first element, rows, columns; none reaches beyond its matrix."""
        at = start
        while at < stop:
            matrix, row = divmod(at // self.columns, self.height)
            first = at % self.columns
            ends = min(stop, (matrix + 1) * self.height * self.columns)
            whole = (ends - at) // self.columns
            if first or not whole:
                rows, last = 1, min(self.columns, first + ends - at)
            else:
                rows, last = whole, self.columns
            left, right = max(first, columns[0]), min(last, columns[1])
            if left < right:
                yield at - first + left, row, row + rows, left, right
            at += rows * self.columns - first if rows > 1 or last == self.columns else last - first


def _columns(moves: Sequence[Move], columns: int, bits: int) -> tuple[int, int]:
    """The columns that moves read, as one range of whole bytes; all where a move runs over the end of a row."""
    left, right = columns, 0
    for move in moves:
        walks = [(size - 1) * stride for size, stride in zip(move.shape, move.source_strides, strict=True)]
        inner = sum(walk for walk, stride in zip(walks, move.source_strides, strict=True) if stride % columns)
        first = move.source_offset % columns
        if first + inner >= columns:
            return 0, columns
        left, right = min(left, first), max(right, first + inner + 1)
    step = 8 // bits
    return left - left % step, min(columns, -(-right // step) * step)
