"""Strided copies: equal shapes, any strides.

Every step of a plan can be expressed as one.
"""

from __future__ import annotations

from math import gcd

import torch

from automodel_conv.kernels.address_table import MAX_ACCESS_BYTES, Matrices, Operand, as_matrices, at_addresses
from automodel_conv.kernels.jit import jit, tl
from automodel_conv.kernels.launch import (
    MAX_STRIDE,
    NO_LAUNCHES,
    Launches,
    check_destination,
    check_operands,
    launches_by_alignment,
    start,
)
from automodel_conv.kernels.strided_copy_torch import strided_copy_torch as strided_copy_torch
from automodel_conv.kernels.tiles import RUNTIME, cast, constants, load, pointer_to
from automodel_conv.kernels.variants import Geometry, Kernel, Reach, Variant, element_types, is_moved, word
from automodel_conv.kernels.verb import Matrix, Verb

MAX_RUN_BYTES = 2**30
"""Longest run, in bytes, that ``strided_copy`` supports if a matrix has one row or no gaps between its rows."""

# Tiles of 8 KiB, (rows, bytes of a row on the wider side): 128 bytes for each thread of a block, so enough bytes are in
# flight to hide the memory's latency. Long rows use wide tiles; short rows would leave most of a wide tile empty.
_WIDE = (4, 2048)
_NARROW = (32, 256)
# If less than 4 bytes move at a time, a tile of 8 KiB needs more registers for addresses than a thread has.
_SCALAR = (8, 512)


def strided_copy(dst: Operand, src: Operand) -> None:
    """Copy matrices: ``dst[k].copy_(src[k])`` for each ``k``.

    Concatenates, interleaves rows (into every other row of a destination), splits and casts. Queues one launch on the
    current stream for each alignment that occurs among the addresses.

    Each argument is a list of tensors, a stack ``[..., R, C]`` or ``Matrices``; see ``Operand``.

    Args:
        dst: destinations ``[R, C]``, all of one shape, dtype, row stride and device. Elements of a row are adjacent;
            rows have any stride. Destinations may overlap neither themselves nor a source. This is not checked.
        src: sources ``[R, C]``, one for each destination, under the same conditions, except that rows may overlap.

    Equal dtypes of any size move as bytes from any address to any address: 16 bytes at a time if the addresses, ``C``
    and the strides allow it. Different dtypes must be two of bfloat16, float16 and float32. These are rounded to
    nearest even (which NaN a NaN becomes is not specified), and read from any address but written to multiples of the
    element size.

    Moves ``bytes_moved(dst, src)`` bytes and uploads one table. The memory must live until the queued work is done.
    The first call for each dtype pair, alignment and width class compiles a kernel.

    Raises:
        ConversionError: operands differ in count, shape, dtype, stride or device. Nothing has been written.
        UnsupportedError: a cast between other dtypes, or a device that kernels do not run on.

    Example:
        Tensors on the CPU need Triton's interpreter (``TRITON_INTERPRET=1``).

        >>> gate, up = torch.zeros(2, 3), torch.ones(2, 3)
        >>> gate_up = torch.empty(4, 3)
        >>> strided_copy([gate_up[:2], gate_up[2:]], [gate, up])
        >>> torch.equal(gate_up, torch.cat([gate, up]))
        True
    """
    start(strided_copy_launches(as_matrices("dst", dst), as_matrices("src", src)))


def strided_copy_launches(dst: Matrices, src: Matrices) -> Launches:
    """Return the launches of ``strided_copy``."""
    check_operands("strided_copy", {"dst": dst, "src": src}, {"dst": dst.shape, "src": dst.shape})
    if not dst.nbytes:
        return NO_LAUNCHES
    if dst.dtype == src.dtype:
        dst, src = _as_bytes(dst), _as_bytes(src)
    else:
        element_types(dst.dtype, src.dtype)
        check_destination("strided_copy", dst)
    if dst.is_run and src.is_run:
        wider = max(dst.dtype.itemsize, src.dtype.itemsize)
        dst, src = _folded(dst, wider), _folded(src, wider)
    return _copy_bytes(dst, src) if dst.dtype == torch.uint8 else _copy_cast(dst, src)


def _as_bytes(matrices: Matrices) -> Matrices:
    size = matrices.dtype.itemsize
    return matrices._replace(dtype=torch.uint8, columns=matrices.columns * size, row_stride=matrices.row_stride * size)


def _is_foldable(run_nbytes: int) -> bool:
    """Return whether a run is a whole number of rows of a narrow tile; then its length is not limited."""
    return run_nbytes % _NARROW[1] == 0


