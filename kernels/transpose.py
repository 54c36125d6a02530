"""Transposes: matrices of a checkpoint go into destinations that are stored the other way round.

Shapes: ``src`` ``[R, C]``, ``dst`` ``[C, R]``. For an expert, gate ``[I, H]`` goes into its half of ``[H, 2I]``.
Without a cast, bytes move as they are, so every bit pattern is preserved.
"""

from __future__ import annotations

import torch

from automodel_conv.kernels.address_table import MAX_ACCESS_BYTES, Matrices, Operand, as_matrices, at_addresses
from automodel_conv.kernels.interleave import interleave_launches
from automodel_conv.kernels.jit import jit, tl
from automodel_conv.kernels.launch import (
    NO_LAUNCHES,
    Launches,
    check_destination,
    check_operands,
    launches_by_alignment,
    start,
)
from automodel_conv.kernels.tiles import RUNTIME, SCALAR_TILE, cast, constants, grouped_tile, load, pointer_to
from automodel_conv.kernels.transpose_torch import transpose_torch as transpose_torch
from automodel_conv.kernels.variants import Geometry, Kernel, Reach, Variant, element_types
from automodel_conv.kernels.verb import Verb, supports_transposed

# Rows and columns of a tile, by the sizes of a source's and a destination's element in bytes: runs of at least 128
# bytes on both sides, and at least 8 KiB for a block of 128 threads. 64 divides the widths of common models, even 2880.
_TILES = {(2, 2): (64, 64), (4, 4): (64, 32), (2, 4): (64, 64), (4, 2): (64, 64)}


def transpose(dst: Operand, src: Operand) -> None:
    """Transpose matrices: ``dst[k].copy_(src[k].t())`` for each ``k``.

    Queues one launch on the current stream for each alignment that occurs among the addresses.

    Each argument is a list of tensors, a stack ``[..., R, C]`` or ``Matrices``; see ``Operand``.

    Args:
        dst: destinations ``[C, R]``, all of one shape, dtype, row stride and device, at multiples of the element size.
            Elements of a row are adjacent; rows have any stride. Destinations may overlap neither themselves nor a
            source. This is not checked.
        src: sources ``[R, C]``, one for each destination, of one shape, dtype, row stride and device, at any address.
            Elements of a row are adjacent; rows may overlap.

    Equal dtypes of 1, 2 or 4 bytes move as they are. Different dtypes must be two of bfloat16, float16 and float32, and
    are rounded to nearest even. The rate is highest if addresses and rows are multiples of 16 bytes on both sides,
    nearly as high at 8 bytes for equal dtypes, and far lower below.

    Moves ``bytes_moved(dst, src)`` bytes and uploads one table. The memory must live until the queued work is done.
    The first call for each dtype pair and alignment compiles a kernel.

    Raises:
        ConversionError: operands differ in count, shape, dtype, stride or device, or a destination is not at a multiple
            of its element size. Nothing has been written.
        UnsupportedError: other dtypes, or a device that kernels do not run on.

    Example:
        Tensors on the CPU need Triton's interpreter (``TRITON_INTERPRET=1``).

        >>> src = torch.arange(6.0).view(2, 3)
        >>> dst = torch.empty(3, 2)
        >>> transpose([dst], [src])
        >>> torch.equal(dst, src.t())
        True
    """
    start(transpose_launches(as_matrices("dst", dst), as_matrices("src", src)))


def transpose_launches(dst: Matrices, src: Matrices) -> Launches:
    """Return the launches of ``transpose``."""
    check_operands("transpose", {"dst": dst, "src": src}, {"dst": (src.columns, src.rows), "src": src.shape})
    types = element_types(dst.dtype, src.dtype)
    if not dst.nbytes:
        return NO_LAUNCHES
    check_destination("transpose", dst)
    if types == ("uint8", "uint8") and src.rows % 2 == 0:
        return _transpose_bytes(dst, src)
    geometry = Geometry(src.rows, src.columns, src.row_stride, dst.row_stride)
    return launches_by_alignment((dst, src), 1, lambda d, s: (transpose_variant(dst.dtype, src.dtype, d, s), geometry))


