"""Suite: every kind of expert parallelism is saved whole, or nothing is saved and every rank has the same error.

Each kind is saved by ``save_checkpoint`` and by ``torch.distributed.checkpoint``. Local experts are plain tensors of a
rank's own ``E / 2``; ``fsdp`` after that divides them over the ranks that have the same ones.
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
from tests.distributed.starting import send

EXPERTS = 8


class SaveCase(NamedTuple):
    """A model or state dict to save, and keywords for ``HuggingFaceWriter`` and ``save_checkpoint``."""

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
    os.environ |= {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": world}  # transformers reads these
    meshes = Meshes()
    for kind in VARIANTS[variant][dist.get_world_size()]:
        source = common.get(kind, common[""])
        make = KINDS[kind]
        case = make(source, meshes)
        if case is None:
            send({"kind": kind, "supported": False})
            continue
        wanted = read_all(source.saved) if isinstance(case.saved, nn.Module) else None
        outcome = {}
        for way, save in (("save", saves), ("dcp", saves_by_dcp)):
            own = directory / f"{kind}, {way}"
            # Without DTensors each rank saves for itself.
            place = own / number if kind in ALONE and way == "save" else own
            outcome[way] = save(case, place)
            dist.barrier()
            if outcome[way] is None and number == "0":
                assert_same_tensors(read_all(place), wanted or wholes(case.saved))
            outcome[f"{way} left"] = sorted(str(path) for path in own.rglob("*") if not path.is_dir())
            dist.barrier()
            if number == "0":
                shutil.rmtree(own, ignore_errors=True)
        send({"kind": kind, "supported": True} | outcome)


def saves(case: SaveCase, directory: Path) -> list | None:
    try:
        amc.save_checkpoint(case.saved, directory, **case.options)
    except amc.ConversionError as error:
        return [type(error).__name__, str(error)]
    return None


def saves_by_dcp(case: SaveCase, directory: Path) -> list | None:
    is_model = isinstance(case.saved, nn.Module)
    state = case.saved.state_dict() if is_model else case.saved
    writer = HuggingFaceWriter(directory, case.saved if is_model else None, **case.options)
    try:
        dcp.save(state, storage_writer=writer)
    except CheckpointException as error:
        [message] = {(type(failure).__name__, str(failure)) for failure, _ in error.failures.values()}
        return list(message)
    return None


def wholes(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the whole tensors that ranks hold parts of in ``odd_shards``."""
    return {name: values(name) for name in state}


def by_transformers(**sizes):
    """Return a function that loads with transformers' own parallelism; it returns None if this release lacks it."""

    def make(source: Published, meshes: Meshes) -> SaveCase | None:
        world = dist.get_world_size()
        known = DistributedConfig.__dataclass_fields__
        if not sizes.keys() <= known.keys():
            return None
        options = {name: size(world) for name, size in sizes.items()}
        config = DistributedConfig(**options)
        model = type(source.model).from_pretrained(source.path, distributed_config=config)
        return SaveCase(model, {})

    return make


def all_of(world: int) -> int:
    return world


def half(world: int) -> int:
    return world // 2


def two(world: int) -> int:
    return 2


