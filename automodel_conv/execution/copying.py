"""Copies between tensors in host memory, those of equal geometry in one call."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from automodel_conv.execution.buffers import strided
from automodel_conv.kernels.strided_copy_torch import strided_copy_torch
from automodel_conv.schedule.jobs import Copies

COPY_BYTES = 4 << 20
"""What a copy allocates for itself, see ``transpose_torch``: at most this, and at most ``COPY_RATIO`` times what it
reads (two panels, of elements that a cast may have made twice as wide)."""
COPY_RATIO = 4


def copy_equal(batches: Iterable[tuple[Copies, Tensor, Tensor]]) -> None:
    """Make copies, each batch from its source to its target; offsets count from the tensors' own first elements."""
    groups: dict[tuple[object, ...], tuple[list[Tensor], list[Tensor]]] = {}
    for (_, _, box, source_offsets, target_offsets), source, target in batches:
        dst, src = groups.setdefault((source.dtype, target.dtype, box), ([], []))
        dst.extend([strided(target, box.shape, box.target_strides, at) for at in target_offsets])
        src.extend([strided(source, box.shape, box.source_strides, at) for at in source_offsets])
    for dst, src in groups.values():
        strided_copy_torch(dst, src)
