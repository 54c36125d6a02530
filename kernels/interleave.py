"""Interleaves: two matrices, transposed, become the alternating columns of one.

Shapes: gate and up ``[I, H]`` of an expert into ``[H, 2I]``, the layout of gpt-oss. Without a cast, bytes move as they
are, so every bit pattern is preserved.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from automodel_conv.kernels.address_table import MAX_ACCESS_BYTES, Matrices, Operand, as_matrices
from automodel_conv.kernels.deinterleave import deinterleave as deinterleave  # the inverse, re-exported
from automodel_conv.kernels.deinterleave import deinterleave_torch as deinterleave_torch
from automodel_conv.kernels.jit import jit, tl
from automodel_conv.kernels.launch import (
    NO_LAUNCHES,
    Launches,
    check_destination,
    check_operands,
    check_same_kind,
    launches_by_alignment,
    start,
)
from automodel_conv.kernels.tiles import RUNTIME, SCALAR_TILE, cast, constants, grouped_tile, load, pointer_to
from automodel_conv.kernels.transpose_torch import halves, transpose_torch
from automodel_conv.kernels.variants import Geometry, Kernel, Reach, Variant, element_types
from automodel_conv.kernels.verb import Verb, supports_transposed

# Rows and columns of a tile, by the bytes of an element of the source and of the destination. On the side with single
# elements, runs have at least 128 bytes; if pairs move as words, so do runs on the side with pairs. Larger tiles would
# spill registers.
_TILES = {(1, 1): (64, 64), (2, 2): (64, 64), (4, 4): (32, 32), (2, 4): (32, 64), (4, 2): (64, 32)}


def interleave(dst: Operand, first: Operand, second: Operand) -> None:
    """Interleave pairs of matrices, transposed, as the columns of a third one.

    For each ``k``: ``dst[k][:, 0::2] = first[k].t(); dst[k][:, 1::2] = second[k].t()``. Queues one launch on the
    current stream for each alignment that occurs among the addresses.

    Each argument is a list of tensors, a stack ``[..., R, C]`` or ``Matrices``; see ``Operand``.

    Args:
        dst: destinations ``[C, 2R]``, all of one shape, dtype, row stride and device, at multiples of the element size.
            Elements of a row are adjacent; rows have any stride. Destinations may overlap neither themselves nor a
            source. This is not checked.
        first: sources of the even columns, ``[R, C]``, one for each destination, at any address. Elements of a row are
            adjacent; rows may overlap.
        second: sources of the odd columns, of the same count, shape, dtype and row stride as ``first``.

    Equal dtypes of 1, 2 or 4 bytes move as they are. Different dtypes must be two of bfloat16, float16 and float32, and
    are rounded to nearest even. The rate is highest if all addresses and rows are multiples of 16 bytes, nearly as high
    at 8 bytes for equal dtypes, and far lower below.

    Moves ``bytes_moved(dst, first, second)`` bytes and uploads one table. The memory must live until the queued work is
    done. The first call for each dtype pair and alignment compiles a kernel.

    Raises:
        ConversionError: operands differ in count, shape, dtype, stride or device, or a destination is not at a multiple
            of its element size. Nothing has been written.
        UnsupportedError: other dtypes, or a device that kernels do not run on.

    Example:
        Tensors on the CPU need Triton's interpreter (``TRITON_INTERPRET=1``).

        >>> gate, up = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]])
        >>> gate_up = torch.empty(2, 2)
        >>> interleave([gate_up], [gate], [up])
        >>> gate_up
        tensor([[1., 3.],
                [2., 4.]])
    """
    operands = as_matrices("dst", dst), as_matrices("first", first), as_matrices("second", second)
    start(interleave_launches(*operands))


def interleave_launches(dst: Matrices, first: Matrices, second: Matrices) -> Launches:
    """Return the launches of ``interleave``."""
    check_operands(
        "interleave",
        {"first": first, "second": second, "dst": dst},
        {"first": first.shape, "second": first.shape, "dst": (first.columns, 2 * first.rows)},
    )
    check_same_kind("first and second", first, second)
    element_types(dst.dtype, first.dtype)
    if not dst.nbytes:
        return NO_LAUNCHES
    check_destination("interleave", dst)
    geometry = Geometry(first.rows, first.columns, first.row_stride, dst.row_stride)
    return launches_by_alignment(
        (dst, first, second), 1, lambda d, s: (interleave_variant(dst.dtype, first.dtype, d, s), geometry)
    )


def interleave_variant(dst: torch.dtype, src: torch.dtype, dst_alignment: int, src_alignment: int) -> Variant:
    """Return the variant: pairs in vectors as long as the lesser alignment allows, or else element by element.

    Casts use only vectors of 16 bytes.
    """
    dst_type, src_type = element_types(dst, src)
    both = min(dst_alignment, src_alignment)
    if both == MAX_ACCESS_BYTES or (both == MAX_ACCESS_BYTES // 2 and dst == src):
        tile = _TILES[src.itemsize, dst.itemsize]
        src_vector, dst_vector = both // src.itemsize, both // (2 * dst.itemsize)
        return Variant(INTERLEAVE_TILES, src_type, dst_type, src_vector, dst_vector, *tile, pairs=True)
    return Variant(INTERLEAVE_TILES, src_type, dst_type, 1, 1, *SCALAR_TILE, bytewise=src_alignment < src.itemsize)


def interleave_torch(dst: Sequence[Tensor], first: Sequence[Tensor], second: Sequence[Tensor]) -> None:
    """Interleave pairs of matrices as ``interleave`` does, in plain torch; see ``transpose_torch``.

    Supports any strides and devices.

    Example:
        >>> gate, up = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]])
        >>> gate_up = torch.empty(2, 2)
        >>> interleave_torch([gate_up], [gate], [up])
        >>> gate_up
        tensor([[1., 3.],
                [2., 4.]])
    """
    transpose_torch(halves(dst), [half for pair in zip(first, second, strict=True) for half in pair])


@jit(do_not_specialize=RUNTIME)
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
    """Compute ``dst[c, 2 * r + k] = cast(src_k[r, c])`` for k = 0, 1; table ``[dst, src_0, src_1]``.

    With ``PAIRS``, two elements that become neighbours are packed into a word, and words are transposed. Then
    ``DST_VECTOR`` and the destination's stride count words. Without, elements are stored one by one, and the stride
    counts elements.
    """
    rows = rows_v * DST_VECTOR
    columns = columns_v * SRC_VECTOR
    src_stride = src_stride_v * SRC_VECTOR
    dst_stride = dst_stride_v * DST_VECTOR
    entry = table + tl.program_id(1) * 3
    r0, c0 = grouped_tile(rows, columns, TILE_ROWS, TILE_COLUMNS)
    r = tl.arange(0, TILE_ROWS)
    c = tl.arange(0, TILE_COLUMNS)
    mask = (r[:, None] < rows - r0) & (c[None, :] < columns - c0)
    base = r0.to(tl.int64) * src_stride + c0
    offsets = r[:, None] * src_stride + c[None, :]
    x = cast(load(tl.load(entry + 1), base, offsets, mask, SRC, SRC_VECTOR, BYTEWISE), DST)
    y = cast(load(tl.load(entry + 2), base, offsets, mask, SRC, SRC_VECTOR, BYTEWISE), DST)
    mask = (c[:, None] < columns - c0) & (r[None, :] < rows - r0)
    BITS: tl.constexpr = DST.primitive_bitwidth
    if PAIRS:
        HALF: tl.constexpr = tl.uint8 if BITS == 8 else tl.uint16 if BITS == 16 else tl.uint32
        WORD: tl.constexpr = tl.uint16 if BITS == 8 else tl.uint32 if BITS == 16 else tl.uint64
        pairs = x.to(HALF, bitcast=True).to(WORD) | (y.to(HALF, bitcast=True).to(WORD) << BITS)
        dst = pointer_to(tl.load(entry), WORD, DST_VECTOR) + (c0.to(tl.int64) * dst_stride + r0)
        tl.store(dst + (c[:, None] * dst_stride + r[None, :]), tl.trans(pairs), mask=mask)
    else:
        dst = pointer_to(tl.load(entry), DST, 1) + (c0.to(tl.int64) * dst_stride + 2 * r0.to(tl.int64))
        offsets = c[:, None] * dst_stride + 2 * r[None, :]
        tl.store(dst + offsets, tl.trans(x), mask=mask)
        tl.store(dst + (offsets + 1), tl.trans(y), mask=mask)


def _in_vectors(variant: Variant, geometry: Geometry) -> tuple[int, ...]:
    words = 2 if variant.pairs else 1
    rows, columns = geometry.rows // variant.dst_vector, geometry.columns // variant.src_vector
    return rows, columns, geometry.src_stride // variant.src_vector, geometry.dst_stride // (words * variant.dst_vector)


def _constants(variant: Variant) -> dict[str, Any]:
    return constants(variant, SRC_VECTOR=variant.src_vector, DST_VECTOR=variant.dst_vector, PAIRS=variant.pairs)


INTERLEAVE_TILES = Kernel(
    "interleave_tiles",
    interleave_tiles,
    destinations=1,
    operands=3,
    constants=_constants,
    in_vectors=_in_vectors,
    reach=lambda variant, _: Reach(variant.tile_columns, variant.tile_rows),
)

INTERLEAVE = Verb(
    "interleave",
    transposes=True,
    steps=(1, 2),
    destinations=1,
    sources=2,
    shapes=lambda matrix: ((matrix.columns, 2 * matrix.rows), matrix[:2]),
    supports=supports_transposed,
    launches=interleave_launches,
)
