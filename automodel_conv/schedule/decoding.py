"""Schedule the decoding of quantized sources on the host: which codes and scales are read together.

Pure: integers in, integers out. A job reads a slab of codes and the scales that they need into scratch, decodes them
there to the dtype of the targets, and copies the numbers to the targets. Scales that two slabs share are read for each.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import ceil

from automodel_conv.dtypes import itemsize
from automodel_conv.errors import ConversionError, message
from automodel_conv.files.checkpoint import Checkpoint
from automodel_conv.planning.copies import ZEROS_IN_I32, Decode
from automodel_conv.schedule.coded_source import CodedSource
from automodel_conv.schedule.cutting import ranges, slabs
from automodel_conv.schedule.jobs import (
    ALIGN_BYTES,
    GAP_BYTES,
    CodeRectangle,
    Grid,
    Move,
    Read,
    ReadAndCopy,
    Reads,
    align_up,
    group_moves,
)


def decode_jobs(
    moves: Mapping[int, Sequence[Move]], checkpoint: Checkpoint, decodes: Mapping[int, Decode], limit: int
) -> Iterator[ReadAndCopy]:
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
            for start, stop, cut in slabs(alike, _capacity(source, limit)):
                yield _job(source, start, stop, cut)


def _capacity(source: CodedSource, limit: int) -> int:
    """Elements of a slab that fits into ``limit`` bytes with all it takes."""
    scale_bytes = itemsize(source.checkpoint.dtypes[source.decode.scales])
    fixed = 2 * source.across * scale_bytes + 6 * ALIGN_BYTES
    each = source.decode.bits / 8 + itemsize(source.dtype) + scale_bytes * source.scales_per_element
    if source.decode.zero_points is not None:
        fixed += 2 * 4 * source.across
        each += 4 * source.scales_per_element / ZEROS_IN_I32
    found = int((limit - fixed) / each)
    least = min(ALIGN_BYTES, source.numel)
    if found < least:
        name = source.checkpoint.names[source.row]
        expected = f"at least {ceil(fixed + least * each)} bytes for each thread"
        raise ConversionError(message(f"the scratch is too small to decode {name}", expected=expected, found=limit))
    # Whole rows are decoded best.
    return found - found % source.columns if found >= source.columns else found


def _job(source: CodedSource, start: int, stop: int, cut: Sequence[Move]) -> ReadAndCopy:
    """The job that reads and decodes elements ``start`` to ``stop`` for the moves ``cut``."""
    bits = source.decode.bits
    if bits == 4:  # whole bytes
        start, stop = start - start % 2, stop + stop % 2
    reads: list[Read] = []
    for first, last in ranges(cut, GAP_BYTES * 8 // bits):
        first, last = first * bits // 8, -(-last * bits // 8)
        reads.append(_read(source, source.row, first, last - first, first - start * bits // 8))
    at = align_up((stop - start) * bits // 8)
    first, last = source.block_row(start), source.block_row(stop - 1) + 1
    scales, at = _grid(source, source.decode.scales, first, last, at, reads)
    zero_points = None
    if source.decode.zero_points is not None:
        zero_points, at = _grid(
            source, source.decode.zero_points, first // ZEROS_IN_I32, -(-last // ZEROS_IN_I32), at, reads
        )
    global_bytes = None
    if source.decode.global_scale is not None:
        global_bytes = at
        reads.append(_read(source, source.decode.global_scale, 0, 4, at))
        at = align_up(at + 4)
    size = itemsize(source.dtype)
    decodings = [
        CodeRectangle(
            source.decode,
            source.dtype,
            (r1 - r0, c1 - c0),
            (r0 % source.decode.block[0], c0 % source.decode.block[1]),
            (element - start) * bits // 8,
            source.columns * bits // 8,
            at + (element - start) * size,
            source.columns,
            scales,
            zero_points,
            first % ZEROS_IN_I32,
            global_bytes,
            source.block_row(element) - first,
            c0 // source.decode.block[1],
        )
        for element, r0, r1, c0, c1 in source.rectangles(start, stop, _columns(cut, source.columns, bits))
    ]
    shift = at // size - start
    moves = [move._replace(source_offset=move.source_offset + shift) for move in cut]
    return ReadAndCopy(Reads.from_list(sorted(reads)), at + (stop - start) * size, group_moves(moves), decodings)


def _read(source: CodedSource, row: int, offset_bytes: int, nbytes: int, start_bytes: int) -> Read:
    checkpoint = source.checkpoint
    return Read(checkpoint.file_ids[row], checkpoint.offsets[row] + offset_bytes, nbytes, 0, start_bytes)


def _grid(source: CodedSource, row: int, first: int, last: int, at: int, reads: list[Read]) -> tuple[Grid, int]:
    dtype = source.checkpoint.dtypes[row]
    row_bytes = source.across * itemsize(dtype)
    reads.append(_read(source, row, first * row_bytes, (last - first) * row_bytes, at))
    return Grid(at, dtype, (last - first, source.across)), align_up(at + (last - first) * row_bytes)


def _columns(moves: Sequence[Move], columns: int, bits: int) -> tuple[int, int]:
    """The columns that moves read, as one range of whole bytes; all where a move runs over the end of a row."""
    left, right = columns, 0
    for move in moves:
        walks = list(zip(move.box.shape, move.box.source_strides, strict=True))
        inner = sum((size - 1) * stride for size, stride in walks if stride % columns)
        first = move.source_offset % columns
        if first + inner >= columns:
            return 0, columns
        left, right = min(left, first), max(right, first + inner + 1)
    step = 8 // bits
    return left - left % step, min(columns, -(-right // step) * step)
