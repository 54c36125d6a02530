"""Forecast, from headers alone, what each rank of a mesh would hold and read in a load."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any, NamedTuple

from automodel_conv.errors import UnsupportedError, message
from automodel_conv.execution.fallbacks import fallback_calls
from automodel_conv.execution.host import DEFAULT_SCRATCH_BYTES, bytes_of_slot
from automodel_conv.files.checkpoint import Checkpoint
from automodel_conv.planning.plan import CopyPlan
from automodel_conv.planning.sharding import placed
from automodel_conv.schedule.host import schedule

MESH_NAMES = ("replicate", "ep", "fsdp")
# Ranks that are looked at; those of larger meshes are sampled evenly, the first and the last among them.
_MOST_RANKS = 64
_THREADS = 8


class RankCost(NamedTuple):
    """What one rank does."""

    coordinate: tuple[int, ...]
    owned_bytes: int
    """Of its part of all targets."""
    read_bytes: int
    """Of files, gaps between wanted bytes included."""
    calls: int
    """Reads, each of neighbouring bytes of one file."""
    files: int


class Forecast(NamedTuple):
    """What a load costs on the ranks of a mesh that were looked at, and how many there are in all."""

    ranks: tuple[RankCost, ...]
    world_size: int


def parse_mesh(text: str) -> dict[str, int]:
    """Sizes by name from "ep=64,fsdp=8".

    Raises:
        UnsupportedError: another form, an unknown name, one name twice, a size below one.
    """
    parts = [part.partition("=") for part in text.replace(" ", "").split(",")]
    mesh = {name: int(size) for name, _, size in parts if name in MESH_NAMES and size.isdecimal() and int(size)}
    if len(mesh) != len(parts):
        expected = f'sizes of {", ".join(MESH_NAMES)}, such as "ep=64,fsdp=8"'
        raise UnsupportedError(message("not a mesh", expected=expected, found=repr(text)))
    return mesh


def forecast(checkpoint: Checkpoint, plan: CopyPlan, mesh: Mapping[str, int]) -> Forecast:
    """What each rank of a mesh would read.

    Placements are those of the usual trainers: routed experts are divided over ``ep`` by expert, and over ``fsdp`` in
    the next dimension (in the first, if there is no ``ep``); all other tensors over ``fsdp``, and with it over ``ep``,
    in the first dimension; over ``replicate`` nothing is divided.
    Source: nemo_automodel 0.7.0, ``parallelizer._moe_shard_placement``; torchtitan, where ep is part of fsdp.

    Raises:
        UnsupportedError: a target is made by upstream's own code, and would be divided.
    """
    sizes = tuple(mesh.values())
    world_size = prod(sizes)
    count = min(world_size, _MOST_RANKS)
    coordinates = [_coordinate(n * (world_size - 1) // max(count - 1, 1), sizes) for n in range(count)]
    return Forecast(tuple(_cost(checkpoint, plan, mesh, at) for at in coordinates), world_size)


def _coordinate(rank: int, sizes: Sequence[int]) -> tuple[int, ...]:
    """Where a rank is in a mesh; the last dimension counts fastest."""
    found = []
    for size in reversed(sizes):
        rank, at = divmod(rank, size)
        found.append(at)
    return tuple(reversed(found))


def _cost(checkpoint: Checkpoint, plan: CopyPlan, mesh: Mapping[str, int], coordinate: tuple[int, ...]) -> RankCost:
    sizes = tuple(mesh.values())
    regions = {
        target.name: placed(target.shape, sizes, coordinate, _placements(target.name, target.shape, mesh))
        for target in plan.targets
    }
    mine = plan.shard(regions)
    targets = [target for target in mine.targets if target.fallback is None and prod(target.shape)]
    slots = bytes_of_slot(_THREADS, DEFAULT_SCRATCH_BYTES)
    copies = [target.copies for target in targets]
    jobs = schedule(targets, copies, checkpoint, plan.sources.decodes, threads=_THREADS, slot_bytes=slots)
    calls = [call for job in jobs for call in job.reads.calls()]
    reads = [(int(call.file[0]), int(call.stop_bytes[-1] - call.offset_bytes[0])) for call in calls]
    rows = [row for call in fallback_calls(mine) for row in call.rows]  # read whole
    reads += [(checkpoint.file_ids[row], checkpoint.nbytes[row]) for row in rows]
    files = {file for file, _ in reads}
    return RankCost(coordinate, mine.bytes_written, sum(nbytes for _, nbytes in reads), len(reads), len(files))


def _placements(name: str, shape: Sequence[int], mesh: Mapping[str, int]) -> list[Any]:
    from torch.distributed.tensor import Replicate, Shard

    experts = name.rpartition(".")[0].endswith("experts")
    placements: list[Any] = []
    for dim in mesh:
        if dim == "replicate" or not shape or (dim == "ep" and not experts and "fsdp" not in mesh):
            placements.append(Replicate())
        elif dim == "fsdp" and experts and "ep" in mesh and len(shape) > 1:
            placements.append(Shard(1))
        else:
            placements.append(Shard(0))
    return placements