def transpose_variant(dst: torch.dtype, src: torch.dtype, dst_alignment: int, src_alignment: int) -> Variant:
    """Return the variant: in vectors as long as the lesser alignment allows, or else element by element.

    Casts use only vectors of 16 bytes.
    """
    dst_type, src_type = element_types(dst, src)
    both = min(dst_alignment, src_alignment)
    if src.itemsize > 1 and (both == MAX_ACCESS_BYTES or (both == MAX_ACCESS_BYTES // 2 and dst == src)):
        tile = _TILES[src.itemsize, dst.itemsize]
        return Variant(TRANSPOSE_TILES, src_type, dst_type, both // src.itemsize, both // dst.itemsize, *tile)
    return Variant(TRANSPOSE_TILES, src_type, dst_type, 1, 1, *SCALAR_TILE, bytewise=src_alignment < src.itemsize)


def _transpose_bytes(dst: Matrices, src: Matrices) -> Launches:
    """Interleave the even and the odd rows instead: a GPU moves words of two bytes far faster than single bytes."""
    shape, stride = (src.rows // 2, src.columns), 2 * src.row_stride
    even, odd = (
        at_addresses(src.addresses + row * src.row_stride, shape, stride, src.dtype, src.device) for row in (0, 1)
    )
    return interleave_launches(dst, even, odd)


@jit(do_not_specialize=RUNTIME)
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
    """Compute ``dst[c, r] = cast(src[r, c])``; table ``[dst, src]``.

    Columns and the source's stride count vectors of ``SRC_VECTOR`` elements, rows and the destination's stride those of
    ``DST_VECTOR``.
    """
    rows = rows_v * DST_VECTOR
    columns = columns_v * SRC_VECTOR
    src_stride = src_stride_v * SRC_VECTOR
    dst_stride = dst_stride_v * DST_VECTOR
    entry = table + tl.program_id(1) * 2
    r0, c0 = grouped_tile(rows, columns, TILE_ROWS, TILE_COLUMNS)
    r = tl.arange(0, TILE_ROWS)
    c = tl.arange(0, TILE_COLUMNS)
    mask = (r[:, None] < rows - r0) & (c[None, :] < columns - c0)
    src_base = r0.to(tl.int64) * src_stride + c0
    x = load(tl.load(entry + 1), src_base, r[:, None] * src_stride + c[None, :], mask, SRC, SRC_VECTOR, BYTEWISE)
    dst = pointer_to(tl.load(entry), DST, DST_VECTOR) + (c0.to(tl.int64) * dst_stride + r0)
    mask = (c[:, None] < columns - c0) & (r[None, :] < rows - r0)
    tl.store(dst + (c[:, None] * dst_stride + r[None, :]), tl.trans(cast(x, DST)), mask=mask)


def _in_vectors(variant: Variant, geometry: Geometry) -> tuple[int, ...]:
    read, written = variant.src_vector, variant.dst_vector
    return (
        geometry.rows // written,
        geometry.columns // read,
        geometry.src_stride // read,
        geometry.dst_stride // written,
    )


TRANSPOSE_TILES = Kernel(
    "transpose_tiles",
    transpose_tiles,
    destinations=1,
    operands=2,
    constants=lambda variant: constants(variant, SRC_VECTOR=variant.src_vector, DST_VECTOR=variant.dst_vector),
    in_vectors=_in_vectors,
    reach=lambda variant, _: Reach(variant.tile_columns, variant.tile_rows),
)

TRANSPOSE = Verb(
    "transpose",
    transposes=True,
    steps=(1, 1),
    destinations=1,
    sources=1,
    shapes=lambda matrix: ((matrix.columns, matrix.rows), matrix[:2]),
    supports=supports_transposed,
    launches=transpose_launches,
)
