"""Grids of scales and zero points as they are stored, in the order of the blocks of codes that they belong to."""

from __future__ import annotations

import torch
from torch import Tensor

from automodel_conv.planning.copies import ZEROS_IN_I32, ZeroPacking

_ZERO_BITS = 4


def in_code_order(scales: Tensor, word: tuple[int, ...]) -> Tensor:
    """Return scales in the order of the blocks of codes; see ``Decode.scale_word``.

    Args:
        scales: stored scales, ``[..., n]`` for any number of whole words.
        word: sizes of the axes within a word of scales.
    """
    if not word:
        return scales
    words = scales.unflatten(-1, (-1, *word))
    first = scales.dim()
    return words.permute(*range(first), *reversed(range(first, words.dim()))).flatten(-len(word) - 1)


def unpacked_zeros(packed: Tensor, packing: ZeroPacking, skipped: int, shape: tuple[int, int]) -> Tensor:
    """Return zero points, 0 to 15, int32 ``[..., rows, columns]``.

    Args:
        packed: stored zero points, int32 ``[..., r, c]``.
        packing: how they are stored.
        skipped: number of rows of zero points that come before the first wanted row.
        shape: wanted rows, and columns of the grid.
    """
    words = packed.add(packing.added) if packing.added else packed  # int32 wraps
    rows, columns = shape
    if packing.by_columns:
        shifts = torch.arange(0, 32, _ZERO_BITS, dtype=torch.int32, device=packed.device)
        words = words.narrow(-2, skipped, rows)
        return words[..., None].bitwise_right_shift(shifts).bitwise_and_(15).flatten(-2)[..., :columns]
    numbers = torch.arange(skipped, skipped + rows, dtype=torch.int32, device=packed.device)
    words = words.index_select(-2, numbers // ZEROS_IN_I32)
    return words.bitwise_right_shift((numbers % ZEROS_IN_I32 * _ZERO_BITS)[:, None]).bitwise_and_(15)