def with_local_experts(source: Published, meshes: Meshes) -> nn.Module:
    """Return the model with only those experts that belong to this rank's place on the inner dimension."""
    model = copy.deepcopy(source.model)
    at = meshes(dist.get_world_size() // 2, 2)["inner"].get_local_rank()
    for module in model.modules():
        for leaf in ("gate_up_proj", "down_proj"):
            parameter = module._parameters.get(leaf)
            if parameter is not None:
                module._parameters[leaf] = nn.Parameter(parameter.data.chunk(2)[at].clone())
    return model


def experts_of(model: nn.Module) -> set[nn.Parameter]:
    return {parameter for name, parameter in model.named_parameters() if ".experts." in name}


def plain(source: Published, meshes: Meshes) -> SaveCase:
    model = with_local_experts(source, meshes)
    fully_shard(model, mesh=meshes(dist.get_world_size()), ignored_params=experts_of(model))
    return SaveCase(model, {})


def alone(source: Published, meshes: Meshes) -> SaveCase:
    return SaveCase(with_local_experts(source, meshes), {})


def on_sub_meshes(source: Published, meshes: Meshes) -> SaveCase:
    model = with_local_experts(source, meshes)
    fully_shard(model, mesh=meshes(dist.get_world_size() // 2, 2)["outer"])
    return SaveCase(model, {})


def replicated_on_sub_meshes(source: Published, meshes: Meshes) -> SaveCase:
    model = with_local_experts(source, meshes)
    placed_by(model, meshes(dist.get_world_size() // 2, 2)["outer"], lambda name, parameter: [Replicate()])
    return SaveCase(model, {})


def without_a_model(source: Published, meshes: Meshes) -> SaveCase:
    """Save a state dict: the rows of the router determine the number of experts."""
    return SaveCase(plain(source, meshes).saved.state_dict(), {"rules": amc.get_model_conversion_mapping(source.model)})


def without_a_router(make):
    """Save without a router: nothing determines the number of experts, and the bytes of ranks differ."""

    def build(source: Published, meshes: Meshes) -> SaveCase:
        state = make(source, meshes).saved.state_dict()
        state = {name: tensor for name, tensor in state.items() if not name.endswith(".gate.weight")}
        return SaveCase(state, {"rules": amc.get_model_conversion_mapping(source.model)})

    return build


def hsdp(source: Published, meshes: Meshes) -> SaveCase:
    model = copy.deepcopy(source.model)
    fully_shard(model, mesh=meshes(2, dist.get_world_size() // 2))
    return SaveCase(model, {})


def drifted(source: Published, meshes: Meshes) -> SaveCase:
    case = hsdp(source, meshes)
    if dist.get_rank() == dist.get_world_size() - 1:
        part = local(case.saved.state_dict()["model.layers.1.mlp.experts.down_proj"])
        part.view(torch.int16).view(-1)[-1] ^= 1
    return case


def with_other_buffers(source: Published, meshes: Meshes) -> SaveCase:
    state = dict(hsdp(source, meshes).saved.state_dict())
    state["steps"] = torch.tensor(dist.get_rank() // (dist.get_world_size() - 1))
    return SaveCase(state, {"rules": amc.get_model_conversion_mapping(source.model)})


def with_other_sizes(source: Published, meshes: Meshes) -> SaveCase:
    """Give the last rank one expert less than the others."""
    case = without_a_router(plain)(source, meshes)
    name = "model.layers.1.mlp.experts.down_proj"
    if dist.get_rank() == dist.get_world_size() - 1:
        case.saved[name] = case.saved[name][1:]
    return case


def one_expert(source: Published, meshes: Meshes) -> SaveCase:
    model = copy.deepcopy(source.model)
    placed_by(model, meshes(dist.get_world_size()), lambda name, parameter: [Shard(0)])
    return SaveCase(model, {})


def values(name: str) -> Tensor:
    shapes = {"one row": (1, 5), "nothing": (0, 5), "rows of some": (3, 2), "not contiguous": (4, 6)}
    shape = shapes.get(name, ())
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float32).reshape(shape) + 0.1


def odd_shards(source: Published, meshes: Meshes) -> SaveCase:
    """Return empty shards, ranks outside a mesh, float32, and a plain tensor with other strides on some ranks."""
    mesh, sub_mesh = meshes(dist.get_world_size()), DeviceMesh("cpu", [0])
    state = {name: distribute_tensor(values(name), mesh, [Shard(0)]) for name in ("one row", "nothing")}
    state["a number"] = distribute_tensor(values("a number"), mesh, [Replicate()])
    state["a number of one"] = distribute_tensor(values("a number of one"), DeviceMesh("cpu", [1]), [Replicate()])
    state["rows of some"] = distribute_tensor(values("rows of some"), sub_mesh, [Shard(0)])
    state["not contiguous"] = values("not contiguous")
    if dist.get_rank():
        state["not contiguous"] = state["not contiguous"].t().contiguous().t()
    return SaveCase(state, {"rules": []})


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
# Kinds by the number of ranks.
VARIANTS = {"some": {4: _SOME}, "all": _ALL}
