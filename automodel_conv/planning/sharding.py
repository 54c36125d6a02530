"""What a rank holds of a distributed tensor, as torch's own placements say.

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
    """What the rank at ``coordinate`` of a mesh holds of a tensor with these placements.

    Any of torch's placements: ``Replicate``, ``Shard``, and the strided shards of FSDP2 over tensor parallelism.

    Raises:
        UnsupportedError: ``Partial``, which is no part of a tensor.
    """
    kinds = [
        (p, size, at) for p, size, at in zip(placements, mesh_shape, coordinate, strict=True) if not p.is_replicate()
    ]
    partial = [str(placement) for placement, _, _ in kinds if placement.is_partial()]
    if partial:
        raise UnsupportedError(
            message("partial sums cannot be loaded or saved", found=partial, do="redistribute first")
        )
    runs = []
    for dim, length in enumerate(shape):
        splits = tuple((p, size, at) for p, size, at in kinds if p.dim % len(shape) == dim)
        runs.append(_runs(length, dim, splits) if splits else ((0, length),) if length else ())
    return Region(tuple(shape), tuple(runs))


def region_of(tensor: Tensor) -> Region:
    """What this rank holds of a tensor: of a DTensor its shard, of any other all.

    Raises:
        UnsupportedError: see ``placed``; or a part of another shape than the placements say.
    """
    if not hasattr(tensor, "placements"):
        return whole(tuple(tensor.shape))
    mesh = tensor.device_mesh  # type: ignore[attr-defined]
    coordinate = mesh.get_coordinate()
    if coordinate is None:  # this rank is not in the mesh, and holds nothing: of a number a part of shape [0]
        return Region(tuple(tensor.shape), tuple(() for _ in tensor.shape) or ((),))
    found = placed(tuple(tensor.shape), tuple(mesh.shape), coordinate, tensor.placements)  # type: ignore[attr-defined]
    held = tuple(tensor.to_local().shape)  # type: ignore[attr-defined]
    if held != found.local_shape:
        raise UnsupportedError(
            message(
                "this rank does not hold the part of a DTensor that its placements say",
                where=f"{list(tensor.shape)}, {tensor.placements}",  # type: ignore[attr-defined]
                expected=list(found.local_shape),
                found=list(held),
            )
        )
    return found


@lru_cache(maxsize=4096)
def _runs(length: int, dim: int, splits: tuple[tuple[Any, int, int], ...]) -> tuple[tuple[int, int], ...]:
    """The indices of one dimension that are left after placements have split it in turn, as runs."""
    indices = torch.arange(length).reshape([1] * dim + [length])
    for placement, size, at in _in_turn(splits):
        parts, _ = placement._split_tensor(indices, size, with_padding=False, contiguous=False)
        indices = parts[at]
    found = indices.reshape(-1)
    if not len(found):
        return ()
    cuts = (found[1:] != found[:-1] + 1).nonzero().reshape(-1).add(1).tolist()
    bounds = [0, *cuts, len(found)]
    return tuple((int(found[first]), last - first) for first, last in pairwise(bounds))


def _in_turn(splits: Sequence[tuple[Any, int, int]]) -> list[tuple[Any, int, int]]:
    """Placements on one dimension in the order in which they split it.

    From left to right; but a strided shard that stands before as many shards as its factor says is FSDP2's over tensor
    parallelism: it divides, plainly, what these have left.
    Source: torch 2.13.0, ``_StridedShard`` in placement_types.py and ``FSDPParam._init_sharded_param``.
    """
    from torch.distributed.tensor import Shard

    first, last = [], []
    for number, (placement, size, at) in enumerate(splits):
        factor = getattr(placement, "split_factor", 1)
        if factor > 1 and factor == prod(later for _, later, _ in splits[number + 1 :]):
            last.insert(0, (Shard(placement.dim), size, at))
        else:
            first.append((placement, size, at))
    return [*first, *last]
