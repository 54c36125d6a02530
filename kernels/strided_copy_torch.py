"""The pure-torch implementation of ``strided_copy``, for the host.

Does not import Triton.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from automodel_conv.errors import ConversionError, message
from automodel_conv.kernels.transpose_torch import is_worth_panels, transpose_torch


@torch.no_grad()
def strided_copy_torch(dst: Sequence[Tensor], src: Sequence[Tensor]) -> None:
    """Copy tensors: ``dst[k].copy_(src[k])`` for each ``k``, several times faster if the two have different orders.

    If both tensors of a pair are fastest along the same dimension, or their two fast dimensions are short, this is
    ``copy_``. Otherwise ``transpose_torch`` moves these dimensions, one matrix for each index of the others.

    Args:
        dst: destinations of any rank and strides, which do not overlap each other or any source.
        src: sources of the same shapes, at any strides, even expanded. They are cast to the dtype of ``dst`` as
            ``Tensor.to`` casts.

    Uses the scratch and the threads of ``transpose_torch``.

    Raises:
        ConversionError: the lists differ in length, or a pair in shape. Nothing has been written.

    Example:
        >>> src = torch.arange(6.0).view(2, 3)
        >>> dst = torch.empty(3, 2).t()
        >>> strided_copy_torch([dst], [src])
        >>> torch.equal(dst, src)
        True
    """
    if len(dst) != len(src):
        raise ConversionError(
            message("strided_copy needs one source per destination", expected=len(dst), found=len(src))
        )
    for index, (d, s) in enumerate(zip(dst, src, strict=True)):
        if d.shape != s.shape:
            raise ConversionError(
                message(
                    "strided_copy needs pairs of equal shape",
                    where=f"pair {index}",
                    expected=f"src {list(d.shape)}",
                    found=f"src {list(s.shape)}",
                )
            )
    # One call transposes all at the end, so that interleaved destinations are in the same list.
    transposed: list[tuple[Tensor, Tensor]] = []
    for d, s in zip(dst, src, strict=True):
        d_fast, s_fast = _fastest_dim(d), _fastest_dim(s)
        # copy_ raises if it would write an address twice. The matrices below would hide that, so it must see the whole.
        if (
            d_fast is None
            or s_fast is None
            or d_fast == s_fast
            or 0 in d.stride()
            or not is_worth_panels(d, s, (d.shape[s_fast], d.shape[d_fast]))  # there may be millions of small matrices
        ):
            d.copy_(s)
            continue
        matrices = [(d.movedim((s_fast, d_fast), (-2, -1)), s.movedim((d_fast, s_fast), (-2, -1)))]
        for _ in range(d.dim() - 2):
            matrices = [pair for dm, sm in matrices for pair in zip(dm.unbind(), sm.unbind(), strict=True)]
        transposed += matrices
    transpose_torch([d for d, _ in transposed], [s for _, s in transposed])


def _fastest_dim(tensor: Tensor) -> int | None:
    """Return the dimension along which addresses change least; None if no dimension changes them."""
    moving = [
        (stride, -dim)
        for dim, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True))
        if size > 1 and stride != 0
    ]
    return -min(moving)[1] if moving else None
