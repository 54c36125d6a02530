"""Strided copy: equal shapes, any strides; what every step of a plan comes down to."""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd

import torch
from torch import Tensor

from automodel_conv.errors import ConversionError, message
from automodel_conv.kernels.address_table import WIDEST, Matrices, Operand, as_matrices, at_addresses
from automodel_conv.kernels.launch import NO_LAUNCHES, Launches, assigned, check_destination, check_operands, start
from automodel_conv.kernels.transpose import transpose_torch
from automodel_conv.kernels.variants import Geometry, Variant, element_types, word

# Tiles of 8 KiB, [rows, bytes of a row on the wider side]: 128 bytes for each thread of a block, so that enough are in
# flight to fill the memory's latency. Wide ones for long rows, narrow ones where a wide one would stand mostly empty.
_WIDE = (4, 2048)
_NARROW = (32, 256)
# Where less than 4 bytes move at a time, a tile of 8 KiB needs more registers for addresses than there are.
_SCALAR = (8, 512)


def strided_copy(dst: Operand, src: Operand) -> None:
    """``dst[k].copy_(src[k])`` for each k, in one launch for each alignment of the addresses that occurs.

    Concatenation, interleaving of rows (a destination of every other row), splitting back, casts.

    Args: lists of tensors, or stacks ``[..., R, C]``, or by addresses; see ``Operand``.
        dst: ``[R, C]``, of one kind: shape, dtype, row stride, device. Elements of a row are adjacent, rows at any
            stride. Must overlap neither itself nor ``src``; that is for the caller to see to, nothing here checks it.
        src: ``[R, C]`` likewise, as many; rows may overlap each other.

    Dtypes: equal ones of any size, which move as bytes from any address to any address, 16 at a time where addresses,
    ``C`` and the strides allow; or two of bfloat16, float16, float32, rounded to nearest even (which NaN a NaN becomes
    is left open), from any address to whole elements. Moves ``bytes_moved(dst, src)`` bytes. Uploads one table; queued
    on the current stream, so the memory must live until that is done. Compiles one kernel for each dtype pair,
    alignment and width class, the first time.

    Raises:
        ConversionError: operands of unlike count, shape, dtype, stride or device; nothing is written then.
        UnsupportedError: a cast between other dtypes, or a device that kernels do not run on.
    """
    start(strided_copy_launches(as_matrices("dst", dst), as_matrices("src", src)))


def strided_copy_launches(dst: Matrices, src: Matrices) -> Launches:
    """What ``strided_copy`` launches."""
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


def is_foldable(run_nbytes: int) -> bool:
    """Whether a run of that many bytes is a whole number of rows of a tile, so that it may have any length."""
    return run_nbytes % _NARROW[1] == 0


def _folded(run: Matrices, itemsize: int) -> Matrices:
    """A run as rows of at most a wide tile, or one row if it doesn't divide; ``itemsize`` is that of the wider side."""
    numel = run.rows * run.columns
    columns = gcd(numel * itemsize, _WIDE[1]) // itemsize if is_foldable(numel * itemsize) else numel
    return at_addresses(run.addresses, (numel // columns, columns), columns, run.dtype, run.device)


def _copy_bytes(dst: Matrices, src: Matrices) -> Launches:
    def choose(dst_alignment: int, src_alignment: int) -> tuple[Variant, Geometry]:
        variant = byte_variant(min(dst_alignment, src_alignment), dst.columns)
        size = min(dst_alignment, src_alignment, 4)
        return variant, Geometry(dst.rows, dst.columns // size, src.row_stride // size, dst.row_stride // size)

    return assigned((dst, src), 1, choose)


def byte_variant(alignment: int, row_nbytes: int) -> Variant:
    """Words of up to 4 bytes, as many to a vector as the alignment allows."""
    size = min(alignment, 4)
    rows, nbytes = _tile(row_nbytes) if size == 4 else _SCALAR
    vector = alignment // size
    return Variant("copy_tiles", word(size), word(size), vector, vector, rows, nbytes // size)


def _copy_cast(dst: Matrices, src: Matrices) -> Launches:
    geometry = Geometry(dst.rows, dst.columns, src.row_stride, dst.row_stride)
    return assigned((dst, src), 1, lambda d, s: (cast_variant(dst.dtype, src.dtype, d, s, dst.columns), geometry))


def cast_variant(dst: torch.dtype, src: torch.dtype, dst_alignment: int, src_alignment: int, columns: int) -> Variant:
    """Vectors of 16 bytes on the wider side, which both sides then load and store without a detour; or elements."""
    dst_type, src_type = element_types(dst, src)
    wider = max(dst.itemsize, src.itemsize)
    rows, nbytes = _tile(columns * wider)
    vector = WIDEST // wider
    if dst_alignment < vector * dst.itemsize or src_alignment < vector * src.itemsize:
        vector = 1
        rows, nbytes = _SCALAR
    bytewise = src_alignment < src.itemsize
    return Variant("copy_tiles", src_type, dst_type, vector, vector, rows, nbytes // wider, bytewise)


def _tile(row_nbytes: int) -> tuple[int, int]:
    return _WIDE if row_nbytes >= _WIDE[1] // 2 else _NARROW


@torch.no_grad()
def strided_copy_torch(dst: Sequence[Tensor], src: Sequence[Tensor]) -> None:
    """``dst[k].copy_(src[k])`` for each k, several times faster where the two lie in unlike order.

    Where both walk fastest along the same dimension this is ``copy_``. Where they do not, the two
    fast dimensions go through ``transpose_torch``, one matrix for each index of the others.

    Args:
        dst: any rank and strides, not overlapping each other or any source.
        src: of the same shapes, any strides, expanded ones too; cast to ``dst``'s dtype as
            ``Tensor.to`` casts.

    Scratch and threads are those of ``transpose_torch``.

    Raises:
        ConversionError: the lists differ in length, or a pair in shape; nothing is written then.
    """
    if len(dst) != len(src):
        raise ConversionError(
            message("strided_copy takes one source per destination", expected=len(dst), found=len(src))
        )
    for index, (d, s) in enumerate(zip(dst, src, strict=True)):
        if d.shape != s.shape:
            raise ConversionError(
                message(
                    "strided_copy takes pairs of equal shape",
                    where=f"pair {index}",
                    expected=f"src {list(d.shape)}",
                    found=f"src {list(s.shape)}",
                )
            )
    # Transposed together at the end, so that interleaved destinations meet in one list.
    transposed: list[tuple[Tensor, Tensor]] = []
    for d, s in zip(dst, src, strict=True):
        d_fast, s_fast = _fastest_dim(d), _fastest_dim(s)
        # copy_ refuses to write one address twice; cut into matrices that would not be noticed.
        if d_fast is None or s_fast is None or d_fast == s_fast or 0 in d.stride():
            d.copy_(s)
            continue
        matrices = [(d.movedim((s_fast, d_fast), (-2, -1)), s.movedim((d_fast, s_fast), (-2, -1)))]
        for _ in range(d.dim() - 2):
            matrices = [pair for dm, sm in matrices for pair in zip(dm.unbind(), sm.unbind(), strict=True)]
        transposed += matrices
    transpose_torch([d for d, _ in transposed], [s for _, s in transposed])


def _fastest_dim(tensor: Tensor) -> int | None:
    """The dimension along which addresses change least; None where no dimension moves them."""
    moving = [
        (stride, -dim)
        for dim, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True))
        if size > 1 and stride != 0
    ]
    return -min(moving)[1] if moving else None
