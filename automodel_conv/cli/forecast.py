"""Forecasts of the bytes that each rank of a mesh would hold and read in a load, from headers only."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any, NamedTuple

import numpy as np

from automodel_conv.errors import UnsupportedError, message
from automodel_conv.execution.fallbacks import fallback_calls
from automodel_conv.execution.host import DEFAULT_SCRATCH_BYTES, bytes_of_slot
from automodel_conv.files.checkpoint import Checkpoint
from automodel_conv.planning.plan import CopyPlan
from automodel_conv.planning.regions import Region
from automodel_conv.planning.sharding import placed
from automodel_conv.schedule.calls import calls_of_load

MESH_NAMES = ("replicate", "ep", "fsdp")
# Ranks that are computed at most. Ranks of larger meshes are sampled evenly, including the first and the last.
_MOST_RANKS = 64
_THREADS = 8


class RankCost(NamedTuple):
    """The cost of a load on one rank."""

    coordinate: tuple[int, ...]
    """Position of the rank in the mesh."""
    owned_bytes: int
    """Bytes of its part of all targets."""
    read_bytes: int
    """Bytes that it reads from files, including gaps between the bytes it needs."""
    calls: int
    """Number of reads, each of neighbouring bytes of one file."""
    files: int
    """Number of files that it reads."""


class Forecast(NamedTuple):
    """The cost of a load on the sampled ranks of a mesh, and the number of all ranks."""

    ranks: tuple[RankCost, ...]
    world_size: int


def parse_mesh(text: str) -> dict[str, int]:
    """Parse sizes by name, such as "ep=64,fsdp=8".

    Raises:
        UnsupportedError: another form, an unknown name, a name that occurs twice, or a size below one.
    """
    return parse_sizes(text, MESH_NAMES, "ep=64,fsdp=8")


def parse_sizes(text: str, names: Sequence[str], example: str) -> dict[str, int]:
    """Parse sizes by name; see ``parse_mesh``.

    Args:
        text: the text.
        names: the names that it may have.
        example: such a text, for the error.
    """
    parts = [part.partition("=") for part in text.replace(" ", "").split(",")]
    sizes = {name: int(size) for name, _, size in parts if name in names and size.isdecimal() and int(size)}
    if len(sizes) != len(parts):
        expected = f'sizes of {", ".join(names)}, such as "{example}"'
        raise UnsupportedError(message("not a mesh", expected=expected, found=repr(text)))
    return sizes


def forecast(
    checkpoint: Checkpoint,
    plan: CopyPlan,
    mesh: Mapping[str, int],
    begin_step: Callable[[str], None] = lambda step: None,
) -> Forecast:
    """Return what each rank of a mesh would hold and read.

    Placements are those of common trainers. Routed experts are divided over ``ep`` by expert, and over ``fsdp`` in the
    next dimension (in the first, if there is no ``ep``). All other tensors are divided in the first dimension over
    ``fsdp``, and also over ``ep`` if there is ``fsdp``. Nothing is divided over ``replicate``.
    Sources: nemo_automodel 0.7.0, ``parallelizer._moe_shard_placement``; torchtitan, in which ep is part of fsdp.

    Args:
        checkpoint: the checkpoint that is loaded.
        plan: the plan of the whole load.
        mesh: size of each dimension of the mesh by name, see ``parse_mesh``.
        begin_step: function that is called with the name of each step before it begins.

    Raises:
        UnsupportedError: transformers' own code computes a target that would be divided.
    """
    sizes = tuple(mesh.values())
    world_size = prod(sizes)
    count = min(world_size, _MOST_RANKS)
    coordinates = [coordinate_of(n * (world_size - 1) // max(count - 1, 1), sizes) for n in range(count)]
    costs = []
    for number, coordinate in enumerate(coordinates, 1):
        begin_step(f"reads of rank {number} of {count}")
        costs.append(_cost(checkpoint, plan, mesh, coordinate))
    return Forecast(tuple(costs), world_size)


def coordinate_of(rank: int, sizes: Sequence[int]) -> tuple[int, ...]:
    """Return the position of a rank in a mesh; the last dimension changes fastest."""
    positions = []
    for size in reversed(sizes):
        rank, position = divmod(rank, size)
        positions.append(position)
    return tuple(reversed(positions))


def _cost(checkpoint: Checkpoint, plan: CopyPlan, mesh: Mapping[str, int], coordinate: tuple[int, ...]) -> RankCost:
    part = plan.shard(regions_at(plan, mesh, coordinate))
    targets = [target for target in part.targets if target.fallback is None and prod(target.shape)]
    slot_bytes = bytes_of_slot(_THREADS, DEFAULT_SCRATCH_BYTES)
    copies = [target.copies for target in targets]
    calls = calls_of_load(targets, copies, checkpoint, plan.sources.decodes, threads=_THREADS, slot_bytes=slot_bytes)
    rows = [row for call in fallback_calls(part) for row in call.rows]  # read as a whole
    files = {*np.unique(calls.file).tolist(), *(checkpoint.file_ids[row] for row in rows)}
    read_bytes = int(calls.nbytes.sum()) + sum(checkpoint.nbytes[row] for row in rows)
    return RankCost(coordinate, part.bytes_written, read_bytes, len(calls.file) + len(rows), len(files))


def regions_at(plan: CopyPlan, mesh: Mapping[str, int], coordinate: Sequence[int]) -> dict[str, Region]:
    """Return the region of each target that the rank at a coordinate of a mesh holds; see ``forecast``."""
    sizes = tuple(mesh.values())
    return {
        target.name: placed(target.shape, sizes, coordinate, placements(target.name, target.shape, mesh))
        for target in plan.targets
    }


def regions_by_rank(plan: CopyPlan, costs: Forecast, mesh: Mapping[str, int]) -> dict[str, dict[str, Region]]:
    """Return the regions of the targets that each forecast rank holds, by a label such as "rank 3: ep=1, fsdp=0"."""
    regions = {}
    for cost in costs.ranks:
        rank = 0
        for position, size in zip(cost.coordinate, mesh.values(), strict=True):
            rank = rank * size + position
        places = ", ".join(f"{name}={position}" for name, position in zip(mesh, cost.coordinate, strict=True))
        regions[f"rank {rank}: {places}"] = regions_at(plan, mesh, cost.coordinate)
    return regions


def placements(name: str, shape: Sequence[int], mesh: Mapping[str, int]) -> list[Any]:
    """Return torch's placements of a tensor on the dimensions of a mesh; see ``forecast``."""
    from torch.distributed.tensor import Replicate, Shard

    experts = name.rpartition(".")[0].endswith("experts")
    placed_as: list[Any] = []
    for dim in mesh:
        if dim == "replicate" or not shape or (dim == "ep" and not experts and "fsdp" not in mesh):
            placed_as.append(Replicate())
        elif dim == "fsdp" and experts and "ep" in mesh and len(shape) > 1:
            placed_as.append(Shard(1))
        else:
            placed_as.append(Shard(0))
    return placed_as
