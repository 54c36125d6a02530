"""Determine which ranks own the targets of a plan, and which part of each target this rank holds without a gather.

Nothing is read or gathered. Ranks exchange only which meshes they are in, so that all of them find the same owners.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from math import prod
from typing import Any, NamedTuple

import numpy as np
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import Replicate, Shard

from automodel_conv.distributed.collectives import all_gather_bytes, rank_of_this, require_same_on_all
from automodel_conv.distributed.placements import is_distributed
from automodel_conv.planning.copies import Target
from automodel_conv.planning.divisions import Coordinate, chunk, division_of, whole_holders
from automodel_conv.planning.plan import CopyPlan
from automodel_conv.planning.regions import Region
from automodel_conv.planning.sharding import placed
from automodel_conv.planning.views import HeldPart, held_part


class Owned(NamedTuple):
    """The ranks that own a target, and what they hold of it."""

    owners: tuple[int, ...] | None
    """Global ranks, in the order of ``mesh_shape``; None: all ranks, and each holds all of the target."""
    mesh_shape: tuple[int, ...] | None
    """Shape of the mesh of the owners; None without owners."""
    sharded: tuple[int | None, ...] | None
    """For each dimension of that mesh, the dimension of the target that it splits; None: it holds replicas.

    None instead of a tuple: each owner holds all of the target, or the parts that they hold are no division.
    """
    part: HeldPart | None
    """The part of the target that this rank holds; None: it is no box, or the target has several divided sources."""
    gathered: tuple[int, ...] | None
    """Dimensions of its source's mesh over which owners gather the source to hold all of the target.

    (): each owner holds all of the target already. None: all dimensions.
    """
    gathered_part: HeldPart | None
    """The target, from the part of its source that an owner has gathered; None if ``gathered`` is None."""

    def is_owner(self, rank: int) -> bool:
        """Return whether a rank owns the target."""
        return self.owners is None or rank in self.owners

    @property
    def is_whole(self) -> bool:
        """Whether each owner holds all of the target."""
        return self.gathered == ()

    @property
    def is_local(self) -> bool:
        """Whether owners can state what they hold without a gather."""
        return self.is_whole or self.sharded is not None


class _Grid(NamedTuple):
    """The ranks that hold the parts of a DTensor, and the division among them."""

    ranks: np.ndarray
    """Global ranks by coordinate. The first dimension is over meshes that each hold all of the tensor."""
    placements: tuple[Any, ...]
    replicas: int
    """Number of leading dimensions that are not in the mesh of the DTensor itself."""

    @property
    def is_replicated(self) -> bool:
        return all(placement.is_replicate() for placement in self.placements)

    def gathered(self, dims: Sequence[int]) -> _Grid:
        """Return the grid of the DTensor after it is gathered over some dimensions."""
        placements = enumerate(self.placements)
        return self._replace(placements=tuple(Replicate() if dim in dims else each for dim, each in placements))


def owned_targets(plan: CopyPlan, tensors: Sequence[Tensor], *, by_holders: bool) -> list[Owned]:
    """Return who owns each target of a plan; the same owners on all ranks.

    A target of plain tensors belongs to all ranks. With DTensors this is a collective of all ranks of the default
    process group.

    Args:
        plan: the plan of the targets.
        tensors: its sources by row, plain or DTensors.
        by_holders: a target that some ranks hold all of belongs to these ranks only, such as an expert to the ranks
            that have it. Otherwise, a target belongs to all ranks in the meshes of its sources.

    Raises:
        RankError: ranks have different tensors or divide them differently, or a rank no longer responds.
    """
    grids = _grids(plan.sources.names, tensors)
    finder = _Finder(by_holders)
    return [
        finder([grids.get(row) for row in target.sources], [plan.sources.shapes[row] for row in target.sources], target)
        for target in plan.targets
    ]


class _Finder:
    """Finds the owners of targets; targets that share copies and divisions share them."""

    def __init__(self, by_holders: bool) -> None:
        self._by_holders = by_holders
        self._regions: dict[tuple[object, ...], dict[Coordinate, Region]] = {}
        self._owned: dict[tuple[object, ...], Owned] = {}

    def __call__(self, grids: Sequence[_Grid | None], shapes: Sequence[tuple[int, ...]], target: Target) -> Owned:
        key = id(target.copies), id(target.fallback), target.shape, tuple(map(id, grids)), tuple(shapes)
        if key not in self._owned:
            self._owned[key] = self._find([grid for grid in grids if grid is not None], shapes, target)
        return self._owned[key]

    def _find(self, grids: list[_Grid], shapes: Sequence[tuple[int, ...]], target: Target) -> Owned:
        whole = HeldPart((0,) * len(target.shape), target.shape, target.copies)
        if not grids:
            return Owned(None, None, None, whole, (), whole)
        is_replicated = all(grid.is_replicated for grid in grids)
        if is_replicated or len(shapes) > 1 or target.fallback is not None or target.fills:
            first, *others = (grid.ranks.flatten().tolist() for grid in grids)
            owners = tuple(rank for rank in first if all(rank in other for other in others))
            if is_replicated:
                return Owned(owners, (len(owners),), None, whole, (), whole)
            return Owned(owners, (len(owners),), None, None, None, None)
        return self._divided(grids[0], shapes[0], target)

    def _divided(self, grid: _Grid, shape: tuple[int, ...], target: Target) -> Owned:
        parts = self._parts(grid, shape, target)
        own = next((at for at in parts if grid.ranks[at] == rank_of_this()), None)
        part = None if own is None else parts[own]
        holders = whole_holders(target.shape, parts)
        if holders and (self._by_holders or len(holders) == len(parts)):
            owners = tuple(int(grid.ranks[at]) for at in holders)
            return Owned(owners, (len(owners),), None, part, (), part)
        gathered = gathered_part = None
        axes = [range(size) for size in grid.ranks.shape]  # coordinates of the owners
        for dims in _to_gather(grid) if self._by_holders else ():
            after = self._parts(grid.gathered(dims), shape, target)
            holders = whole_holders(target.shape, after)
            of_holders = [sorted({at[axis] for at in holders}) for axis in range(len(axes))]
            if holders and len(holders) == prod(map(len, of_holders)):
                axes, gathered = of_holders, tuple(dim - grid.replicas for dim in dims)
                gathered_part = None if own is None else after[own]
                break
        ranks = grid.ranks[np.ix_(*axes)]
        own_parts = {
            at: parts[tuple(int(axis[i]) for axis, i in zip(axes, at, strict=True))] for at in np.ndindex(ranks.shape)
        }
        is_split = [not placement.is_replicate() for placement in grid.placements]
        division = division_of(target.shape, ranks.shape, is_split, own_parts)
        if division is None:
            return Owned(tuple(ranks.flatten().tolist()), ranks.shape, None, part, gathered, gathered_part)
        at = next((at for at in own_parts if ranks[at] == rank_of_this()), None)
        if at is not None and part is not None:  # a part without elements has the shape that the division gives it
            part = part._replace(shape=chunk(target.shape, ranks.shape, division, at)[1])
        ranks = ranks.transpose(division.order)
        owners = tuple(ranks.flatten().tolist())
        return Owned(owners, ranks.shape, division.sharded, part, gathered, gathered_part)

    def _parts(self, grid: _Grid, shape: tuple[int, ...], target: Target) -> dict[Coordinate, HeldPart | None]:
        """Return the part of a target that each rank holds."""
        part_of: dict[Region, HeldPart | None] = {}
        parts = {}
        for at, region in self._regions_of(grid, shape).items():
            if region not in part_of:
                part_of[region] = held_part(target.shape, target.copies, region)
            parts[at] = part_of[region]
        return parts

    def _regions_of(self, grid: _Grid, shape: tuple[int, ...]) -> dict[Coordinate, Region]:
        size = grid.ranks.shape
        key = size, grid.placements, shape
        if key not in self._regions:
            self._regions[key] = {at: placed(shape, size, at, grid.placements) for at in np.ndindex(size)}
        return self._regions[key]


def _to_gather(grid: _Grid) -> Iterator[tuple[int, ...]]:
    """Yield sets of dimensions over which a DTensor can be gathered in part, the smallest first.

    Strided shards depend on the shards of other dimensions, so they are only gathered over all.
    """
    split = [dim for dim, placement in enumerate(grid.placements) if not placement.is_replicate()]
    if all(type(grid.placements[dim]) is Shard for dim in split):
        for count in range(1, len(split)):
            yield from combinations(split, count)


def _grids(names: Sequence[str], tensors: Sequence[Tensor]) -> Mapping[int, _Grid]:
    """Return the grid of each DTensor by row; equal ones are one object."""
    distributed = {row: tensor for row, tensor in enumerate(tensors) if is_distributed(tensor)}
    if not distributed:
        return {}
    groups = [dist.group.WORLD]
    described = [f"{names[row]} {list(t.shape)} {t.dtype} {_division_of(t)}" for row, t in enumerate(tensors)]
    require_same_on_all(groups, [text.encode() + b"\n" for text in described], "the tensors to be published")
    meshes = {row: _own_mesh(tensor) for row, tensor in distributed.items()}
    distinct = list(dict.fromkeys(meshes.values()))
    data = json.dumps([distinct, {row: distinct.index(mesh) for row, mesh in meshes.items()}]).encode()
    by_row: dict[int, dict[str, None]] = {row: {} for row in distributed}
    for gathered in all_gather_bytes(groups, data, "determining which ranks own each tensor"):
        rank_meshes, rows = json.loads(gathered)
        for row, number in rows.items():
            if rank_meshes[number]:
                by_row[int(row)][rank_meshes[number]] = None
    grids: dict[tuple[object, ...], _Grid] = {}
    found = {}
    for row, tensor in distributed.items():
        placements = (Replicate(), *tensor.placements)  # type: ignore[attr-defined]
        key = tuple(sorted(by_row[row])), placements
        if key not in grids:
            stacked = np.stack([np.array(mesh) for mesh in sorted(map(json.loads, by_row[row]))])
            grids[key] = _Grid(stacked, placements, 1) if len(stacked) > 1 else _Grid(stacked[0], placements[1:], 0)
        found[row] = grids[key]
    return found


def _division_of(tensor: Tensor) -> str:
    if not is_distributed(tensor):
        return ""
    return f"{tensor.placements} {tuple(tensor.device_mesh.shape)}"  # type: ignore[attr-defined]


def _own_mesh(tensor: Tensor) -> str:
    """Return the ranks of a DTensor's mesh as JSON; "" if this rank is not one of them."""
    mesh = tensor.device_mesh  # type: ignore[attr-defined]
    return "" if mesh.get_coordinate() is None else json.dumps(mesh.mesh.tolist())
