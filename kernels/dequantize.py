"""Dequantize: codes of 8 or 4 bits into numbers, by looking them up in the tables that ``code_tables`` makes.

Shapes: codes of ``[R, C]`` elements (nibbles two to a byte, the even column in the low one), a cell for every block of
them, and ``[R, C]`` numbers, which may lie transposed. Nothing is computed here, so every device writes the same bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from automodel_conv.kernels.address_table import MAX_ACCESS_BYTES, Matrices, alignment, as_matrices, at_addresses
from automodel_conv.kernels.dequantize_torch import check_dequantize, is_stored_by_columns
from automodel_conv.kernels.dequantize_torch import dequantize_torch as dequantize_torch
from automodel_conv.kernels.jit import jit, tl
from automodel_conv.kernels.launch import Launches, launches_by_alignment
from automodel_conv.kernels.launch import start as start_launches
from automodel_conv.kernels.tiles import RUNTIME, grouped_tile, pointer_to
from automodel_conv.kernels.variants import Geometry, Kernel, Reach, Variant, word

# Rows and columns of a tile: 32 numbers for each thread of a block; in a transposed one runs of 64 bytes of 2-byte
# numbers on the side that is written. Twice as many numbers spill registers in places; other shapes of as many do not,
# and are among the candidates of benchmarks/gpu.
_TILE = (16, 256)
_TRANSPOSED_TILE = (32, 128)
_SCALAR_TILE = (16, 32)  # larger ones need more registers for addresses than there are


class DequantizeConstants(NamedTuple):
    """The compile-time constants of this kernel alone."""

    bits: int  # of a code
    table_row: str  # Triton's name of the type of a cell
    by_shifts: bool  # blocks come as binary logarithms
    is_transposed: bool  # the destination's rows are the source's columns
    is_stepped: bool  # elements of a destination's row are not adjacent


class Blocks(NamedTuple):
    """The arguments of a launch besides its geometry; columns count bytes of codes."""

    step: int  # between elements of a destination's row, in elements
    block_rows: int  # or its binary logarithm, like the next
    block_columns: int
    start_row: int  # where in its first block a matrix begins
    start_column: int
    table_rows_stride: int  # cells in a row of them


def dequantize(
    dst: Sequence[Tensor],
    codes: Sequence[Tensor],
    table_rows: Sequence[Tensor],
    table: Tensor,
    *,
    bits: int,
    block: tuple[int, int],
    start: tuple[int, int] = (0, 0),
) -> None:
    """``dst[k][r, c] = table[table_rows[k][(r + start[0]) // block[0], (c + start[1]) // block[1]], code[r, c]]``.

    One launch for each alignment of the addresses that occurs.

    Args:
        dst: ``[R, C]`` of the table's dtype, of one kind: shape, strides, device; any strides, so also transposed.
            Must overlap neither itself nor a source; nothing here checks it.
        codes: uint8 ``[R, C * bits // 8]``, of one kind, as many, at any address; elements of a row are adjacent, rows
            at any stride. Of 4 bits, the even column is the low nibble.
        table_rows: uint8 or int32, of one dtype, contiguous: for each block that the matrix reaches into, its row of
            ``table``. None may lie beyond the table; nothing here checks it.
        table: ``[T, 2**bits]``, contiguous, elements of 2 or 4 bytes, shared by all.
        bits: 8 or 4.
        block: rows and columns of a block; whole bytes of codes, so an even number of columns for 4 bits.
        start: where in its first block a matrix begins, rows and columns; whole bytes likewise.

    Numbers are written 16 bytes at a time where either the rows or the columns of ``dst`` have adjacent elements and
    start at multiples of 16 bytes, codes at multiples of 8 (for 2-byte numbers of 4 bits 4), and as many columns lie
    in one block, the sizes of 4-bit blocks being powers of two; otherwise one by one, every other column too. Blocks of
    powers of two, or as large as the matrix, cost less than others. Uploads one table of addresses; queued on the
    current stream, so the memory must live until that is done. Compiles one kernel for each combination of these and
    the dtypes, the first time.

    Raises:
        ConversionError: operands that do not fit together; nothing is written then.
        UnsupportedError: other bits, a table of elements of another size, or a device that kernels do not run on.
    """
    check_dequantize(dst, codes, table_rows, table, bits=bits, block=block, start=start)
    if not dst or not dst[0].numel():
        return
    is_transposed = is_stored_by_columns(dst[0])
    launches = dequantize_launches(
        _stepped([d.t() for d in dst] if is_transposed else dst),
        as_matrices("codes", codes),
        as_matrices("table_rows", table_rows),
        _same_table(table, len(dst)),
        bits=bits,
        block=block,
        start=start,
        is_transposed=is_transposed,
        step=dst[0].stride(0 if is_transposed else 1),
    )
    start_launches(launches)


def _same_table(table: Tensor, count: int) -> Matrices:
    """One table for each of ``count`` matrices."""
    addresses = np.full(count, table.data_ptr())
    return at_addresses(addresses, (table.shape[0], table.shape[1]), table.shape[1], table.dtype, table.device)


def _stepped(tensors: Sequence[Tensor]) -> Matrices:
    """Matrices of which elements of a row may be apart."""
    columns = as_matrices("dst", [tensor[:, :1] for tensor in tensors])
    return columns._replace(columns=tensors[0].shape[1])


def dequantize_launches(
    dst: Matrices,
    codes: Matrices,
    table_rows: Matrices,
    tables: Matrices,
    *,
    bits: int,
    block: tuple[int, int],
    start: tuple[int, int],
    is_transposed: bool = False,
    step: int = 1,
) -> Launches:
    """What ``dequantize`` launches.

    Args:
        dst: ``[R, C]``, or ``[C, R]`` if ``is_transposed``.
        table_rows: as wide as cells are from one row of blocks to the next.
        tables: one for each matrix.
        step: between elements of a row of ``dst``.
    """
    per_byte = 8 // bits
    blocks = Blocks(step, block[0], block[1] // per_byte, start[0], start[1] // per_byte, table_rows.columns)
    blocks, by_shifts = _by_shifts(blocks, codes.rows, codes.columns)
    in_one_block = alignment(np.array([block[1] | start[1]])).item() if table_rows.columns > 1 else MAX_ACCESS_BYTES
    geometry = Geometry(codes.rows, codes.columns, codes.row_stride, dst.row_stride, blocks)
    decoding = DequantizeConstants(
        bits, str(table_rows.dtype).removeprefix("torch."), by_shifts, is_transposed, step != 1
    )

    def choose(dst_alignment: int, src_alignment: int) -> tuple[Variant, Geometry]:
        return dequantize_variant(dst.dtype, decoding, dst_alignment, src_alignment, in_one_block), geometry

    return launches_by_alignment((dst, codes), 1, choose, (table_rows, tables))


def _by_shifts(blocks: Blocks, rows: int, nbytes: int) -> tuple[Blocks, bool]:
    """Blocks with binary logarithms of their sizes, if they have such; those larger than the matrix are as good as any
    that is.
    """
    sizes = []
    for block, begin, size in (
        (blocks.block_rows, blocks.start_row, rows),
        (blocks.block_columns, blocks.start_column, nbytes),
    ):
        sizes.append(1 << (begin + size).bit_length() if block >= begin + size else block)
    if any(size & (size - 1) for size in sizes):
        return blocks, False
    block_rows, block_columns = (size.bit_length() - 1 for size in sizes)
    return blocks._replace(block_rows=block_rows, block_columns=block_columns), True


def dequantize_variant(
    dst: torch.dtype, decoding: DequantizeConstants, dst_alignment: int, src_alignment: int, in_one_block: int
) -> Variant:
    """Vectors of 16 bytes of numbers, or single ones; of codes as many as make one.

    Args:
        in_one_block: so many columns always lie in one block.
    """
    vector = MAX_ACCESS_BYTES // dst.itemsize
    src_vector = vector * decoding.bits // 8
    tile = _TRANSPOSED_TILE if decoding.is_transposed else _TILE
    # To divide for every cell of so few bytes would leave the memory waiting.
    divides = decoding.bits == 4 and not decoding.by_shifts
    if (
        decoding.is_stepped
        or divides
        or dst_alignment < MAX_ACCESS_BYTES
        or src_alignment < src_vector
        or in_one_block < vector
    ):
        vector, src_vector, tile = 1, 1, _SCALAR_TILE
    columns = tile[1] * decoding.bits // 8
    number = word(dst.itemsize)
    return Variant(DEQUANTIZE_TILES, "uint8", number, src_vector, vector, tile[0], columns, details=decoding)


@jit(do_not_specialize=[*RUNTIME, *Blocks._fields])
def dequantize_tiles(
    table,
    rows_v,
    columns_v,
    src_stride_v,
    dst_stride_v,
    step,
    block_rows,
    block_columns,
    start_row,
    start_column,
    table_rows_stride,
    DST: tl.constexpr,
    TABLE_ROW: tl.constexpr,
    SRC_VECTOR: tl.constexpr,
    DST_VECTOR: tl.constexpr,
    BITS: tl.constexpr,
    BY_SHIFTS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    STEPPED: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
):
    """``dst[r, c] = numbers[table_rows[block of (r, c)], code(r, c)]``; table ``[dst, codes, table_rows, numbers]``.

    Columns, and what blocks have of them, count bytes of codes; columns and the source's stride come in ``SRC_VECTOR``
    bytes, which lie in one block; the destination's stride in ``DST_VECTOR`` elements, and rows too if ``TRANSPOSED``:
    then it is ``dst[c, r]``. ``STEPPED``: elements of a destination's row are
    ``step`` apart, and are stored one by one.

    What is masked out looks up an entry that is there, the first one.

    The tile is a line, row after row. In two dimensions the layout of a lookup, whose addresses say nothing of what is
    contiguous, is left to the compiler, and Triton 3.6.0 chooses columns: then all that a thread holds goes through
    shared memory, several times.
    """
    PER_BYTE: tl.constexpr = 8 // BITS
    rows = rows_v * (DST_VECTOR if TRANSPOSED else 1)
    columns = columns_v * SRC_VECTOR
    src_stride = src_stride_v * SRC_VECTOR
    dst_stride = dst_stride_v * DST_VECTOR
    entry = table + tl.program_id(1) * 4
    r0, b0 = grouped_tile(rows, columns, TILE_ROWS, TILE_COLUMNS)
    WIDTH: tl.constexpr = PER_BYTE * TILE_COLUMNS
    # Numbers that are stored one by one are decoded one by one: each of them reads the byte that it lies in.
    READERS: tl.constexpr = PER_BYTE if SRC_VECTOR == 1 else 1
    READS: tl.constexpr = READERS * TILE_COLUMNS  # in a row of the tile
    at = tl.arange(0, TILE_ROWS * READS)
    r, b = at // READS, at % READS // READERS
    mask = (r < rows - r0) & (b < columns - b0)
    codes = pointer_to(tl.load(entry + 1), tl.uint8, SRC_VECTOR) + (r0.to(tl.int64) * src_stride + b0)
    codes = tl.load(codes + (r * src_stride + b), mask=mask, other=0).to(tl.int32)

    # One cell for each vector of codes.
    VECTORS: tl.constexpr = TILE_ROWS * READS // SRC_VECTOR
    at = tl.arange(0, VECTORS) * SRC_VECTOR
    r, b = at // READS, at % READS // READERS
    row = r + (r0 + start_row)
    byte = b + (b0 + start_column)
    if BY_SHIFTS:
        table_row = (row >> block_rows) * table_rows_stride + (byte >> block_columns)
    else:
        # Nothing is negative, and unsigned division takes fewer instructions.
        row, byte = row.to(tl.uint32) // block_rows.to(tl.uint32), byte.to(tl.uint32) // block_columns.to(tl.uint32)
        table_row = row.to(tl.int32) * table_rows_stride + byte.to(tl.int32)
    table_rows = pointer_to(tl.load(entry + 2), TABLE_ROW, 1)
    table_row = tl.load(table_rows + table_row, mask=(r < rows - r0) & (b < columns - b0), other=0)
    # A pointer for each vector is cheaper than a sum for each code.
    numbers = pointer_to(tl.load(entry + 3), DST, 1) + (table_row.to(tl.int32) << BITS)
    numbers = tl.reshape(tl.broadcast_to(numbers[:, None], [VECTORS, SRC_VECTOR]), [TILE_ROWS * READS])
    if BITS == 8:
        x = tl.load(numbers + codes)
    elif SRC_VECTOR == 1:
        x = tl.load(numbers + ((codes >> (at % 2 * 4)) & 15))
    else:
        x = tl.join(tl.load(numbers + (codes & 15)), tl.load(numbers + (codes >> 4)))
        x = tl.reshape(x, [TILE_ROWS * WIDTH])

    c0 = b0 * PER_BYTE
    at = tl.arange(0, TILE_ROWS * WIDTH)
    across_step = step if STEPPED else 1
    dst = pointer_to(tl.load(entry), DST, DST_VECTOR)
    if TRANSPOSED:
        c, r = at // TILE_ROWS, at % TILE_ROWS
        x = tl.reshape(tl.trans(tl.reshape(x, [TILE_ROWS, WIDTH])), [TILE_ROWS * WIDTH])
        dst += c0.to(tl.int64) * dst_stride + r0.to(tl.int64) * across_step
        offsets = c * dst_stride + r * across_step
    else:
        r, c = at // WIDTH, at % WIDTH
        dst += r0.to(tl.int64) * dst_stride + c0.to(tl.int64) * across_step
        offsets = r * dst_stride + c * across_step
    tl.store(dst + offsets, x, mask=(r < rows - r0) & (c < columns * PER_BYTE - c0))


def _constants(variant: Variant) -> dict[str, Any]:
    decoding: DequantizeConstants = variant.details
    return {
        "DST": getattr(tl, variant.dst),
        "TABLE_ROW": getattr(tl, decoding.table_row),
        "SRC_VECTOR": variant.src_vector,
        "DST_VECTOR": variant.dst_vector,
        "BITS": decoding.bits,
        "BY_SHIFTS": decoding.by_shifts,
        "TRANSPOSED": decoding.is_transposed,
        "STEPPED": decoding.is_stepped,
        "TILE_ROWS": variant.tile_rows,
        "TILE_COLUMNS": variant.tile_columns,
    }


def _in_vectors(variant: Variant, geometry: Geometry) -> tuple[int, ...]:
    rows, columns, src_stride, dst_stride, blocks = geometry
    if variant.details.is_transposed:
        rows //= variant.dst_vector
    read, written = variant.src_vector, variant.dst_vector
    return rows, columns // read, src_stride // read, dst_stride // written, *blocks


def _reach(variant: Variant, geometry: Geometry) -> Reach:
    decoding: DequantizeConstants = variant.details
    blocks: Blocks = geometry.details
    rows, numbers = variant.tile_rows, variant.tile_columns * 8 // decoding.bits
    lines, run = (numbers, rows) if decoding.is_transposed else (rows, numbers)
    return Reach(lines, run * blocks.step, blocks.start_row, blocks.start_column)


DEQUANTIZE_TILES = Kernel(
    "dequantize_tiles",
    dequantize_tiles,
    destinations=1,
    operands=4,
    constants=_constants,
    in_vectors=_in_vectors,
    reach=_reach,
    integers=4 + len(Blocks._fields),
)
