"""What kernels are made of: functions that read, cast and address elements, and the order of tiles.

Every kernel takes an int64 table of absolute byte addresses, one row per matrix (or pair of matrices), destinations
first, and runs on a grid of (tiles of one matrix, rows of the table). ``rows`` and ``columns`` are the source's.

Only the code here promises that memory is accessed 16 bytes at a time, and a change can lose that without a trace:
- Lengths and strides (``*_v``) come divided by a vector length that is a compile-time constant and are multiplied back,
  which is how the compiler learns what divides them. None is specialized on its value: one compilation per ``Variant``.
- ``tl.multiple_of`` is said of the pointer, after the cast from an integer, which forgets what divided the integer.

There are no loops with runtime bounds and no inline assembly, so that Triton's interpreter runs the same kernels.
"""

from __future__ import annotations

from typing import Any

from automodel_conv.kernels.jit import INTERPRETED, jit, tl
from automodel_conv.kernels.variants import Variant

RUNTIME = ["table", "rows", "rows_v", "columns_v", "src_stride_v", "dst_stride_v"]
"""The arguments that every kernel is told at each launch; it has either of the rows."""

# Rows and columns of a tile whose elements move one by one, transposed: larger ones need more registers for addresses
# than there are.
SCALAR_TILE = (32, 32)

# Neighbouring programs take this many tiles along the rows before the next columns, so that what they read together and
# what they write together, transposed, are both longer runs than one tile has.
_GROUP = tl.constexpr(8)  # pyright: ignore[reportCallIssue]


@jit
def _bf16_by_integers(x):
    """float32 to bfloat16, to nearest even. The interpreter's own cast truncates."""
    bits = x.to(tl.uint32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return tl.where(x == x, rounded, 0x7FC0).to(tl.uint16).to(tl.bfloat16, bitcast=True)


_ROUND_BY_INTEGERS = tl.constexpr(INTERPRETED)  # pyright: ignore[reportCallIssue]


@jit
def cast(x, DST: tl.constexpr):
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


@jit
def pointer_to(address, T: tl.constexpr, VECTOR: tl.constexpr):
    return tl.multiple_of(address.to(tl.pointer_type(T)), VECTOR * (T.primitive_bitwidth // 8))


@jit
def load(address, base, offsets, mask, T: tl.constexpr, VECTOR: tl.constexpr, BYTEWISE: tl.constexpr):
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
        return tl.load(pointer_to(address, T, VECTOR) + base + offsets, mask=mask)


@jit
def grouped_tile(rows, columns, TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr):
    """The first row and column of this program's tile; see ``_GROUP``."""
    program = tl.program_id(0)
    across = tl.cdiv(columns, TILE_COLUMNS)
    down = tl.cdiv(rows, TILE_ROWS)
    group = program // (_GROUP * across)
    height = tl.minimum(down - group * _GROUP, _GROUP)
    inside = program % (_GROUP * across)
    return (group * _GROUP + inside % height) * TILE_ROWS, (inside // height) * TILE_COLUMNS


def constants(variant: Variant, **others: Any) -> dict[str, Any]:
    """The compile-time arguments that kernels that move elements share, by name, with ``others`` added."""
    return {
        "SRC": getattr(tl, variant.src),
        "DST": getattr(tl, variant.dst),
        "TILE_ROWS": variant.tile_rows,
        "TILE_COLUMNS": variant.tile_columns,
        "BYTEWISE": variant.bytewise,
        **others,
    }
