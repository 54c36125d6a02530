"""Suite: expert parallelism of every make is saved whole, or not at all and every rank is told the same.

Each kind is saved by ``save_checkpoint`` and by ``torch.distributed.checkpoint``. Experts that are local are plain
tensors of a rank's own ``E / 2``; ``fsdp`` after that divides them over the ranks that have the same ones.
"""

from __future__ import annotations

import copy
import os
import shutil
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from transformers.distributed import DistributedConfig

import automodel_conv as amc
from automodel_conv.integrations.dcp import HuggingFaceWriter
from tests.distributed.models import Meshes, Published, assert_same_tensors, local, placed_by, published, read_all
from tests.distributed.starting import say

EXPERTS = 8


class What(NamedTuple):
    """What is saved, and what ``HuggingFaceWriter`` and ``save_checkpoint`` take besides."""

    saved: nn.Module | dict[str, Tensor]
    options: dict


def prepare(directory: Path, world: int) -> dict[str, Published]:
    shares = {"vocab_size": 66 * world, "num_attention_heads": world, "num_key_value_heads": world}
    (directory / "single").mkdir()
    return {
        "": published("qwen3_moe", directory, num_experts=EXPERTS, **shares),
        "one expert": published("qwen3_moe", directory / "single", num_experts=1, num_experts_per_tok=1, **shares),
    }


