"""The pure-torch twin of ``strided_copy``, which the host uses; imports no Triton."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from automodel_conv.errors import ConversionError, message
from automodel_conv.kernels.transpose_torch import transpose_torch


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
