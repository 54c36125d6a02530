"""Kernels with one fault each, to test that the checks of machine code detect it.

Run as a module, this file prints the problems of each: ``python -m tests.machine_code.planted``.
"""

from __future__ import annotations

import json

import triton
import triton.language as tl

from automodel_conv.kernels.dequantize import DEQUANTIZE_TILES, DequantizeConstants
from automodel_conv.kernels.strided_copy import COPY_TILES
from automodel_conv.kernels.variants import Variant
from tests.machine_code.compiled import compiled, problems, read

VARIANT = Variant(COPY_TILES, "uint32", "uint32", 4, 4, 4, 512)
ROWS = Variant(
    DEQUANTIZE_TILES, "uint8", "uint16", 8, 8, 32, 128, details=DequantizeConstants(8, "int32", True, False, False)
)
TRANSPOSED = ROWS._replace(details=DequantizeConstants(8, "int32", True, is_transposed=True, is_stepped=False))


@triton.jit
def copy_with_a_hint_before_the_cast(
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
    entry = table + tl.program_id(1) * 2
    r = tl.arange(0, TILE_ROWS)[:, None]
    c = tl.arange(0, TILE_COLUMNS)[None, :]
    mask = (r < rows) & (c < columns_v * VECTOR)
    src = tl.multiple_of(tl.load(entry + 1), 16).to(tl.pointer_type(SRC))
    dst = tl.multiple_of(tl.load(entry).to(tl.pointer_type(DST)), 16)
    x = tl.load(src + r * (src_stride_v * VECTOR) + c, mask=mask)
    tl.store(dst + r * (dst_stride_v * VECTOR) + c, x, mask=mask)


@triton.jit
def copy_with_undivided_stores(
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
    entry = table + tl.program_id(1) * 2
    r = tl.arange(0, TILE_ROWS)[:, None]
    c = tl.arange(0, TILE_COLUMNS)[None, :]
    mask = (r < rows) & (c < columns_v * VECTOR)
    src = tl.multiple_of(tl.load(entry + 1).to(tl.pointer_type(SRC)), 16)
    dst = tl.multiple_of(tl.load(entry).to(tl.pointer_type(DST)), 16)
    x = tl.load(src + r * (src_stride_v * VECTOR) + c, mask=mask)
    tl.store(dst + r * dst_stride_v + c, x, mask=mask)


@triton.jit
def copy_with_a_sum(
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
    entry = table + tl.program_id(1) * 2
    r = tl.arange(0, TILE_ROWS)[:, None]
    c = tl.arange(0, TILE_COLUMNS)[None, :]
    mask = (r < rows) & (c < columns_v * VECTOR)
    src = tl.multiple_of(tl.load(entry + 1).to(tl.pointer_type(SRC)), 16)
    dst = tl.multiple_of(tl.load(entry).to(tl.pointer_type(DST)), 16)
    x = tl.load(src + r * (src_stride_v * VECTOR) + c, mask=mask, other=0)
    sums = tl.sum(x.to(tl.float32), 1, keep_dims=True).to(SRC)  # for integers this is one instruction on new GPUs
    tl.store(dst + r * (dst_stride_v * VECTOR) + c, x + sums, mask=mask)


def main() -> None:
    copying, decoding = COPY_TILES.function, DEQUANTIZE_TILES.function
    values = COPY_TILES.constants(VARIANT)
    # A register limit forces ptxas to spill. A much larger tile gives it enough values to keep.
    crowded = VARIANT._replace(tile_rows=64)
    planted = {
        "none": (VARIANT, compiled(copying, values, 90)),
        "lost hint": (VARIANT, compiled(copy_with_a_hint_before_the_cast, values, 90)),
        "narrow store": (VARIANT, compiled(copy_with_undivided_stores, values, 90)),
        "spill": (crowded, compiled(copying, COPY_TILES.constants(crowded), 90, maxnreg=24)),
        # Each is the other one, which loads and stores as much and as widely.
        "exchange": (ROWS, compiled(decoding, DEQUANTIZE_TILES.constants(TRANSPOSED), 90)),
        "no exchange": (TRANSPOSED, compiled(decoding, DEQUANTIZE_TILES.constants(ROWS), 90)),
        "shuffles": (VARIANT, compiled(copy_with_a_sum, values, 90)),
    }
    codes = read([binary for _, binary in planted.values()], 90)
    errors = {
        fault: problems(variant, code) for (fault, (variant, _)), code in zip(planted.items(), codes, strict=True)
    }
    print(json.dumps(errors, indent=1))


if __name__ == "__main__":
    main()
