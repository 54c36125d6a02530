"""Other decoders, to be timed on a GPU in place of ``dequantize_tiles``; see ``benchmarks.gpu.candidates``.

They decode whole vectors only, and only blocks of powers of two, or as large as the matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import triton
import triton.language as tl

from automodel_conv.kernels.dequantize import Blocks
from automodel_conv.kernels.tiles import RUNTIME, cast, grouped_tile, pointer_to


@triton.jit
def _times(codes, scale, BITS: tl.constexpr):
    """Return the values of codes under a scale, as the bits of bfloat16: e4m3 of 8 bits, e2m1 of 4."""
    MANTISSA: tl.constexpr = 3 if BITS == 8 else 1
    BIAS: tl.constexpr = 7 if BITS == 8 else 1
    sign = codes >> (BITS - 1)
    magnitude = codes & ((1 << (BITS - 1)) - 1)
    # Exponent and mantissa at the positions of a float32. Its exponent is then too small; exact, also for subnormals.
    x = ((sign << 31) | (magnitude << (23 - MANTISSA))).to(tl.float32, bitcast=True) * 2.0 ** (127 - BIAS)
    if BITS == 8:
        x = tl.where(magnitude == 127, float("nan"), x)
    return cast(x * scale, tl.bfloat16).to(tl.uint16, bitcast=True)


@triton.jit(do_not_specialize=[*RUNTIME, *Blocks._fields])
def decode_lines(
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
    CACHE: tl.constexpr,
    EVICTION: tl.constexpr,
    ARITHMETIC: tl.constexpr,
):
    """Like ``dequantize_tiles``, with hints to the caches for codes, or with arithmetic instead of a table lookup.

    With ``ARITHMETIC`` the scale is the table's value for the code of one.
    """
    tl.static_assert(BY_SHIFTS and not STEPPED and SRC_VECTOR > 1)
    PER_BYTE: tl.constexpr = 8 // BITS
    WIDTH: tl.constexpr = PER_BYTE * TILE_COLUMNS
    N: tl.constexpr = TILE_ROWS * TILE_COLUMNS
    VECTORS: tl.constexpr = N // SRC_VECTOR
    rows = rows_v * (DST_VECTOR if TRANSPOSED else 1)
    columns = columns_v * SRC_VECTOR
    src_stride = src_stride_v * SRC_VECTOR
    dst_stride = dst_stride_v * DST_VECTOR
    entry = table + tl.program_id(1) * 4
    r0, b0 = grouped_tile(rows, columns, TILE_ROWS, TILE_COLUMNS)
    at = tl.arange(0, N)
    r, b = at // TILE_COLUMNS, at % TILE_COLUMNS
    mask = (r < rows - r0) & (b < columns - b0)
    codes = (
        pointer_to(tl.load(entry + 1), tl.uint8, SRC_VECTOR)
        + (r0.to(tl.int64) * src_stride + b0)
        + (r * src_stride + b)
    )
    codes = tl.load(codes, mask=mask, other=0, cache_modifier=CACHE, eviction_policy=EVICTION).to(tl.uint32)

    at = tl.arange(0, VECTORS) * SRC_VECTOR
    r, b = at // TILE_COLUMNS, at % TILE_COLUMNS
    table_row = ((r + (r0 + start_row)) >> block_rows) * table_rows_stride + (
        ((b + b0) * PER_BYTE + start_column) >> block_columns
    )
    table_rows = pointer_to(tl.load(entry + 2), TABLE_ROW, 1)
    table_row = tl.load(table_rows + table_row, mask=(r < rows - r0) & (b < columns - b0), other=0)
    numbers = pointer_to(tl.load(entry + 3), DST, 1) + (table_row.to(tl.int32) << BITS)
    if ARITHMETIC:
        scale = tl.load(numbers + (0x38 if BITS == 8 else 2))
        scale = (scale.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
        scale = tl.reshape(tl.broadcast_to(scale[:, None], [VECTORS, SRC_VECTOR]), [N])
        if BITS == 8:
            x = _times(codes, scale, BITS)
        else:
            x = tl.reshape(tl.join(_times(codes & 15, scale, BITS), _times(codes >> 4, scale, BITS)), [PER_BYTE * N])
    else:
        numbers = tl.reshape(tl.broadcast_to(numbers[:, None], [VECTORS, SRC_VECTOR]), [N])
        if BITS == 8:
            x = tl.load(numbers + codes)
        else:
            x = tl.reshape(tl.join(tl.load(numbers + (codes & 15)), tl.load(numbers + (codes >> 4))), [PER_BYTE * N])

    c0 = b0 * PER_BYTE
    at = tl.arange(0, PER_BYTE * N)
    dst = pointer_to(tl.load(entry), DST, DST_VECTOR)
    if TRANSPOSED:
        c, r = at // TILE_ROWS, at % TILE_ROWS
        x = tl.reshape(tl.trans(tl.reshape(x, [TILE_ROWS, WIDTH])), [PER_BYTE * N])
        dst += c0.to(tl.int64) * dst_stride + r0
        offsets = c * dst_stride + r
    else:
        r, c = at // WIDTH, at % WIDTH
        dst += r0.to(tl.int64) * dst_stride + c0
        offsets = r * dst_stride + c
    tl.store(dst + offsets, x, mask=(r < rows - r0) & (c < columns * PER_BYTE - c0))


@triton.jit(do_not_specialize=[*RUNTIME, *Blocks._fields])
def decode_rectangles(
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
    """Like ``dequantize_tiles``, in two dimensions, which Triton 3.6.0 lays out in columns, 3.9.0 in rows."""
    tl.static_assert(BY_SHIFTS and not STEPPED and SRC_VECTOR > 1)
    PER_BYTE: tl.constexpr = 8 // BITS
    VECTORS: tl.constexpr = TILE_COLUMNS // SRC_VECTOR
    rows = rows_v * (DST_VECTOR if TRANSPOSED else 1)
    columns = columns_v * SRC_VECTOR
    src_stride = src_stride_v * SRC_VECTOR
    dst_stride = dst_stride_v * DST_VECTOR
    entry = table + tl.program_id(1) * 4
    r0, b0 = grouped_tile(rows, columns, TILE_ROWS, TILE_COLUMNS)
    r = tl.arange(0, TILE_ROWS)[:, None]
    b = tl.arange(0, TILE_COLUMNS)[None, :]
    codes = pointer_to(tl.load(entry + 1), tl.uint8, SRC_VECTOR) + (r0.to(tl.int64) * src_stride + b0)
    mask = (r < rows - r0) & (b < columns - b0)
    codes = tl.load(codes + (r * src_stride + b), mask=mask, other=0).to(tl.int32)
    v = tl.arange(0, VECTORS)[None, :] * SRC_VECTOR
    table_row = ((r + (r0 + start_row)) >> block_rows) * table_rows_stride + (
        ((v + b0) * PER_BYTE + start_column) >> block_columns
    )
    table_rows = pointer_to(tl.load(entry + 2), TABLE_ROW, 1)
    first = tl.load(table_rows + table_row, mask=(r < rows - r0) & (v < columns - b0), other=0).to(tl.int32) << BITS
    first = tl.broadcast_to(first[:, :, None], [TILE_ROWS, VECTORS, SRC_VECTOR])
    first = tl.reshape(first, [TILE_ROWS, TILE_COLUMNS])
    numbers = pointer_to(tl.load(entry + 3), DST, 1)
    if BITS == 8:
        x = tl.load(numbers + (first + codes))
    else:
        x = tl.join(tl.load(numbers + (first + (codes & 15))), tl.load(numbers + (first + (codes >> 4))))
        x = tl.reshape(x, [TILE_ROWS, PER_BYTE * TILE_COLUMNS])
    c0 = b0 * PER_BYTE
    c = tl.arange(0, PER_BYTE * TILE_COLUMNS)
    r = tl.arange(0, TILE_ROWS)
    dst = pointer_to(tl.load(entry), DST, DST_VECTOR)
    if TRANSPOSED:
        mask = (c[:, None] < columns * PER_BYTE - c0) & (r[None, :] < rows - r0)
        dst += c0.to(tl.int64) * dst_stride + r0
        tl.store(dst + (c[:, None] * dst_stride + r[None, :]), tl.trans(x), mask=mask)
    else:
        mask = (r[:, None] < rows - r0) & (c[None, :] < columns * PER_BYTE - c0)
        dst += r0.to(tl.int64) * dst_stride + c0
        tl.store(dst + (r[:, None] * dst_stride + c[None, :]), x, mask=mask)


class Instead(NamedTuple):
    """A kernel in place of ``dequantize_tiles``, with its additional compile-time constants."""

    kernel: Any
    constants: Mapping[str, Any] = {}

    def __getitem__(self, grid: tuple[int, int]) -> Callable[..., Any]:
        return partial(self.kernel[grid], **self.constants)


_AS_IT_IS = {"CACHE": "", "EVICTION": "", "ARITHMETIC": False}
KERNELS = {
    "in two dimensions": Instead(decode_rectangles),
    "codes past L1": Instead(decode_lines, _AS_IT_IS | {"CACHE": ".cg"}),
    "codes evicted first": Instead(decode_lines, _AS_IT_IS | {"EVICTION": "evict_first"}),
    "arithmetic": Instead(decode_lines, _AS_IT_IS | {"ARITHMETIC": True}),
}
