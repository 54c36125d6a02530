"""A rank's part of a tensor, and of a plan: the copies that fill it, and no others.

Placements are torch's own (``torch.distributed.tensor``), and torch's own code says what they mean: it splits the
indices of a dimension as it would split the tensor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import pairwise, product
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from automodel_conv.errors import CoverageError, UnsupportedError, message
from automodel_conv.planning.boxes import Box, Piece, contiguous_strides
from automodel_conv.planning.composition import table_of
from automodel_conv.planning.copies import Target, group_pieces
from automodel_conv.planning.plan import CopyPlan


class Region(NamedTuple):
    """Part of a tensor: in each dimension, runs ``(start, length)`` of indices, which the part holds one by one."""

    shape: tuple[int, ...]
    """Of the whole tensor."""
    runs: tuple[tuple[tuple[int, int], ...], ...]

    @property
    def local_shape(self) -> tuple[int, ...]:
        """Of the part."""
        return tuple(sum(length for _, length in runs) for runs in self.runs)

    @property
    def is_whole(self) -> bool:
        return self.local_shape == self.shape

    def pieces(self) -> list[Piece]:
        """Copies from the whole, contiguous, to the part, contiguous."""
        outer, inner = contiguous_strides(self.shape), contiguous_strides(self.local_shape)
        placed = [list(zip(runs, _starts(runs), strict=True)) for runs in self.runs]
        return [
            Piece(
                0,
                Box(tuple(length for (_, length), _ in box), outer, inner),
                sum(start * stride for ((start, _), _), stride in zip(box, outer, strict=True)),
                sum(start * stride for (_, start), stride in zip(box, inner, strict=True)),
            )
            for box in product(*placed)
        ]


def whole(shape: Sequence[int]) -> Region:
    """All of a tensor."""
    return box(shape, [0] * len(shape), shape)


def box(shape: Sequence[int], offsets: Sequence[int], lengths: Sequence[int]) -> Region:
    """One rectangle of a tensor.

    Raises:
        CoverageError: it leaves the tensor.
    """
    if not len(shape) == len(offsets) == len(lengths) or any(
        not 0 <= offset <= offset + length <= size for size, offset, length in zip(shape, offsets, lengths, strict=True)
    ):
        found = f"offsets {list(offsets)}, lengths {list(lengths)}"
        raise CoverageError(message("a box that leaves its tensor", expected=f"within {list(shape)}", found=found))
    runs = tuple(((offset, length),) if length else () for offset, length in zip(offsets, lengths, strict=True))
    return Region(tuple(shape), runs)


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


def shard_plan(plan: CopyPlan, regions: Mapping[str, Region]) -> CopyPlan:
    """The plan that fills these parts of its targets, each a contiguous tensor of its own.

    Args:
        regions: by target name; targets without one are filled whole.

    Raises:
        CoverageError, UnsupportedError: see ``parts_plan``.
    """
    if not any(target.name in regions for target in plan.targets):
        return plan
    names = [target.name for target in plan.targets]
    wholes = {target.name: whole(target.shape) for target in plan.targets if target.name not in regions}
    parts = [Part(name, name, regions[name] if name in regions else wholes[name]) for name in names]
    return replace(parts_plan(plan, parts), tied=plan.tied, layout=plan.layout)


class Part(NamedTuple):
    """A region of a target, to be filled as a tensor of its own."""

    target: str
    called: str
    """Its own name."""
    region: Region
    dtype: str | None = None
    """To be cast to; None: the target's."""


def parts_plan(plan: CopyPlan, parts: Sequence[Part]) -> CopyPlan:
    """The plan that makes parts of its targets, each a contiguous tensor of its own.

    Raises:
        CoverageError: a region of a tensor of another shape.
        UnsupportedError: less than all of a target that upstream's own code makes, or a part that would be cast twice.
    """
    rows = {target.name: row for row, target in enumerate(plan.targets)}
    targets = []
    for part in parts:
        row = rows[part.target]
        target, region = plan.targets[row], part.region
        if region.shape != target.shape:
            found = f"a region of {list(region.shape)}"
            raise CoverageError(message(f"{target.name} has another shape", expected=list(target.shape), found=found))
        dtype = part.dtype or target.dtype
        targets.append(Target(part.called, dtype, region.local_shape, -1, (row,), _copies(region)))
    return plan.then(CopyPlan(table_of(plan.targets), tuple(targets)))


@lru_cache(maxsize=4096)
def _copies(region: Region):
    return group_pieces(piece.canonical() for piece in region.pieces())


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


def _starts(runs: Sequence[tuple[int, int]]) -> list[int]:
    starts, at = [], 0
    for _, length in runs:
        starts.append(at)
        at += length
    return starts
