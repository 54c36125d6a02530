"""Copies between tensors in host memory, those of equal geometry in one call."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from automodel_conv.execution.buffers import strided
from automodel_conv.execution.jobs import Move
from automodel_conv.kernels.strided_copy import strided_copy_torch

COPY_BYTES = 4 << 20
"""What a copy allocates for itself, see ``transpose_torch``: at most this, and at most ``COPY_RATIO`` times what it
reads (two panels, of elements that a cast may have made twice as wide)."""
COPY_RATIO = 4


def copy_moves(moves: Iterable[tuple[Move, Tensor, Tensor]]) -> None:
    """Make copies, each from its source tensor to its target tensor; offsets count from the tensors' own first ones."""
    groups: dict[tuple[object, ...], tuple[list[Tensor], list[Tensor]]] = {}
    for move, source, target in moves:
        key = (move.dtype, target.dtype, move.shape, move.source_strides, move.target_strides)
        dst, src = groups.setdefault(key, ([], []))
        dst.append(strided(target, move.shape, move.target_strides, move.target_offset))
        src.append(strided(source, move.shape, move.source_strides, move.source_offset))
    for dst, src in groups.values():
        strided_copy_torch(dst, src)
