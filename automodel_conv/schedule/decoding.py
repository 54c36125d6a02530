"""Schedule the decoding of quantized sources on the host: turn the moves out of them into jobs; pure.

A job reads a slab of codes and their scales into scratch, decodes the codes there to the dtype of the targets, and
copies the values to the targets. Scales that two slabs share are read once for each slab.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import ceil

from automodel_conv.dtypes import itemsize
from automodel_conv.errors import ConversionError, message
from automodel_conv.files.checkpoint import Checkpoint
from automodel_conv.planning.copies import Decode
from automodel_conv.schedule.coded_source import GLOBAL_BYTES, CodedSource, geometry_of
from automodel_conv.schedule.cutting import read_ranges, slabs
from automodel_conv.schedule.jobs import (
    ALIGN_BYTES,
    GAP_BYTES,
    CodeRectangle,
    Grid,
    Move,
    PlacedSlab,
    ReadAndCopy,
    SlabRead,
    SlabSource,
    SourceSlab,
    align_up,
)


def decode_jobs(
    moves: Mapping[int, Sequence[Move]], checkpoint: Checkpoint, decodes: Mapping[int, Decode], limit: int
) -> Iterator[ReadAndCopy]:
    """Schedule one job for each slab of each quantized source, in the order of the files; see ``cut_coded``."""
    for slabs_of_source, source in cut_coded(moves, checkpoint, decodes, limit):
        for slab in slabs_of_source:
            yield ReadAndCopy((PlacedSlab(slab, source),))


def cut_coded(
    moves: Mapping[int, Sequence[Move]], checkpoint: Checkpoint, decodes: Mapping[int, Decode], limit: int
) -> Iterator[tuple[tuple[SourceSlab, ...], SlabSource]]:
    """Cut each quantized source into slabs, in the order of the files.

    Sources of one geometry share their slabs, so the work for a source hardly depends on its size.

    Args:
        moves: the copies out of each quantized source, by source row; their dtype is that of the target.
        decodes: the ``Decode`` of each of these sources, by row.
        limit: bytes of scratch that a slab may use.

    Yields:
        The slabs of a source, and the source with the moves to one dtype.

    Raises:
        ConversionError: ``limit`` does not hold two rows of blocks of scales and some elements of a source.
    """
    slabs_by_geometry: dict[tuple[object, ...], tuple[SourceSlab, ...]] = {}
    file_ids, offsets = checkpoint.file_ids, checkpoint.offsets
    for row in sorted(moves, key=lambda row: (file_ids[row], offsets[row])):
        decode = decodes[row]
        places = tuple([(file_ids[part], offsets[part]) for part in (row, *decode.parts)])
        geometry = geometry_of(row, decode, checkpoint)
        for dtype in dict.fromkeys([move.dtype for move in moves[row]]):
            to_dtype = [move for move in moves[row] if move.dtype == dtype]
            key = (dtype, geometry, *[(move.box, move.source_offset) for move in to_dtype])
            if key not in slabs_by_geometry:
                source = CodedSource(row, decode, checkpoint, dtype)
                numbered = [move._replace(target=n, target_offset=0) for n, move in enumerate(to_dtype)]
                cuts = slabs(numbered, _capacity(source, limit), source.section)
                slabs_by_geometry[key] = tuple([_slab(source, *cut) for cut in cuts])
            yield slabs_by_geometry[key], SlabSource(places, to_dtype, decode)


def _capacity(source: CodedSource, limit: int) -> int:
    """Return how many elements fit into ``limit`` bytes as codes and as values, with their scales and zero points."""
    scale_bytes = itemsize(source.checkpoint.dtypes[source.decode.scales])
    fixed_bytes = 2 * source.grid_columns * scale_bytes + 6 * ALIGN_BYTES
    element_bytes = source.decode.bits / 8 + itemsize(source.dtype) + scale_bytes * source.scales_per_element
    if source.decode.zero_points is not None:
        fixed_bytes += 2 * 4 * source.zero_columns
        element_bytes += 4 * source.zero_words_per_element
    capacity = int((limit - fixed_bytes) / element_bytes)
    least = min(ALIGN_BYTES, source.section)
    if capacity < least:
        name = source.checkpoint.names[source.row]
        expected = f"at least {ceil(fixed_bytes + least * element_bytes)} bytes for each thread"
        raise ConversionError(message(f"the scratch is too small to decode {name}", expected=expected, found=limit))
    # Whole rows are decoded fastest.
    return capacity - capacity % source.columns if capacity >= source.columns else capacity


def _slab(source: CodedSource, start: int, stop: int, parts: Sequence[Move]) -> SourceSlab:
    """Return the slab that reads elements ``start`` to ``stop``, decodes them, and carries out the moves ``parts``."""
    bits = source.decode.bits
    if bits == 4:  # widen to whole bytes
        start, stop = start - start % 2, stop + stop % 2
    reads: list[SlabRead] = []
    for first, last in read_ranges(parts, GAP_BYTES * 8 // bits):
        first, last = first * bits // 8, -(-last * bits // 8)
        reads.append(_read(source, source.row, first, last - first, first - start * bits // 8))
    end = align_up((stop - start) * bits // 8)
    first, last = source.block_row(start), source.block_row(stop - 1) + 1
    scales, end = _read_grid(source, source.decode.scales, first, last, end, reads)
    zero_points = None
    if source.decode.zero_points is not None:
        packed_rows = source.decode.zero_packing.rows(first, last)
        zero_points, end = _read_grid(source, source.decode.zero_points, *packed_rows, end, reads)
    global_bytes = None
    if source.decode.global_scale is not None:
        global_bytes = end
        for part in (source.decode.global_scale, source.decode.global_divisor):
            if part is not None:
                reads.append(_read(source, part, source.global_bytes(start), GLOBAL_BYTES, end))
                end += GLOBAL_BYTES
        end = align_up(end)
    size = itemsize(source.dtype)
    rectangles = [
        CodeRectangle(
            decode=source.decode,
            dtype=source.dtype,
            shape=(r1 - r0, c1 - c0),
            start=(r0 % source.decode.block[0], c0 % source.decode.block[1]),
            codes_bytes=(element - start) * bits // 8,
            codes_stride=source.columns * bits // 8,
            values_bytes=end + (element - start) * size,
            values_stride=source.columns,
            scales=scales,
            zero_points=zero_points,
            zero_row=source.decode.zero_packing.skipped(first),
            global_bytes=global_bytes,
            has_divisor=source.decode.global_divisor is not None,
            block_row=source.block_row(element) - first,
            block_column=c0 // source.decode.block[1],
        )
        for element, r0, r1, c0, c1 in source.rectangles(start, stop, _columns_read(parts, source.columns, bits))
    ]
    shift = end // size - start
    moves = [move._replace(source_offset=move.source_offset + shift) for move in parts]
    return SourceSlab(tuple(reads), tuple(moves), end + (stop - start) * size, tuple(rectangles))


def _read(source: CodedSource, row: int, offset_bytes: int, nbytes: int, start_bytes: int) -> SlabRead:
    """Return a read of bytes of a part of a source, by their offset in the part, to a place in the scratch."""
    return SlabRead((source.row, *source.decode.parts).index(row), offset_bytes, nbytes, start_bytes)


def _read_grid(
    source: CodedSource, row: int, first: int, last: int, start_bytes: int, reads: list[SlabRead]
) -> tuple[Grid, int]:
    """Append a read of rows ``first`` to ``last`` of a grid to ``start_bytes``; return the grid and where it ends."""
    dtype = source.checkpoint.dtypes[row]
    columns = source.zero_columns if row == source.decode.zero_points else source.grid_columns
    row_bytes = columns * itemsize(dtype)
    nbytes = (last - first) * row_bytes
    reads.append(_read(source, row, first * row_bytes, nbytes, start_bytes))
    return Grid(start_bytes, dtype, (last - first, columns)), align_up(start_bytes + nbytes)


def _columns_read(moves: Sequence[Move], columns: int, bits: int) -> tuple[int, int]:
    """Return the columns that moves read, as one range of whole bytes; all columns if a move crosses a row's end."""
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
