"""Strided copies in host memory, for loads to the host and for files that are computed from files or host tensors."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from automodel_conv.execution.buffers import strided
from automodel_conv.kernels.strided_copy_torch import strided_copy_torch
from automodel_conv.schedule.jobs import Copies

COPY_BYTES = 4 << 20
"""Maximum bytes that a copy allocates for itself; see ``transpose_torch``."""
COPY_RATIO = 4
"""Maximum bytes that a copy allocates for itself, as a multiple of the bytes it reads.

The factor covers two panels, with elements that a cast may have widened to twice their size.
"""


def copy_equal(batches: Iterable[tuple[Copies, Tensor, Tensor]]) -> None:
    """Carry out batches of copies, with one call for all copies of equal geometry and dtypes.

    Args:
        batches: copies with the source and the target of each; offsets count from the first element of a tensor.
    """
    groups: dict[tuple[object, ...], tuple[list[Tensor], list[Tensor]]] = {}
    for (_, _, box, source_offsets, target_offsets), source, target in batches:
        dst, src = groups.setdefault((source.dtype, target.dtype, box), ([], []))
        dst.extend([strided(target, box.shape, box.target_strides, offset) for offset in target_offsets])
        src.extend([strided(source, box.shape, box.source_strides, offset) for offset in source_offsets])
    for dst, src in groups.values():
        strided_copy_torch(dst, src)