def _folded(run: Matrices, itemsize: int) -> Matrices:
    """Fold each run into rows, at most as long as those of a wide tile; into one row if its length does not divide.

    Args:
        itemsize: element size of the wider side.
    """
    numel = run.rows * run.columns
    columns = gcd(numel * itemsize, _WIDE[1]) // itemsize if _is_foldable(numel * itemsize) else numel
    return at_addresses(run.addresses, (numel // columns, columns), columns, run.dtype, run.device)


def _copy_bytes(dst: Matrices, src: Matrices) -> Launches:
    def choose(dst_alignment: int, src_alignment: int) -> tuple[Variant, Geometry]:
        variant = byte_variant(min(dst_alignment, src_alignment), dst.columns)
        size = min(dst_alignment, src_alignment, 4)
        return variant, Geometry(dst.rows, dst.columns // size, src.row_stride // size, dst.row_stride // size)

    return launches_by_alignment((dst, src), 1, choose)


def byte_variant(alignment: int, row_nbytes: int) -> Variant:
    """Return the variant that copies words of up to 4 bytes, in vectors as long as the alignment allows."""
    size = min(alignment, 4)
    rows, nbytes = _tile(row_nbytes) if size == 4 else _SCALAR
    vector = alignment // size
    return Variant(COPY_TILES, word(size), word(size), vector, vector, rows, nbytes // size)


def _copy_cast(dst: Matrices, src: Matrices) -> Launches:
    geometry = Geometry(dst.rows, dst.columns, src.row_stride, dst.row_stride)
    return launches_by_alignment(
        (dst, src), 1, lambda d, s: (cast_variant(dst.dtype, src.dtype, d, s, dst.columns), geometry)
    )


def cast_variant(dst: torch.dtype, src: torch.dtype, dst_alignment: int, src_alignment: int, columns: int) -> Variant:
    """Return the variant that casts: in vectors of 16 bytes on the wider side, or else element by element.

    Both sides load and store such vectors without an exchange between threads.
    """
    dst_type, src_type = element_types(dst, src)
    wider = max(dst.itemsize, src.itemsize)
    rows, nbytes = _tile(columns * wider)
    vector = MAX_ACCESS_BYTES // wider
    if dst_alignment < vector * dst.itemsize or src_alignment < vector * src.itemsize:
        vector = 1
        rows, nbytes = _SCALAR
    bytewise = src_alignment < src.itemsize
    return Variant(COPY_TILES, src_type, dst_type, vector, vector, rows, nbytes // wider, bytewise)


def _tile(row_nbytes: int) -> tuple[int, int]:
    return _WIDE if row_nbytes >= _WIDE[1] // 2 else _NARROW


@jit(do_not_specialize=RUNTIME)
def copy_tiles(
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
    """Compute ``dst[r, c] = cast(src[r, c])``; table ``[dst, src]``; ``_v`` counts vectors of ``VECTOR`` elements."""
    columns = columns_v * VECTOR
    src_stride = src_stride_v * VECTOR
    dst_stride = dst_stride_v * VECTOR
    entry = table + tl.program_id(1) * 2
    tiles_per_row = tl.cdiv(columns, TILE_COLUMNS)
    r0 = (tl.program_id(0) // tiles_per_row) * TILE_ROWS
    c0 = (tl.program_id(0) % tiles_per_row) * TILE_COLUMNS
    r = tl.arange(0, TILE_ROWS)[:, None]
    c = tl.arange(0, TILE_COLUMNS)[None, :]
    mask = (r < rows - r0) & (c < columns - c0)
    src_base = r0.to(tl.int64) * src_stride + c0
    x = load(tl.load(entry + 1), src_base, r * src_stride + c, mask, SRC, VECTOR, BYTEWISE)
    dst = pointer_to(tl.load(entry), DST, VECTOR) + (r0.to(tl.int64) * dst_stride + c0)
    tl.store(dst + (r * dst_stride + c), cast(x, DST), mask=mask)


def _in_vectors(variant: Variant, geometry: Geometry) -> tuple[int, ...]:
    vector = variant.src_vector
    return geometry.rows, geometry.columns // vector, geometry.src_stride // vector, geometry.dst_stride // vector


COPY_TILES = Kernel(
    "copy_tiles",
    copy_tiles,
    destinations=1,
    operands=2,
    constants=lambda variant: constants(variant, VECTOR=variant.src_vector),
    in_vectors=_in_vectors,
    reach=lambda variant, _: Reach(variant.tile_rows, variant.tile_columns),
)


def _supports(matrix: Matrix, src: torch.dtype, dst: torch.dtype) -> bool:
    rows, columns, *strides = matrix
    if not is_moved(dst, src):
        return False
    if rows == 1 or strides == [columns, columns]:
        nbytes = rows * columns * max(src.itemsize, dst.itemsize)
        return nbytes <= MAX_RUN_BYTES or _is_foldable(nbytes)
    return max(columns, *strides) <= MAX_STRIDE


STRIDED_COPY = Verb(
    "strided_copy",
    transposes=False,
    steps=(1, 1),
    destinations=1,
    sources=1,
    shapes=lambda matrix: (matrix[:2], matrix[:2]),
    supports=_supports,
    launches=strided_copy_launches,
)
