"""The region that a rank holds of a distributed tensor, computed by torch's own placements.

torch's code splits the indices of a dimension as it would split the tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from math import prod
from typing import Any

import torch
from torch import Tensor

from automodel_conv.errors import UnsupportedError, message
from automodel_conv.planning.regions import Region, whole


def placed(
    shape: Sequence[int], mesh_shape: Sequence[int], coordinate: Sequence[int], placements: Sequence[Any]
) -> Region:
    """Return the region that the rank at ``coordinate`` of a mesh holds of a tensor with these placements.

    Placements are torch's ``Replicate``, ``Shard``, and the strided shards of FSDP2 over tensor parallelism.

    Raises:
        UnsupportedError: a placement is ``Partial``, which is not a part of a tensor.
    """
    splitting = [
        (p, size, index)
        for p, size, index in zip(placements, mesh_shape, coordinate, strict=True)
        if not p.is_replicate()
    ]
    partial = [str(placement) for placement, _, _ in splitting if placement.is_partial()]
    if partial:
        raise UnsupportedError(
            message("partial sums cannot be loaded or saved", found=partial, do="redistribute first")
        )
    runs = []
    for dim, length in enumerate(shape):
        splits = tuple((p, size, index) for p, size, index in splitting if p.dim % len(shape) == dim)
        runs.append(_runs(length, dim, splits) if splits else ((0, length),) if length else ())
    return Region(tuple(shape), tuple(runs))


def region_of(tensor: Tensor) -> Region:
    """Return the region that this rank holds of a tensor: its shard of a DTensor, or all of any other tensor.

    Raises:
        UnsupportedError: as in ``placed``; or the local tensor does not have the shape that the placements imply.
    """
    if not hasattr(tensor, "placements"):
        return whole(tuple(tensor.shape))
    mesh = tensor.device_mesh  # type: ignore[attr-defined]
    coordinate = mesh.get_coordinate()
    if coordinate is None:  # this rank is not in the mesh and holds nothing; its part of a scalar has shape [0]
        return Region(tuple(tensor.shape), tuple(() for _ in tensor.shape) or ((),))
    region = placed(tuple(tensor.shape), tuple(mesh.shape), coordinate, tensor.placements)  # type: ignore[attr-defined]
    held = tuple(tensor.to_local().shape)  # type: ignore[attr-defined]
    if held != region.local_shape:
        raise UnsupportedError(
            message(
                "this rank does not hold the part of a DTensor that its placements imply",
                where=f"{list(tensor.shape)}, {tensor.placements}",  # type: ignore[attr-defined]
                expected=list(region.local_shape),
                found=list(held),
            )
        )
    return region


@lru_cache(maxsize=4096)
def _runs(length: int, dim: int, splits: tuple[tuple[Any, int, int], ...]) -> tuple[tuple[int, int], ...]:
    """Return the indices of one dimension that a rank holds after all placements have split it, as runs."""
    indices = torch.arange(length).reshape([1] * dim + [length])
    for placement, size, index in _split_order(splits):
        parts, _ = placement._split_tensor(indices, size, with_padding=False, contiguous=False)
        indices = parts[index]
    indices = indices.reshape(-1)
    if not len(indices):
        return ()
    cuts = (indices[1:] != indices[:-1] + 1).nonzero().reshape(-1).add(1).tolist()
    bounds = [0, *cuts, len(indices)]
    return tuple((int(indices[first]), last - first) for first, last in pairwise(bounds))


def _split_order(splits: Sequence[tuple[Any, int, int]]) -> list[tuple[Any, int, int]]:
    """Return the placements of one dimension in the order in which they split it.

    Placements split from left to right, with one exception. A strided shard whose factor is the number of shards of all
    later placements comes from FSDP2 over tensor parallelism. It splits last, as a plain shard.
    Source: torch 2.13.0, ``_StridedShard`` in placement_types.py and ``FSDPParam._init_sharded_param``.
    """
    from torch.distributed.tensor import Shard

    first, last = [], []
    for number, (placement, size, index) in enumerate(splits):
        factor = getattr(placement, "split_factor", 1)
        if factor > 1 and factor == prod(later for _, later, _ in splits[number + 1 :]):
            last.insert(0, (Shard(placement.dim), size, index))
        else:
            first.append((placement, size, index))
    return [*first, *last]
