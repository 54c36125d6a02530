"""Dequantization: codes of 8 or 4 bits become values by lookups in the tables of ``code_tables``.

Shapes: codes of ``[R, C]`` elements (two nibbles to a byte, the even column in the low nibble), a table row for each
block of codes, and values ``[R, C]``, which may be stored transposed. Nothing is computed here, so every device writes
the same bytes.
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

# Rows and columns of a tile: 32 values for each thread of a block. A transposed tile writes runs of 64 bytes of 2-byte
# values. Twice as many values spill registers in some variants. Other shapes of the same size do not, and are among the
# candidates of benchmarks/gpu.
_TILE = (16, 256)
_TRANSPOSED_TILE = (32, 128)
_SCALAR_TILE = (16, 32)  # a larger one needs more registers for addresses than a thread has


class DequantizeConstants(NamedTuple):
    """The compile-time constants that only this kernel has."""

    bits: int  # bits per code
    table_row: str  # Triton's name for the type of a table row
    by_shifts: bool  # sizes of blocks are passed as binary logarithms
    is_transposed: bool  # the destination's rows are the source's columns
    is_stepped: bool  # elements of a destination's row are not adjacent


class Blocks(NamedTuple):
    """The arguments of a launch besides its geometry."""

    step: int  # step between elements of a destination's row, in elements
    block_rows: int  # rows of a block, or their binary logarithm
    block_columns: int  # columns of a block, or their binary logarithm
    start_row: int  # row of its first block at which a matrix starts
    start_column: int  # column of its first block at which a matrix starts
    table_rows_stride: int  # step between rows of ``table_rows``, in elements


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
    """Decode matrices of codes by lookups in a table.

    For each ``k``, with the code of row ``r`` and column ``c``:
    ``dst[k][r, c] = table[table_rows[k][(r + start[0]) // block[0], (c + start[1]) // block[1]], code]``. Queues one
    launch on the current stream for each alignment that occurs among the addresses.

    Args:
        dst: destinations ``[R, C]`` of the table's dtype, all of one shape and device and with the same strides. Any
            strides are supported, including transposed ones. Destinations may overlap neither themselves nor a source.
            This is not checked.
        codes: uint8 ``[R, C * bits // 8]``, one for each destination, all of one shape and row stride, at any address.
            Elements of a row are adjacent. With 4 bits, the even column is in the low nibble.
        table_rows: uint8 or int32, contiguous, one for each destination, all of one dtype: the row of ``table`` for
            each block that the matrix extends over. No row may be beyond the table. This is not checked.
        table: ``[T, 2**bits]``, contiguous, with elements of 2 or 4 bytes. All matrices share it.
        bits: bits per code, 8 or 4.
        block: rows and columns of a block.
        start: row and column of its first block at which a matrix starts.

    Values are written 16 bytes at a time under four conditions, and otherwise one by one:

    - The elements of each row, or of each column, of ``dst`` are adjacent, and start at a multiple of 16 bytes.
    - Codes start at multiples of 8 bytes (4 for 2-byte values of 4-bit codes).
    - As many columns as fit into 16 bytes of values are always in one block.
    - For 4 bits, the sizes of blocks are powers of two.

    Blocks with sizes that are powers of two, or as large as the matrix, cost less than others.

    Uploads one table of addresses. The memory must live until the queued work is done. The first call for each
    combination of these conditions and the dtypes compiles a kernel.

    Raises:
        ConversionError: the operands do not fit together. Nothing has been written.
        UnsupportedError: other bits, a table with elements of another size, or a device that kernels do not run on.

    Example:
        Tensors on the CPU need Triton's interpreter (``TRITON_INTERPRET=1``).

        >>> from automodel_conv.kernels.code_tables import code_table
        >>> table, table_rows = code_table("int4", torch.tensor([[0.5, 2.0]]), torch.float32)
        >>> codes = torch.tensor([[0x98, 0xBA]], dtype=torch.uint8)  # 8, 9 under 0.5, then 10, 11 under 2
        >>> values = torch.empty(1, 4)
        >>> dequantize([values], [codes], [table_rows], table, bits=4, block=(1, 2))
        >>> values
        tensor([[0.0000, 0.5000, 4.0000, 6.0000]])
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
    """Return the table as the operand of each of ``count`` matrices."""
    addresses = np.full(count, table.data_ptr())
    return at_addresses(addresses, (table.shape[0], table.shape[1]), table.shape[1], table.dtype, table.device)


def _stepped(tensors: Sequence[Tensor]) -> Matrices:
    """Return matrices of tensors; elements of a row need not be adjacent."""
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
    """Return the launches of ``dequantize``, which has the other arguments.

    Args:
        dst: ``[R, C]``, or ``[C, R]`` if ``is_transposed``.
        table_rows: matrices with as many columns as the step from one row of the grid to the next.
        tables: one table for each matrix.
        is_transposed: rows of ``dst`` are columns of the codes.
        step: step between elements of a row of ``dst``, in elements.
    """
    blocks = Blocks(step, *block, *start, table_rows.columns)
    blocks, by_shifts = _by_shifts(blocks, codes.rows, codes.columns * 8 // bits)
    in_one_block = alignment(np.array([block[1] | start[1]])).item() if table_rows.columns > 1 else MAX_ACCESS_BYTES
    geometry = Geometry(codes.rows, codes.columns, codes.row_stride, dst.row_stride, blocks)
    constants = DequantizeConstants(
        bits, str(table_rows.dtype).removeprefix("torch."), by_shifts, is_transposed, step != 1
    )

    def choose(dst_alignment: int, src_alignment: int) -> tuple[Variant, Geometry]:
        return dequantize_variant(dst.dtype, constants, dst_alignment, src_alignment, in_one_block), geometry

    return launches_by_alignment((dst, codes), 1, choose, (table_rows, tables))


def _by_shifts(blocks: Blocks, rows: int, columns: int) -> tuple[Blocks, bool]:
    """Replace the sizes of blocks by their binary logarithms if all are powers of two; return whether they are.

    A block that is larger than the matrix counts as any larger power of two.
    """
    sizes = []
    for block, start, size in (
        (blocks.block_rows, blocks.start_row, rows),
        (blocks.block_columns, blocks.start_column, columns),
    ):
        sizes.append(1 << (start + size).bit_length() if block >= start + size else block)
    if any(size & (size - 1) for size in sizes):
        return blocks, False
    block_rows, block_columns = (size.bit_length() - 1 for size in sizes)
    return blocks._replace(block_rows=block_rows, block_columns=block_columns), True


def dequantize_variant(
    dst: torch.dtype, constants: DequantizeConstants, dst_alignment: int, src_alignment: int, in_one_block: int
) -> Variant:
    """Return the variant: values in vectors of 16 bytes, with as many codes, or else one by one.

    Args:
        in_one_block: number of columns that are always in one block.
    """
    vector = MAX_ACCESS_BYTES // dst.itemsize
    src_vector = vector * constants.bits // 8
    tile = _TRANSPOSED_TILE if constants.is_transposed else _TILE
    # A vector of 4-bit codes has so few bytes that a division for each would take longer than the memory accesses.
    divides = constants.bits == 4 and not constants.by_shifts
    if (
        constants.is_stepped
        or divides
        or dst_alignment < MAX_ACCESS_BYTES
        or src_alignment < src_vector
        or in_one_block < vector
    ):
        vector, src_vector, tile = 1, 1, _SCALAR_TILE
    columns = tile[1] * constants.bits // 8
    value = word(dst.itemsize)
    return Variant(DEQUANTIZE_TILES, "uint8", value, src_vector, vector, tile[0], columns, details=constants)


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
    """Compute ``dst[r, c] = values[table_rows[block of (r, c)], code(r, c)]``.

    A row of the table is ``[dst, codes, table_rows, values]``. Columns of blocks count codes. ``columns_v`` and the
    source's stride count vectors of ``SRC_VECTOR`` bytes, each in one block unless it is one byte. The destination's
    stride counts vectors of ``DST_VECTOR`` elements. With ``TRANSPOSED``, ``rows_v`` counts these too and the result is
    ``dst[c, r]``. With ``STEPPED``, elements of a destination's row are ``step`` apart and are stored one by one.

    Elements that are masked out look up the first entry, which always exists.

    The tile is one line, row after row. The addresses of a lookup do not show what is contiguous, so with two
    dimensions the compiler would choose the layout, and Triton 3.6.0 chooses columns. Then all values of a thread would
    pass through shared memory several times.
    """
    PER_BYTE: tl.constexpr = 8 // BITS
    rows = rows_v * (DST_VECTOR if TRANSPOSED else 1)
    columns = columns_v * SRC_VECTOR
    src_stride = src_stride_v * SRC_VECTOR
    dst_stride = dst_stride_v * DST_VECTOR
    entry = table + tl.program_id(1) * 4
    r0, b0 = grouped_tile(rows, columns, TILE_ROWS, TILE_COLUMNS)
    WIDTH: tl.constexpr = PER_BYTE * TILE_COLUMNS
    # Values that are stored one by one are decoded one by one: each reads the byte that holds its code.
    READERS: tl.constexpr = PER_BYTE if SRC_VECTOR == 1 else 1
    READS: tl.constexpr = READERS * TILE_COLUMNS  # in a row of the tile
    flat = tl.arange(0, TILE_ROWS * READS)
    r, b = flat // READS, flat % READS // READERS
    mask = (r < rows - r0) & (b < columns - b0)
    codes = pointer_to(tl.load(entry + 1), tl.uint8, SRC_VECTOR) + (r0.to(tl.int64) * src_stride + b0)
    codes = tl.load(codes + (r * src_stride + b), mask=mask, other=0).to(tl.int32)

    # One table row for each vector of codes, or for each code if they are decoded one by one.
    VECTORS: tl.constexpr = TILE_ROWS * READS // SRC_VECTOR
    flat = tl.arange(0, VECTORS) * SRC_VECTOR
    r, b = flat // READS, flat % READS // READERS
    row = r + (r0 + start_row)
    column = (b + b0) * PER_BYTE + start_column
    if READERS > 1:
        column += flat % READERS
    if BY_SHIFTS:
        table_row = (row >> block_rows) * table_rows_stride + (column >> block_columns)
    else:
        # No operand is negative, and unsigned division needs fewer instructions.
        row, column = row.to(tl.uint32) // block_rows.to(tl.uint32), column.to(tl.uint32) // block_columns.to(tl.uint32)
        table_row = row.to(tl.int32) * table_rows_stride + column.to(tl.int32)
    table_rows = pointer_to(tl.load(entry + 2), TABLE_ROW, 1)
    table_row = tl.load(table_rows + table_row, mask=(r < rows - r0) & (b < columns - b0), other=0)
    # A pointer for each vector is cheaper than a sum for each code.
    values = pointer_to(tl.load(entry + 3), DST, 1) + (table_row.to(tl.int32) << BITS)
    values = tl.reshape(tl.broadcast_to(values[:, None], [VECTORS, SRC_VECTOR]), [TILE_ROWS * READS])
    if BITS == 8:
        x = tl.load(values + codes)
    elif SRC_VECTOR == 1:
        x = tl.load(values + ((codes >> (flat % 2 * 4)) & 15))
    else:
        x = tl.join(tl.load(values + (codes & 15)), tl.load(values + (codes >> 4)))
        x = tl.reshape(x, [TILE_ROWS * WIDTH])

    c0 = b0 * PER_BYTE
    flat = tl.arange(0, TILE_ROWS * WIDTH)
    dst_step = step if STEPPED else 1
    dst = pointer_to(tl.load(entry), DST, DST_VECTOR)
    if TRANSPOSED:
        c, r = flat // TILE_ROWS, flat % TILE_ROWS
        x = tl.reshape(tl.trans(tl.reshape(x, [TILE_ROWS, WIDTH])), [TILE_ROWS * WIDTH])
        dst += c0.to(tl.int64) * dst_stride + r0.to(tl.int64) * dst_step
        offsets = c * dst_stride + r * dst_step
    else:
        r, c = flat // WIDTH, flat % WIDTH
        dst += r0.to(tl.int64) * dst_stride + c0.to(tl.int64) * dst_step
        offsets = r * dst_stride + c * dst_step
    tl.store(dst + offsets, x, mask=(r < rows - r0) & (c < columns * PER_BYTE - c0))


def _constants(variant: Variant) -> dict[str, Any]:
    details: DequantizeConstants = variant.details
    return {
        "DST": getattr(tl, variant.dst),
        "TABLE_ROW": getattr(tl, details.table_row),
        "SRC_VECTOR": variant.src_vector,
        "DST_VECTOR": variant.dst_vector,
        "BITS": details.bits,
        "BY_SHIFTS": details.by_shifts,
        "TRANSPOSED": details.is_transposed,
        "STEPPED": details.is_stepped,
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
    details: DequantizeConstants = variant.details
    blocks: Blocks = geometry.details
    rows, values = variant.tile_rows, variant.tile_columns * 8 // details.bits
    lines, run = (values, rows) if details.is_transposed else (rows, values)
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
