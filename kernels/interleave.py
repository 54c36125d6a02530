"""Interleave: two matrices into one whose columns alternate between them, transposed; and back.

Shapes: gate and up ``[I, H]`` of an expert, and ``[H, 2I]``, as gpt-oss has it. Bytes move as they are, so every bit
pattern arrives as it left; only a cast computes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from automodel_conv.kernels.address_table import WIDEST, Matrices, Operand, as_matrices
from automodel_conv.kernels.launch import (
    NO_LAUNCHES,
    Launches,
    assigned,
    check_alike,
    check_destination,
    check_operands,
    start,
)
from automodel_conv.kernels.transpose import SCALAR_TILE, transpose_torch
from automodel_conv.kernels.variants import Geometry, Variant, element_types

# Rows and columns of a tile by the sizes of a source's and a destination's element, in bytes: runs of at least 128
# bytes where single elements lie and, in pairs, where pairs lie; at most what registers hold without spilling.
_INTERLEAVE_TILES = {(1, 1): (64, 64), (2, 2): (64, 64), (4, 4): (32, 32), (2, 4): (32, 64), (4, 2): (64, 32)}
_DEINTERLEAVE_TILES = {(1, 1): (64, 64), (2, 2): (64, 32), (4, 4): (32, 32), (2, 4): (32, 64), (4, 2): (64, 32)}


def interleave(dst: Operand, first: Operand, second: Operand) -> None:
    """``dst[k][:, 0::2] = first[k].t(); dst[k][:, 1::2] = second[k].t()`` for each k.

    One launch for each alignment of the addresses that occurs.

    Args: lists of tensors, or stacks ``[..., R, C]``, or by addresses; see ``Operand``.
        dst: ``[C, 2R]``, of one kind: shape, dtype, row stride, device; at multiples of its element size. Elements of a
            row are adjacent, rows at any stride. Must overlap neither itself nor a source; nothing here checks it.
        first, second: ``[R, C]``, both of one kind, as many, at any address; rows may overlap each other.

    Dtypes: equal ones of 1, 2 or 4 bytes, which move as they are, or two of bfloat16, float16, float32, rounded to
    nearest even. Full rate where addresses and rows are multiples of 16 bytes everywhere; nearly so at 8 for equal
    dtypes; far less below. Moves ``bytes_moved(dst, first, second)`` bytes. Uploads one table; queued on the current
    stream, so the memory must live until that is done. Compiles one kernel for each dtype pair and alignment, the first
    time.

    Raises:
        ConversionError: operands of unlike count, shape, dtype, stride or device, or a destination between elements;
            nothing is written then.
        UnsupportedError: other dtypes, or a device that kernels do not run on.
    """
    operands = as_matrices("dst", dst), as_matrices("first", first), as_matrices("second", second)
    start(interleave_launches(*operands))


def interleave_launches(dst: Matrices, first: Matrices, second: Matrices) -> Launches:
    """What ``interleave`` launches."""
    check_operands(
        "interleave",
        {"first": first, "second": second, "dst": dst},
        {"first": first.shape, "second": first.shape, "dst": (first.columns, 2 * first.rows)},
    )
    check_alike("first and second", first, second)
    element_types(dst.dtype, first.dtype)
    if not dst.nbytes:
        return NO_LAUNCHES
    check_destination("interleave", dst)
    geometry = Geometry(first.rows, first.columns, first.row_stride, dst.row_stride)
    return assigned((dst, first, second), 1, lambda d, s: (interleave_variant(dst.dtype, first.dtype, d, s), geometry))


def interleave_variant(dst: torch.dtype, src: torch.dtype, dst_alignment: int, src_alignment: int) -> Variant:
    """Pairs in vectors as long as the lesser alignment allows, for casts only whole ones of 16 bytes; or elements."""
    dst_type, src_type = element_types(dst, src)
    both = min(dst_alignment, src_alignment)
    if both == WIDEST or (both == WIDEST // 2 and dst == src):
        tile = _INTERLEAVE_TILES[src.itemsize, dst.itemsize]
        src_vector, dst_vector = both // src.itemsize, both // (2 * dst.itemsize)
        return Variant("interleave_tiles", src_type, dst_type, src_vector, dst_vector, *tile, pairs=True)
    return Variant("interleave_tiles", src_type, dst_type, 1, 1, *SCALAR_TILE, bytewise=src_alignment < src.itemsize)


def interleave_torch(dst: Sequence[Tensor], first: Sequence[Tensor], second: Sequence[Tensor]) -> None:
    """The same as ``interleave`` in plain torch, for any strides and devices; see ``transpose_torch``."""
    transpose_torch(_halves(dst), [half for pair in zip(first, second, strict=True) for half in pair])


def deinterleave(first: Operand, second: Operand, src: Operand) -> None:
    """``first[k].copy_(src[k][:, 0::2].t()); second[k].copy_(src[k][:, 1::2].t())`` for each k.

    Args:
        first, second: ``[C, R]``, as ``dst`` of ``interleave``.
        src: ``[R, 2C]``, as ``first`` of ``interleave``.

    Everything else, errors too, as for ``interleave``, which this is the inverse of.
    """
    operands = as_matrices("first", first), as_matrices("second", second), as_matrices("src", src)
    start(deinterleave_launches(*operands))


def deinterleave_launches(first: Matrices, second: Matrices, src: Matrices) -> Launches:
    """What ``deinterleave`` launches."""
    check_operands(
        "deinterleave",
        {"first": first, "second": second, "src": src},
        {"first": first.shape, "second": first.shape, "src": (first.columns, 2 * first.rows)},
    )
    check_alike("first and second", first, second)
    element_types(first.dtype, src.dtype)
    if not src.nbytes:
        return NO_LAUNCHES
    check_destination("deinterleave", first)
    check_destination("deinterleave", second)
    geometry = Geometry(src.rows, first.rows, src.row_stride, first.row_stride)
    return assigned(
        (first, second, src), 2, lambda d, s: (deinterleave_variant(first.dtype, src.dtype, d, s), geometry)
    )


def deinterleave_variant(dst: torch.dtype, src: torch.dtype, dst_alignment: int, src_alignment: int) -> Variant:
    """Pairs in vectors as long as the lesser alignment allows, for casts only whole ones of 16 bytes; or elements."""
    dst_type, src_type = element_types(dst, src)
    both = min(dst_alignment, src_alignment)
    if both == WIDEST or (both == WIDEST // 2 and dst == src):
        tile = _DEINTERLEAVE_TILES[src.itemsize, dst.itemsize]
        src_vector, dst_vector = both // (2 * src.itemsize), both // dst.itemsize
        return Variant("deinterleave_tiles", src_type, dst_type, src_vector, dst_vector, *tile, pairs=True)
    return Variant("deinterleave_tiles", src_type, dst_type, 1, 1, *SCALAR_TILE, bytewise=src_alignment < src.itemsize)


def deinterleave_torch(first: Sequence[Tensor], second: Sequence[Tensor], src: Sequence[Tensor]) -> None:
    """The same as ``deinterleave`` in plain torch, for any strides and devices; see ``transpose_torch``."""
    transpose_torch([half for pair in zip(first, second, strict=True) for half in pair], _halves(src))


def _halves(matrices: Sequence[Tensor]) -> list[Tensor]:
    return [matrix[:, half::2] for matrix in matrices for half in (0, 1)]
