"""A verb that the package does not have, complete in this file: it gathers elements that are a step apart."""

from __future__ import annotations

from automodel_conv.kernels.address_table import Matrices
from automodel_conv.kernels.jit import jit, tl
from automodel_conv.kernels.launch import (
    NO_LAUNCHES,
    Launches,
    check_destination,
    check_operands,
    launches_by_alignment,
)
from automodel_conv.kernels.tiles import RUNTIME, cast, constants, grouped_tile, load, pointer_to
from automodel_conv.kernels.variants import Geometry, Kernel, Reach, Variant, element_types
from automodel_conv.kernels.verb import Verb, supports_transposed

STEP = 2
_TILE = (8, 32)


def gather_launches(dst: Matrices, src: Matrices) -> Launches:
    """Return the launches of ``dst[k].copy_(src[k][:, ::STEP])`` for each k."""
    check_operands("gather", {"dst": dst, "src": src}, {"dst": dst.shape, "src": (dst.rows, STEP * dst.columns)})
    dst_type, src_type = element_types(dst.dtype, src.dtype)
    if not dst.nbytes:
        return NO_LAUNCHES
    check_destination("gather", dst)
    geometry = Geometry(dst.rows, dst.columns, src.row_stride, dst.row_stride, details=(STEP,))

    def choose(dst_alignment: int, src_alignment: int) -> tuple[Variant, Geometry]:
        bytewise = src_alignment < src.dtype.itemsize
        return Variant(GATHER_TILES, src_type, dst_type, 1, 1, *_TILE, bytewise=bytewise), geometry

    return launches_by_alignment((dst, src), 1, choose)


@jit(do_not_specialize=[*RUNTIME, "step"])
def gather_tiles(
    table,
    rows,
    columns_v,
    src_stride_v,
    dst_stride_v,
    step,
    SRC: tl.constexpr,
    DST: tl.constexpr,
    BYTEWISE: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
):
    """Compute ``dst[r, c] = cast(src[r, step * c])``; table ``[dst, src]``."""
    entry = table + tl.program_id(1) * 2
    r0, c0 = grouped_tile(rows, columns_v, TILE_ROWS, TILE_COLUMNS)
    r = tl.arange(0, TILE_ROWS)[:, None]
    c = tl.arange(0, TILE_COLUMNS)[None, :]
    mask = (r < rows - r0) & (c < columns_v - c0)
    base = r0.to(tl.int64) * src_stride_v + c0 * step
    x = load(tl.load(entry + 1), base, r * src_stride_v + c * step, mask, SRC, 1, BYTEWISE)
    dst = pointer_to(tl.load(entry), DST, 1) + (r0.to(tl.int64) * dst_stride_v + c0)
    tl.store(dst + (r * dst_stride_v + c), cast(x, DST), mask=mask)


GATHER_TILES = Kernel(
    "gather_tiles",
    gather_tiles,
    destinations=1,
    operands=2,
    constants=constants,
    in_vectors=lambda _, geometry: (*geometry[:4], *geometry.details),
    reach=lambda variant, _: Reach(variant.tile_rows, variant.tile_columns),
    integers=5,
)

GATHER = Verb(
    "gather",
    transposes=False,
    steps=(STEP, 1),
    destinations=1,
    sources=1,
    shapes=lambda matrix: (matrix[:2], (matrix.rows, STEP * matrix.columns)),
    supports=supports_transposed,
    launches=gather_launches,
)
