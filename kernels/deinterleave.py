"""Deinterleaves: the even and the odd columns of a matrix, transposed, become two; the inverse of ``interleave``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from automodel_conv.kernels.address_table import MAX_ACCESS_BYTES, Matrices, Operand, as_matrices
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
_TILES = {(1, 1): (64, 64), (2, 2): (64, 32), (4, 4): (32, 32), (2, 4): (32, 64), (4, 2): (64, 32)}


def deinterleave(first: Operand, second: Operand, src: Operand) -> None:
    """Split matrices, transposed, into their even and their odd columns.

    For each ``k``: ``first[k].copy_(src[k][:, 0::2].t()); second[k].copy_(src[k][:, 1::2].t())``. The inverse of
    ``interleave``, which has the same conditions, dtypes, rates and errors.

    Args:
        first: destinations of the even columns, ``[C, R]``, under the conditions for ``dst`` of ``interleave``.
        second: destinations of the odd columns, ``[C, R]``, under the same conditions.
        src: sources ``[R, 2C]``, under the conditions for ``first`` of ``interleave``.

    Raises:
        ConversionError: see ``interleave``.
        UnsupportedError: see ``interleave``.

    Example:
        Tensors on the CPU need Triton's interpreter (``TRITON_INTERPRET=1``).

        >>> gate_up = torch.tensor([[1.0, 3.0], [2.0, 4.0]])
        >>> gate, up = torch.empty(1, 2), torch.empty(1, 2)
        >>> deinterleave([gate], [up], [gate_up])
        >>> gate, up
        (tensor([[1., 2.]]), tensor([[3., 4.]]))
    """
    operands = as_matrices("first", first), as_matrices("second", second), as_matrices("src", src)
    start(deinterleave_launches(*operands))


def deinterleave_launches(first: Matrices, second: Matrices, src: Matrices) -> Launches:
    """Return the launches of ``deinterleave``."""
    check_operands(
        "deinterleave",
        {"first": first, "second": second, "src": src},
        {"first": first.shape, "second": first.shape, "src": (first.columns, 2 * first.rows)},
    )
    check_same_kind("first and second", first, second)
    element_types(first.dtype, src.dtype)
    if not src.nbytes:
        return NO_LAUNCHES
    check_destination("deinterleave", first)
    check_destination("deinterleave", second)
    geometry = Geometry(src.rows, first.rows, src.row_stride, first.row_stride)
    return launches_by_alignment(
        (first, second, src), 2, lambda d, s: (deinterleave_variant(first.dtype, src.dtype, d, s), geometry)
    )


def deinterleave_variant(dst: torch.dtype, src: torch.dtype, dst_alignment: int, src_alignment: int) -> Variant:
    """Return the variant: pairs in vectors as long as the lesser alignment allows, or else element by element.

    Casts use only vectors of 16 bytes.
    """
    dst_type, src_type = element_types(dst, src)
    both = min(dst_alignment, src_alignment)
    if both == MAX_ACCESS_BYTES or (both == MAX_ACCESS_BYTES // 2 and dst == src):
        tile = _TILES[src.itemsize, dst.itemsize]
        src_vector, dst_vector = both // (2 * src.itemsize), both // dst.itemsize
        return Variant(DEINTERLEAVE_TILES, src_type, dst_type, src_vector, dst_vector, *tile, pairs=True)
    return Variant(DEINTERLEAVE_TILES, src_type, dst_type, 1, 1, *SCALAR_TILE, bytewise=src_alignment < src.itemsize)


def deinterleave_torch(first: Sequence[Tensor], second: Sequence[Tensor], src: Sequence[Tensor]) -> None:
    """Split matrices as ``deinterleave`` does, in plain torch; see ``transpose_torch``.

    Supports any strides and devices.

    Example:
        >>> gate_up = torch.tensor([[1.0, 3.0], [2.0, 4.0]])
        >>> gate, up = torch.empty(1, 2), torch.empty(1, 2)
        >>> deinterleave_torch([gate], [up], [gate_up])
        >>> gate, up
        (tensor([[1., 2.]]), tensor([[3., 4.]]))
    """
    transpose_torch([half for pair in zip(first, second, strict=True) for half in pair], halves(src))


@jit(do_not_specialize=RUNTIME)
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
    """Compute ``dst_k[c, r] = cast(src[r, 2 * c + k])`` for k = 0, 1; table ``[dst_0, dst_1, src]``.

    Columns count pairs. With ``PAIRS``, pairs are read and transposed as words. Then ``SRC_VECTOR`` and the source's
    stride count words.
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
    BITS: tl.constexpr = SRC.primitive_bitwidth
    if PAIRS:
        HALF: tl.constexpr = tl.uint8 if BITS == 8 else tl.uint16 if BITS == 16 else tl.uint32
        WORD: tl.constexpr = tl.uint16 if BITS == 8 else tl.uint32 if BITS == 16 else tl.uint64
        base = r0.to(tl.int64) * src_stride + c0
        offsets = r[:, None] * src_stride + c[None, :]
        pairs = tl.trans(load(tl.load(entry + 2), base, offsets, mask, WORD, SRC_VECTOR, BYTEWISE))
        x = pairs.to(HALF).to(SRC, bitcast=True)
        y = (pairs >> BITS).to(HALF).to(SRC, bitcast=True)
    else:
        base = r0.to(tl.int64) * src_stride + 2 * c0.to(tl.int64)
        offsets = r[:, None] * src_stride + 2 * c[None, :]
        x = tl.trans(load(tl.load(entry + 2), base, offsets, mask, SRC, 1, BYTEWISE))
        y = tl.trans(load(tl.load(entry + 2), base, offsets + 1, mask, SRC, 1, BYTEWISE))
    mask = (c[:, None] < columns - c0) & (r[None, :] < rows - r0)
    offsets = c[:, None] * dst_stride + r[None, :]
    dst_base = c0.to(tl.int64) * dst_stride + r0
    tl.store(pointer_to(tl.load(entry), DST, DST_VECTOR) + dst_base + offsets, cast(x, DST), mask=mask)
    tl.store(pointer_to(tl.load(entry + 1), DST, DST_VECTOR) + dst_base + offsets, cast(y, DST), mask=mask)


def _in_vectors(variant: Variant, geometry: Geometry) -> tuple[int, ...]:
    words = 2 if variant.pairs else 1
    rows, columns = geometry.rows // variant.dst_vector, geometry.columns // variant.src_vector
    return rows, columns, geometry.src_stride // (words * variant.src_vector), geometry.dst_stride // variant.dst_vector


def _constants(variant: Variant) -> dict[str, Any]:
    return constants(variant, SRC_VECTOR=variant.src_vector, DST_VECTOR=variant.dst_vector, PAIRS=variant.pairs)


DEINTERLEAVE_TILES = Kernel(
    "deinterleave_tiles",
    deinterleave_tiles,
    destinations=2,
    operands=3,
    constants=_constants,
    in_vectors=_in_vectors,
    reach=lambda variant, _: Reach(variant.tile_columns, variant.tile_rows),
)

DEINTERLEAVE = Verb(
    "deinterleave",
    transposes=True,
    steps=(2, 1),
    destinations=2,
    sources=1,
    shapes=lambda matrix: ((matrix.columns, matrix.rows), (matrix.rows, 2 * matrix.columns)),
    supports=lambda matrix, src, dst: supports_transposed(matrix._replace(columns=2 * matrix.columns), src, dst),
    launches=deinterleave_launches,
)
