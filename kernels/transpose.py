"""Transpose: matrices of a checkpoint into destinations that lie the other way round.

Shapes: ``src`` ``[R, C]``, ``dst`` ``[C, R]``; for an expert, gate ``[I, H]`` into its half of
``[H, 2I]``. Bytes move as they are, so every bit pattern arrives as it left; only a cast computes.
"""

from __future__ import annotations

import torch

from automodel_conv.kernels.address_table import WIDEST, Matrices, Operand, as_matrices, at_addresses
from automodel_conv.kernels.interleave import interleave_launches
from automodel_conv.kernels.launch import NO_LAUNCHES, Launches, assigned, check_destination, check_operands, start
from automodel_conv.kernels.panels import transpose_torch as transpose_torch  # the twin, which interleave's needs too
from automodel_conv.kernels.variants import SCALAR_TILE, Geometry, Variant, element_types

# Rows and columns of a tile by the sizes of a source's and a destination's element, in bytes: runs of at least 128
# bytes on both sides, at least 8 KiB for a block of 128 threads. 64 divides the widths of common models, 2880 too.
_TILES = {(2, 2): (64, 64), (4, 4): (64, 32), (2, 4): (64, 64), (4, 2): (64, 64)}


def transpose(dst: Operand, src: Operand) -> None:
    """``dst[k].copy_(src[k].t())`` for each k, in one launch for each alignment of the addresses that occurs.

    Args: lists of tensors, or stacks ``[..., R, C]``, or by addresses; see ``Operand``.
        dst: ``[C, R]``, of one kind: shape, dtype, row stride, device; at multiples of its element size. Elements of a
            row are adjacent, rows at any stride. Must overlap neither itself nor ``src``; nothing here checks it.
        src: ``[R, C]`` likewise, as many, at any address; rows may overlap each other.

    Dtypes: equal ones of 1, 2 or 4 bytes, which move as they are, or two of bfloat16, float16, float32, rounded to
    nearest even. Full rate where addresses and rows are multiples of 16 bytes on both sides; nearly so at 8 for equal
    dtypes; far less below. Moves ``bytes_moved(dst, src)`` bytes. Uploads one table; queued on the current stream, so
    the memory must live until that is done. Compiles one kernel for each dtype pair and alignment, the first time.

    Raises:
        ConversionError: operands of unlike count, shape, dtype, stride or device, or a destination between elements;
            nothing is written then.
        UnsupportedError: other dtypes, or a device that kernels do not run on.
    """
    start(transpose_launches(as_matrices("dst", dst), as_matrices("src", src)))


def transpose_launches(dst: Matrices, src: Matrices) -> Launches:
    """What ``transpose`` launches."""
    check_operands("transpose", {"dst": dst, "src": src}, {"dst": (src.columns, src.rows), "src": src.shape})
    types = element_types(dst.dtype, src.dtype)
    if not dst.nbytes:
        return NO_LAUNCHES
    check_destination("transpose", dst)
    if types == ("uint8", "uint8") and src.rows % 2 == 0:
        return _transpose_bytes(dst, src)
    geometry = Geometry(src.rows, src.columns, src.row_stride, dst.row_stride)
    return assigned((dst, src), 1, lambda d, s: (transpose_variant(dst.dtype, src.dtype, d, s), geometry))


def transpose_variant(dst: torch.dtype, src: torch.dtype, dst_alignment: int, src_alignment: int) -> Variant:
    """Vectors as long as the lesser alignment allows, for casts only whole ones of 16 bytes; or elements."""
    dst_type, src_type = element_types(dst, src)
    both = min(dst_alignment, src_alignment)
    if src.itemsize > 1 and (both == WIDEST or (both == WIDEST // 2 and dst == src)):
        tile = _TILES[src.itemsize, dst.itemsize]
        return Variant("transpose_tiles", src_type, dst_type, both // src.itemsize, both // dst.itemsize, *tile)
    return Variant("transpose_tiles", src_type, dst_type, 1, 1, *SCALAR_TILE, bytewise=src_alignment < src.itemsize)


def _transpose_bytes(dst: Matrices, src: Matrices) -> Launches:
    """Even and odd rows become alternating columns: words of two bytes cost a GPU far less than single ones."""
    shape, stride = (src.rows // 2, src.columns), 2 * src.row_stride
    even, odd = (
        at_addresses(src.addresses + row * src.row_stride, shape, stride, src.dtype, src.device) for row in (0, 1)
    )
    return interleave_launches(dst, even, odd)