def rank(common: dict[str, Published], variant: str, directory: Path) -> None:
    number, world = str(dist.get_rank()), str(dist.get_world_size())
    os.environ |= {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": world}  # what transformers goes by
    meshes = Meshes()
    for kind in VARIANTS[variant][dist.get_world_size()]:
        of = common.get(kind, common[""])
        make = KINDS[kind]
        what = make(of, meshes)
        if what is None:
            say({"kind": kind, "made": False})
            continue
        wanted = read_all(of.saved) if isinstance(what.saved, nn.Module) else None
        outcome = {}
        for way, save in (("save", saves), ("dcp", saves_by_dcp)):
            own = directory / f"{kind}, {way}"
            # A save without DTensors is each rank's own.
            place = own / number if kind in ALONE and way == "save" else own
            outcome[way] = save(what, place)
            dist.barrier()
            if outcome[way] is None and number == "0":
                assert_same_tensors(read_all(place), wanted or wholes(what.saved))
            outcome[f"{way} left"] = sorted(str(path) for path in own.rglob("*") if not path.is_dir())
            dist.barrier()
            if number == "0":
                shutil.rmtree(own, ignore_errors=True)
        say({"kind": kind, "made": True} | outcome)


def saves(what: What, directory: Path) -> list | None:
    try:
        amc.save_checkpoint(what.saved, directory, **what.options)
    except amc.ConversionError as error:
        return [type(error).__name__, str(error)]
    return None


def saves_by_dcp(what: What, directory: Path) -> list | None:
    is_model = isinstance(what.saved, nn.Module)
    state = what.saved.state_dict() if is_model else what.saved
    writer = HuggingFaceWriter(directory, what.saved if is_model else None, **what.options)
    try:
        dcp.save(state, storage_writer=writer)
    except CheckpointException as error:
        [told] = {(type(found).__name__, str(found)) for found, _ in error.failures.values()}
        return list(told)
    return None


def wholes(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """What all ranks made their parts of, in ``odd_shards``."""
    return {name: values(name) for name in state}


def by_transformers(**sizes):
    """Its own parallelism, as ``from_pretrained`` takes it; None where this release has none of that kind."""

    def make(of: Published, meshes: Meshes) -> What | None:
        world = dist.get_world_size()
        known = DistributedConfig.__dataclass_fields__
        if not sizes.keys() <= known.keys():
            return None
        given = {name: size(world) for name, size in sizes.items()}
        config = DistributedConfig(**given)
        model = type(of.model).from_pretrained(of.path, distributed_config=config)
        return What(model, {})

    return make


def all_of(world: int) -> int:
    return world


def half(world: int) -> int:
    return world // 2


def two(world: int) -> int:
    return 2


def with_local_experts(of: Published, meshes: Meshes) -> nn.Module:
    """The whole model but for its experts, of which this rank has those of its place on the inner dimension."""
    model = copy.deepcopy(of.model)
    at = meshes(dist.get_world_size() // 2, 2)["inner"].get_local_rank()
    for module in model.modules():
        for leaf in ("gate_up_proj", "down_proj"):
            parameter = module._parameters.get(leaf)
            if parameter is not None:
                module._parameters[leaf] = nn.Parameter(parameter.data.chunk(2)[at].clone())
    return model


def experts_of(model: nn.Module) -> set[nn.Parameter]:
    return {parameter for name, parameter in model.named_parameters() if ".experts." in name}


def plain(of: Published, meshes: Meshes) -> What:
    model = with_local_experts(of, meshes)
    fully_shard(model, mesh=meshes(dist.get_world_size()), ignored_params=experts_of(model))
    return What(model, {})


def alone(of: Published, meshes: Meshes) -> What:
    return What(with_local_experts(of, meshes), {})


def on_sub_meshes(of: Published, meshes: Meshes) -> What:
    model = with_local_experts(of, meshes)
    fully_shard(model, mesh=meshes(dist.get_world_size() // 2, 2)["outer"])
    return What(model, {})


def replicated_on_sub_meshes(of: Published, meshes: Meshes) -> What:
    model = with_local_experts(of, meshes)
    placed_by(model, meshes(dist.get_world_size() // 2, 2)["outer"], lambda name, parameter: [Replicate()])
    return What(model, {})


def without_a_model(of: Published, meshes: Meshes) -> What:
    """The rows of the router say how many experts there are."""
    return What(plain(of, meshes).saved.state_dict(), {"rules": amc.get_model_conversion_mapping(of.model)})


def without_a_router(make):
    """Nothing says how many experts there are; the bytes do not agree."""

    def made(of: Published, meshes: Meshes) -> What:
        state = make(of, meshes).saved.state_dict()
        state = {name: tensor for name, tensor in state.items() if not name.endswith(".gate.weight")}
        return What(state, {"rules": amc.get_model_conversion_mapping(of.model)})

    return made


def hsdp(of: Published, meshes: Meshes) -> What:
    model = copy.deepcopy(of.model)
    fully_shard(model, mesh=meshes(2, dist.get_world_size() // 2))
    return What(model, {})


def drifted(of: Published, meshes: Meshes) -> What:
    what = hsdp(of, meshes)
    if dist.get_rank() == dist.get_world_size() - 1:
        part = local(what.saved.state_dict()["model.layers.1.mlp.experts.down_proj"])
        part.view(torch.int16).view(-1)[-1] ^= 1
    return what


def with_other_buffers(of: Published, meshes: Meshes) -> What:
    state = dict(hsdp(of, meshes).saved.state_dict())
    state["steps"] = torch.tensor(dist.get_rank() // (dist.get_world_size() - 1))
    return What(state, {"rules": amc.get_model_conversion_mapping(of.model)})


def with_other_sizes(of: Published, meshes: Meshes) -> What:
    """The last rank has one expert less than the others."""
    what = without_a_router(plain)(of, meshes)
    name = "model.layers.1.mlp.experts.down_proj"
    if dist.get_rank() == dist.get_world_size() - 1:
        what.saved[name] = what.saved[name][1:]
    return what


def one_expert(of: Published, meshes: Meshes) -> What:
    model = copy.deepcopy(of.model)
    placed_by(model, meshes(dist.get_world_size()), lambda name, parameter: [Shard(0)])
    return What(model, {})


def values(name: str) -> Tensor:
    shapes = {"one row": (1, 5), "nothing": (0, 5), "rows of some": (3, 2), "not contiguous": (4, 6)}
    shape = shapes.get(name, ())
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float32).reshape(shape) + 0.1


def odd_shards(of: Published, meshes: Meshes) -> What:
    """Shards of no elements, ranks outside of a mesh, float32, a plain tensor that lies in another order on a rank."""
    mesh, some = meshes(dist.get_world_size()), DeviceMesh("cpu", [0])
    state = {name: distribute_tensor(values(name), mesh, [Shard(0)]) for name in ("one row", "nothing")}
    state["a number"] = distribute_tensor(values("a number"), mesh, [Replicate()])
    state["a number of one"] = distribute_tensor(values("a number of one"), DeviceMesh("cpu", [1]), [Replicate()])
    state["rows of some"] = distribute_tensor(values("rows of some"), some, [Shard(0)])
    state["not contiguous"] = values("not contiguous")
    if dist.get_rank():
        state["not contiguous"] = state["not contiguous"].t().contiguous().t()
    return What(state, {"rules": []})


ALONE = ("local experts",)
KINDS = {
    "ep": by_transformers(tp_size=all_of, ep_size=all_of),
    "ep of two x fsdp": by_transformers(fsdp_size=all_of, ep_size=two),
    "ep x fsdp": by_transformers(fsdp_size=all_of, ep_size=all_of),
    "tp": by_transformers(tp_size=all_of),
    "fsdp": by_transformers(fsdp_size=all_of),
    "replicated fsdp": by_transformers(dp_replicate_size=two, fsdp_size=half),
    "tp of two x fsdp, ep": by_transformers(tp_size=two, fsdp_size=half, ep_size=all_of),
    "hsdp": hsdp,
    "one expert": one_expert,
    "odd shards": odd_shards,
    "local experts": alone,
    "local experts, plain": plain,
    "local experts, fsdp": on_sub_meshes,
    "local experts, replicated": replicated_on_sub_meshes,
    "local experts, plain, without a model": without_a_model,
    "local experts, plain, without a router": without_a_router(plain),
    "local experts, fsdp, without a router": without_a_router(on_sub_meshes),
    "drifted": drifted,
    "other buffers": with_other_buffers,
    "other sizes": with_other_sizes,
}
_OF_FOUR = ("ep of two x fsdp", "replicated fsdp", "tp of two x fsdp, ep")
_SOME = [
    "ep",
    "tp",
    "ep of two x fsdp",
    "odd shards",
    "local experts",
    "local experts, plain",
    "local experts, plain, without a router",
    "local experts, fsdp",
    "local experts, fsdp, without a router",
    "drifted",
    "other buffers",
]
_ALL = {world: [kind for kind in KINDS if world > 2 or kind not in _OF_FOUR] for world in (2, 4, 8)}
# By the number of ranks.
VARIANTS = {"some": {4: _SOME}, "all": _ALL}
