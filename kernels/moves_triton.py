"""The kernels that move matrices, in Triton; import this only where Triton is installed.

Every kernel takes an int64 table of absolute byte addresses, one row per matrix (or pair of matrices), destinations
first, and runs on a grid of (tiles of one matrix, rows of the table). ``rows`` and ``columns`` are the source's.

Whether memory is accessed 16 bytes at a time is promised here and nowhere else, and easily lost without a trace:
- Lengths and strides (``*_v``) come divided by a vector length that is a compile-time constant and are multiplied back,
  which is how the compiler learns what divides them. None is specialized on its value: one compilation per ``Variant``.
- ``tl.multiple_of`` is said of the pointer, after the cast from an integer, which forgets what divided the integer.

There are no loops with runtime bounds and no inline assembly, so that Triton's interpreter runs the same kernels.
"""

# Compile-time arguments are declared tl.constexpr and used as the values they hold, which no type checker follows.
# pyright: reportAttributeAccessIssue=false, reportAssignmentType=false, reportArgumentType=false
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from automodel_conv.kernels.variants import NUM_WARPS, Variant

_RUNTIME = ["table", "rows", "rows_v", "columns_v", "src_stride_v", "dst_stride_v"]
_BLOCKS = ["step", "block_rows", "block_columns", "start_row", "start_column", "across"]
# Neighbouring programs take this many tiles along the rows before the next columns, so that what they read together and
# what they write together, transposed, are both longer runs than one tile has.
_GROUP = tl.constexpr(8)


