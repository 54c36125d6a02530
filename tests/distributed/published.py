"""Suite: models sharded in every way yield their published tensors, and state who owns them."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.tensor import Shard

import automodel_conv as amc
from automodel_conv.distributed.ownership import owned_targets
from automodel_conv.planning.divisions import Division, chunk
from automodel_conv.publishing.named_tensors import Gather, named_tensors
from automodel_conv.testing import assert_bytes_equal
from tests.distributed.models import (
    TRANSPOSING,
    Meshes,
    Published,
    assert_same_tensors,
    local,
    placed_by,
    published,
    read_all,
    rope_types,
    sharded,
)
from tests.distributed.starting import send

TYPES = ["qwen3_moe", "deepseek_v3", TRANSPOSING, *rope_types()]
SOME_TYPES = ["qwen3_moe", TRANSPOSING]
VOCABULARY = 131
EVERY_TYPE = ", every type"
"""End of a variant that goes through ``TYPES`` instead of ``SOME_TYPES``."""
KINDS = {
    2: ["none", "experts", "columns", "inner", "fsdp"],
    4: ["experts x fsdp", "hsdp", "fsdp over tensor", "replicas of tensor"],
}


def prepare(directory: Path, world: int) -> dict[str, Published]:
    return {name: published(name, directory) for name in TYPES}


def rank(common: dict[str, Published], variant: str, directory: Path) -> None:
    meshes = Meshes()
    kind, _, every = variant.partition(", ")
    for name in TYPES if every else SOME_TYPES:
        source = common[name]
        model = sharded_or_replicated(source, kind, meshes)
        amc.load_model(model, source.path)
        wanted = read_all(source.saved)
        for step in (yields_what_is_saved, owners_hold_what_is_stated, dense_tensors_are_divided, owners_gather_alone):
            try:
                step(model, wanted, kind)
            except Exception as error:
                raise AssertionError(f"{name}, {step.__name__}") from error
        send(name)


def sharded_or_replicated(source: Published, kind: str, meshes: Meshes) -> torch.nn.Module:
    """Return a sharded model; ``replicas of tensor``: each pair of ranks has a mesh and a whole model."""
    if kind != "replicas of tensor":
        return sharded(source, kind, meshes)
    model = sharded(source, "none", meshes)
    placed_by(model, meshes(2, dist.get_world_size() // 2)["inner"], lambda *_: [Shard(0)])
    return model


def yields_what_is_saved(model: torch.nn.Module, wanted: dict[str, torch.Tensor], kind: str) -> None:
    for contiguous in (False, True):
        tensors = dict(amc.published_tensors(model, contiguous=contiguous))
        assert_same_tensors(tensors, wanted)
        assert not contiguous or all(tensor.is_contiguous() for tensor in tensors.values())


def owners_hold_what_is_stated(model: torch.nn.Module, wanted: dict[str, torch.Tensor], kind: str) -> None:
    named = named_tensors(model)
    tensors = named.tensors()
    own_memory = {local(tensor).untyped_storage().data_ptr() for tensor in tensors}
    for by_holders in (False, True):
        owned = owned_targets(named.plan, tensors, by_holders=by_holders)
        same_on_all([(*own[:3], own.gathered) for own in owned])
        for target, own in zip(named.plan.targets, owned, strict=True):
            rank = dist.get_rank()
            if not own.is_owner(rank) or not own.is_local:
                continue
            whole = wanted[target.name]
            if own.owners is None or own.sharded is None:
                assert own.is_whole
                part = whole
            else:
                at = tuple(torch.tensor(own.owners).reshape(own.mesh_shape).eq(rank).nonzero()[0].tolist())
                division = Division(tuple(range(len(at))), own.sharded)
                start, lengths = chunk(tuple(whole.shape), own.mesh_shape, division, at)
                part = whole[tuple(slice(low, low + size) for low, size in zip(start, lengths, strict=True))]
            held = named.part(target, own.part, tensors)
            assert_bytes_equal(held, part)
            if ".experts." in target.name and held.numel():
                assert held.untyped_storage().data_ptr() in own_memory, target.name


def dense_tensors_are_divided(model: torch.nn.Module, wanted: dict[str, torch.Tensor], kind: str) -> None:
    """Check what is stated of embeddings, which are saved as they are."""
    named = named_tensors(model)
    owned = owned_targets(named.plan, named.tensors(), by_holders=False)
    owners = {own[:3] for target, own in zip(named.plan.targets, owned, strict=True) if target.shape[0] == VOCABULARY}
    stated = {
        "none": (None, None, None),
        "experts": ((0, 1), (2,), None),
        "columns": ((0, 1), (2,), (1,)),
        "inner": ((0, 1), (2,), (1,)),
        "fsdp": ((0, 1), (2,), (0,)),
        "experts x fsdp": ((0, 1, 2, 3), (2, 2), (None, 0)),
        "hsdp": ((0, 1, 2, 3), (2, 2), (None, 0)),
        "fsdp over tensor": ((0, 2, 1, 3), (2, 2), (0, 0)),
        "replicas of tensor": ((0, 1, 2, 3), (2, 2), (None, 0)),
    }
    assert owners == {stated[kind]}


def owners_gather_alone(model: torch.nn.Module, wanted: dict[str, torch.Tensor], kind: str) -> None:
    """Check that owners of an expert gather it without the other ranks, if the mesh has a dimension for that."""
    named = named_tensors(model)
    owned = owned_targets(named.plan, named.tensors(), by_holders=True)
    own = {target.name: each for target, each in zip(named.plan.targets, owned, strict=True)}
    ranks = {name: (each.owners, each.gathered) for name, each in own.items() if ".experts." in name}
    if kind == "experts x fsdp":
        # Gate and up are whole on one rank each, down is divided over two, and tensors of all experts over four.
        owners = {((0, 1), (1,)), ((2, 3), (1,))}
        assert {*ranks.values()} <= {*owners, *(((rank,), ()) for rank in range(4)), ((0, 1, 2, 3), None)}
        assert bool({*ranks.values()} & owners) == any(".experts.0." in name for name in wanted)
    rank = dist.get_rank()
    due = [target for target in named.plan.targets if own[target.name].is_owner(rank)]
    gathers = {
        target.name: Gather(each.gathered, each.gathered_part)
        for target in due
        if (each := own[target.name]).gathered is not None and each.gathered_part is not None
    }
    tensors = dict(named.whole(due, gathers))
    assert_same_tensors(tensors, {target.name: wanted[target.name] for target in due})


def same_on_all(value: object) -> None:
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    assert all(other == value for other in values)
