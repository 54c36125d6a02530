"""Building blocks of kernels: functions that read, cast and address elements, and the order of tiles.

Every kernel accepts an int64 table of absolute byte addresses, one row for each matrix (or pair of matrices),
destinations first. Its grid is (tiles of one matrix, rows of the table). ``rows`` and ``columns`` are the source's.

Accesses of 16 bytes depend on the code in this file, and a change can lose them without an error:
- Lengths and strides (``*_v``) arrive divided by a vector length, a compile-time constant, and are multiplied by it
  again, so the compiler learns what divides them. None is specialized on its value, so a ``Variant`` is compiled
  once.
- ``tl.multiple_of`` is applied to the pointer, after the cast from an integer, because the cast drops the hint.

No loop has runtime bounds and there is no inline assembly, so Triton's interpreter runs the same kernels.
"""

from __future__ import annotations

from typing import Any

from automodel_conv.kernels.jit import INTERPRETED, jit, tl
from automodel_conv.kernels.variants import Variant

RUNTIME = ["table", "rows", "rows_v", "columns_v", "src_stride_v", "dst_stride_v"]
"""The runtime arguments that kernels share. A kernel has ``rows`` or ``rows_v``, not both."""

# Rows and columns of a tile whose elements move one by one, transposed. A larger tile needs more registers for
# addresses than a thread has.
SCALAR_TILE = (32, 32)

# Neighbouring programs process this many tiles along the rows before they move to the next columns. So the runs that
# they read together, and the transposed runs that they write together, are longer than the runs of one tile.
_GROUP = tl.constexpr(8)  # pyright: ignore[reportCallIssue]


@jit
def _bf16_by_integers(x):
    """Round float32 to bfloat16, to nearest even.

    The interpreter's own cast truncates.
    """
    bits = x.to(tl.uint32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return tl.where(x == x, rounded, 0x7FC0).to(tl.uint16).to(tl.bfloat16, bitcast=True)


_ROUND_BY_INTEGERS = tl.constexpr(INTERPRETED)  # pyright: ignore[reportCallIssue]


@jit
def cast(x, DST: tl.constexpr):
    """Convert elements to ``DST``, rounding to nearest even; equal types are returned as they are."""
    if x.dtype == DST:
        return x
    else:
        if x.dtype == tl.bfloat16:
            # Exact in the interpreter too, which loses subnormal numbers in its own cast.
            wide = (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
        else:
            wide = x.to(tl.float32)
        if DST == tl.bfloat16 and _ROUND_BY_INTEGERS:
            return _bf16_by_integers(wide)
        else:
            return wide.to(DST)


@jit
def pointer_to(address, T: tl.constexpr, VECTOR: tl.constexpr):
    """Return a pointer to elements of type ``T`` at an address that is a multiple of ``VECTOR`` elements."""
    return tl.multiple_of(address.to(tl.pointer_type(T)), VECTOR * (T.primitive_bitwidth // 8))


@jit
def load(address, base, offsets, mask, T: tl.constexpr, VECTOR: tl.constexpr, BYTEWISE: tl.constexpr):
    """Load the elements at ``base + offsets``, counted in elements; ``base`` has 64 bits, ``offsets`` 32.

    ``BYTEWISE`` reads them from any address; a GPU faults on an element that is not at a multiple of its size.
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
    """Return the first row and column of this program's tile; see ``_GROUP``."""
    program = tl.program_id(0)
    tiles_per_row = tl.cdiv(columns, TILE_COLUMNS)
    tiles_per_column = tl.cdiv(rows, TILE_ROWS)
    group = program // (_GROUP * tiles_per_row)
    height = tl.minimum(tiles_per_column - group * _GROUP, _GROUP)
    inside = program % (_GROUP * tiles_per_row)
    return (group * _GROUP + inside % height) * TILE_ROWS, (inside // height) * TILE_COLUMNS


def constants(variant: Variant, **others: Any) -> dict[str, Any]:
    """Return the compile-time arguments that all kernels that move elements share, by name, with ``others`` added."""
    return {
        "SRC": getattr(tl, variant.src),
        "DST": getattr(tl, variant.dst),
        "TILE_ROWS": variant.tile_rows,
        "TILE_COLUMNS": variant.tile_columns,
        "BYTEWISE": variant.bytewise,
        **others,
    }