@triton.jit
def _bf16_by_integers(x):
    """float32 to bfloat16, to nearest even. The interpreter's own cast truncates."""
    bits = x.to(tl.uint32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return tl.where(x == x, rounded, 0x7FC0).to(tl.uint16).to(tl.bfloat16, bitcast=True)


INTERPRETED = not isinstance(_bf16_by_integers, triton.JITFunction)
"""Whether Triton was imported with its interpreter on, which runs kernels on host memory."""

_ROUND_BY_INTEGERS = tl.constexpr(INTERPRETED)


@triton.jit
def _cast(x, DST: tl.constexpr):
    if x.dtype == DST:
        return x
    else:
        if x.dtype == tl.bfloat16:
            # Exact, and in the interpreter too, whose own cast loses subnormal numbers.
            wide = (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
        else:
            wide = x.to(tl.float32)
        if DST == tl.bfloat16 and _ROUND_BY_INTEGERS:
            return _bf16_by_integers(wide)
        else:
            return wide.to(DST)


@triton.jit
def _pointer(address, T: tl.constexpr, VECTOR: tl.constexpr):
    return tl.multiple_of(address.to(tl.pointer_type(T)), VECTOR * (T.primitive_bitwidth // 8))


@triton.jit
def _load(address, base, offsets, mask, T: tl.constexpr, VECTOR: tl.constexpr, BYTEWISE: tl.constexpr):
    """Elements at ``base + offsets``, counted in elements: ``base`` in 64 bits, ``offsets`` in 32.

    ``BYTEWISE`` reads them from any address; a GPU faults on an element at no multiple of its size.
    """
    SIZE: tl.constexpr = T.primitive_bitwidth // 8
    if BYTEWISE:
        pointer = address.to(tl.pointer_type(tl.uint8)) + base * SIZE
        x = tl.load(pointer + offsets * SIZE, mask=mask, other=0).to(tl.uint32)
        for byte in tl.static_range(1, SIZE):
            x |= tl.load(pointer + (offsets * SIZE + byte), mask=mask, other=0).to(tl.uint32) << (8 * byte)
        WORD: tl.constexpr = tl.uint16 if SIZE == 2 else tl.uint32
        return x.to(WORD).to(T, bitcast=True)
    else:
        return tl.load(_pointer(address, T, VECTOR) + base + offsets, mask=mask)


@triton.jit
def _grouped_tile(rows, columns, TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr):
    """The first row and column of this program's tile; see ``_GROUP``."""
    program = tl.program_id(0)
    across = tl.cdiv(columns, TILE_COLUMNS)
    down = tl.cdiv(rows, TILE_ROWS)
    group = program // (_GROUP * across)
    height = tl.minimum(down - group * _GROUP, _GROUP)
    inside = program % (_GROUP * across)
    return (group * _GROUP + inside % height) * TILE_ROWS, (inside // height) * TILE_COLUMNS


@triton.jit(do_not_specialize=_RUNTIME)
def copy_tiles(
    table,
    rows,
    columns_v,
    src_stride_v,
    dst_stride_v,
    SRC: tl.constexpr,
    DST: tl.constexpr,
    VECTOR: tl.constexpr,
    BYTEWISE: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
):
    """``dst[r, c] = cast(src[r, c])``; table ``[dst, src]``; ``_v`` counts ``VECTOR`` elements, of either side."""
    columns = columns_v * VECTOR
    src_stride = src_stride_v * VECTOR
    dst_stride = dst_stride_v * VECTOR
    entry = table + tl.program_id(1) * 2
    across = tl.cdiv(columns, TILE_COLUMNS)
    r0 = (tl.program_id(0) // across) * TILE_ROWS
    c0 = (tl.program_id(0) % across) * TILE_COLUMNS
    r = tl.arange(0, TILE_ROWS)[:, None]
    c = tl.arange(0, TILE_COLUMNS)[None, :]
    mask = (r < rows - r0) & (c < columns - c0)
    src_base = r0.to(tl.int64) * src_stride + c0
    x = _load(tl.load(entry + 1), src_base, r * src_stride + c, mask, SRC, VECTOR, BYTEWISE)
    dst = _pointer(tl.load(entry), DST, VECTOR) + (r0.to(tl.int64) * dst_stride + c0)
    tl.store(dst + (r * dst_stride + c), _cast(x, DST), mask=mask)


@triton.jit(do_not_specialize=_RUNTIME)
def transpose_tiles(
    table,
    rows_v,
    columns_v,
    src_stride_v,
    dst_stride_v,
    SRC: tl.constexpr,
    DST: tl.constexpr,
    SRC_VECTOR: tl.constexpr,
    DST_VECTOR: tl.constexpr,
    BYTEWISE: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
):
    """``dst[c, r] = cast(src[r, c])``; table ``[dst, src]``; columns and the source's stride come in ``SRC_VECTOR``,
    rows and the destination's stride in ``DST_VECTOR``.
    """
    rows = rows_v * DST_VECTOR
    columns = columns_v * SRC_VECTOR
    src_stride = src_stride_v * SRC_VECTOR
    dst_stride = dst_stride_v * DST_VECTOR
    entry = table + tl.program_id(1) * 2
    r0, c0 = _grouped_tile(rows, columns, TILE_ROWS, TILE_COLUMNS)
    r = tl.arange(0, TILE_ROWS)
    c = tl.arange(0, TILE_COLUMNS)
    mask = (r[:, None] < rows - r0) & (c[None, :] < columns - c0)
    src_base = r0.to(tl.int64) * src_stride + c0
    x = _load(tl.load(entry + 1), src_base, r[:, None] * src_stride + c[None, :], mask, SRC, SRC_VECTOR, BYTEWISE)
    dst = _pointer(tl.load(entry), DST, DST_VECTOR) + (c0.to(tl.int64) * dst_stride + r0)
    mask = (c[:, None] < columns - c0) & (r[None, :] < rows - r0)
    tl.store(dst + (c[:, None] * dst_stride + r[None, :]), tl.trans(_cast(x, DST)), mask=mask)


@triton.jit(do_not_specialize=_RUNTIME)
def interleave_tiles(
    table,
    rows_v,
    columns_v,
    src_stride_v,
    dst_stride_v,
    SRC: tl.constexpr,
    DST: tl.constexpr,
    SRC_VECTOR: tl.constexpr,
    DST_VECTOR: tl.constexpr,
    PAIRS: tl.constexpr,
    BYTEWISE: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
):
    """``dst[c, 2 * r + k] = cast(src_k[r, c])`` for k = 0, 1; table ``[dst, src_0, src_1]``.

    ``PAIRS``: each two elements that end up side by side are packed into a word, and words are transposed; then
    ``DST_VECTOR`` and the destination's stride count words. Otherwise elements are stored one by one, and the stride
    counts elements.
    """
    rows = rows_v * DST_VECTOR
    columns = columns_v * SRC_VECTOR
    src_stride = src_stride_v * SRC_VECTOR
    dst_stride = dst_stride_v * DST_VECTOR
    entry = table + tl.program_id(1) * 3
    r0, c0 = _grouped_tile(rows, columns, TILE_ROWS, TILE_COLUMNS)
    r = tl.arange(0, TILE_ROWS)
    c = tl.arange(0, TILE_COLUMNS)
    mask = (r[:, None] < rows - r0) & (c[None, :] < columns - c0)
    base = r0.to(tl.int64) * src_stride + c0
    offsets = r[:, None] * src_stride + c[None, :]
    x = _cast(_load(tl.load(entry + 1), base, offsets, mask, SRC, SRC_VECTOR, BYTEWISE), DST)
    y = _cast(_load(tl.load(entry + 2), base, offsets, mask, SRC, SRC_VECTOR, BYTEWISE), DST)
    mask = (c[:, None] < columns - c0) & (r[None, :] < rows - r0)
    BITS: tl.constexpr = DST.primitive_bitwidth
    if PAIRS:
        HALF: tl.constexpr = tl.uint8 if BITS == 8 else tl.uint16 if BITS == 16 else tl.uint32
        WORD: tl.constexpr = tl.uint16 if BITS == 8 else tl.uint32 if BITS == 16 else tl.uint64
        pairs = x.to(HALF, bitcast=True).to(WORD) | (y.to(HALF, bitcast=True).to(WORD) << BITS)
        dst = _pointer(tl.load(entry), WORD, DST_VECTOR) + (c0.to(tl.int64) * dst_stride + r0)
        tl.store(dst + (c[:, None] * dst_stride + r[None, :]), tl.trans(pairs), mask=mask)
    else:
        dst = _pointer(tl.load(entry), DST, 1) + (c0.to(tl.int64) * dst_stride + 2 * r0.to(tl.int64))
        offsets = c[:, None] * dst_stride + 2 * r[None, :]
        tl.store(dst + offsets, tl.trans(x), mask=mask)
        tl.store(dst + (offsets + 1), tl.trans(y), mask=mask)


@triton.jit(do_not_specialize=_RUNTIME)
def deinterleave_tiles(
    table,
    rows_v,
    columns_v,
    src_stride_v,
    dst_stride_v,
    SRC: tl.constexpr,
    DST: tl.constexpr,
    SRC_VECTOR: tl.constexpr,
    DST_VECTOR: tl.constexpr,
    PAIRS: tl.constexpr,
    BYTEWISE: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
):
    """``dst_k[c, r] = cast(src[r, 2 * c + k])`` for k = 0, 1; table ``[dst_0, dst_1, src]``; columns count pairs.

    ``PAIRS``: pairs are read and transposed as words; then ``SRC_VECTOR`` and the source's stride count words.
    """
    rows = rows_v * DST_VECTOR
    columns = columns_v * SRC_VECTOR
    src_stride = src_stride_v * SRC_VECTOR
    dst_stride = dst_stride_v * DST_VECTOR
    entry = table + tl.program_id(1) * 3
    r0, c0 = _grouped_tile(rows, columns, TILE_ROWS, TILE_COLUMNS)
    r = tl.arange(0, TILE_ROWS)
    c = tl.arange(0, TILE_COLUMNS)
    mask = (r[:, None] < rows - r0) & (c[None, :] < columns - c0)
    BITS: tl.constexpr = SRC.primitive_bitwidth
    if PAIRS:
        HALF: tl.constexpr = tl.uint8 if BITS == 8 else tl.uint16 if BITS == 16 else tl.uint32
        WORD: tl.constexpr = tl.uint16 if BITS == 8 else tl.uint32 if BITS == 16 else tl.uint64
        base = r0.to(tl.int64) * src_stride + c0
        offsets = r[:, None] * src_stride + c[None, :]
        pairs = tl.trans(_load(tl.load(entry + 2), base, offsets, mask, WORD, SRC_VECTOR, BYTEWISE))
        x = pairs.to(HALF).to(SRC, bitcast=True)
        y = (pairs >> BITS).to(HALF).to(SRC, bitcast=True)
    else:
        base = r0.to(tl.int64) * src_stride + 2 * c0.to(tl.int64)
        offsets = r[:, None] * src_stride + 2 * c[None, :]
        x = tl.trans(_load(tl.load(entry + 2), base, offsets, mask, SRC, 1, BYTEWISE))
        y = tl.trans(_load(tl.load(entry + 2), base, offsets + 1, mask, SRC, 1, BYTEWISE))
    mask = (c[:, None] < columns - c0) & (r[None, :] < rows - r0)
    offsets = c[:, None] * dst_stride + r[None, :]
    dst_base = c0.to(tl.int64) * dst_stride + r0
    tl.store(_pointer(tl.load(entry), DST, DST_VECTOR) + dst_base + offsets, _cast(x, DST), mask=mask)
    tl.store(_pointer(tl.load(entry + 1), DST, DST_VECTOR) + dst_base + offsets, _cast(y, DST), mask=mask)


@triton.jit(do_not_specialize=[*_RUNTIME, *_BLOCKS])
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
    across,
    DST: tl.constexpr,
    CELL: tl.constexpr,
    SRC_VECTOR: tl.constexpr,
    DST_VECTOR: tl.constexpr,
    BITS: tl.constexpr,
    BY_SHIFTS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    STEPPED: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
):
    """``dst[r, c] = numbers[cells[block of (r, c)], code(r, c)]``; table ``[dst, codes, cells, numbers]``.

    Columns, and what blocks have of them, count bytes of codes; columns and the source's stride come in ``SRC_VECTOR``
    bytes, which lie in one block; the destination's stride in ``DST_VECTOR`` elements, and rows too if ``TRANSPOSED``:
    then it is ``dst[c, r]``. ``across``: cells in a row of them. ``STEPPED``: elements of a destination's row are
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
    r0, b0 = _grouped_tile(rows, columns, TILE_ROWS, TILE_COLUMNS)
    WIDTH: tl.constexpr = PER_BYTE * TILE_COLUMNS
    # Numbers that are stored one by one are decoded one by one: each of them reads the byte that it lies in.
    READERS: tl.constexpr = PER_BYTE if SRC_VECTOR == 1 else 1
    READS: tl.constexpr = READERS * TILE_COLUMNS  # in a row of the tile
    at = tl.arange(0, TILE_ROWS * READS)
    r, b = at // READS, at % READS // READERS
    mask = (r < rows - r0) & (b < columns - b0)
    codes = _pointer(tl.load(entry + 1), tl.uint8, SRC_VECTOR) + (r0.to(tl.int64) * src_stride + b0)
    codes = tl.load(codes + (r * src_stride + b), mask=mask, other=0).to(tl.int32)

    # One cell for each vector of codes.
    VECTORS: tl.constexpr = TILE_ROWS * READS // SRC_VECTOR
    at = tl.arange(0, VECTORS) * SRC_VECTOR
    r, b = at // READS, at % READS // READERS
    row = r + (r0 + start_row)
    byte = b + (b0 + start_column)
    if BY_SHIFTS:
        cell = (row >> block_rows) * across + (byte >> block_columns)
    else:
        # Nothing is negative, and unsigned division takes fewer instructions.
        row, byte = row.to(tl.uint32) // block_rows.to(tl.uint32), byte.to(tl.uint32) // block_columns.to(tl.uint32)
        cell = row.to(tl.int32) * across + byte.to(tl.int32)
    cells = _pointer(tl.load(entry + 2), CELL, 1)
    cell = tl.load(cells + cell, mask=(r < rows - r0) & (b < columns - b0), other=0)
    # A pointer for each vector is cheaper than a sum for each code.
    numbers = _pointer(tl.load(entry + 3), DST, 1) + (cell.to(tl.int32) << BITS)
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
    dst = _pointer(tl.load(entry), DST, DST_VECTOR)
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


KERNELS: dict[str, Any] = {
    "copy_tiles": copy_tiles,
    "transpose_tiles": transpose_tiles,
    "interleave_tiles": interleave_tiles,
    "deinterleave_tiles": deinterleave_tiles,
    "dequantize_tiles": dequantize_tiles,
}


def constants(variant: Variant) -> dict[str, Any]:
    """The compile-time arguments of a variant, by name."""
    if variant.decoding is not None:
        return {
            "DST": getattr(tl, variant.dst),
            "CELL": getattr(tl, variant.decoding.cell),
            "SRC_VECTOR": variant.src_vector,
            "DST_VECTOR": variant.dst_vector,
            "BITS": variant.decoding.bits,
            "BY_SHIFTS": variant.decoding.by_shifts,
            "TRANSPOSED": variant.decoding.is_transposed,
            "STEPPED": variant.decoding.is_stepped,
            "TILE_ROWS": variant.tile_rows,
            "TILE_COLUMNS": variant.tile_columns,
        }
    values: dict[str, Any] = {
        "SRC": getattr(tl, variant.src),
        "DST": getattr(tl, variant.dst),
        "TILE_ROWS": variant.tile_rows,
        "TILE_COLUMNS": variant.tile_columns,
        "BYTEWISE": variant.bytewise,
    }
    if variant.kernel == "copy_tiles":
        return values | {"VECTOR": variant.src_vector}
    values |= {"SRC_VECTOR": variant.src_vector, "DST_VECTOR": variant.dst_vector}
    return values if variant.kernel == "transpose_tiles" else values | {"PAIRS": variant.pairs}


OPTIONS: dict[str, Any] = {"num_warps": NUM_WARPS, "enable_fp_fusion": False}


def launch(variant: Variant, grid: tuple[int, int], table: Any, integers: tuple[int, ...]) -> None:
    """Queue one launch on the current stream."""
    KERNELS[variant.kernel][grid](table, *integers, **constants(variant), **OPTIONS)
