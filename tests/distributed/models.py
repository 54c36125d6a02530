"""Models of the zoo, sharded as training code shards them, and checks of the parts that each rank holds."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from automodel_conv.testing import POISON, assert_bytes_equal
from tests.model_zoo import DTYPE, build_model, fill, small_config, write_checkpoint, zoo_names

# The first that the installed transformers has; 5.12 has none.
ROPE_TYPES = ("mistral_large4", "kimi_k25")
TRANSPOSING = "qwen3_vl_moe"


class Published(NamedTuple):
    """A published checkpoint, the model that transformers loads from it, and the checkpoint saved from that model."""

    path: str
    saved: str
    model: nn.Module
    full: dict[str, Tensor]


def rope_types() -> list[str]:
    known = zoo_names()
    return [name for name in ROPE_TYPES if name in known][:1]


def published(name: str, directory: Path, **changes: int) -> Published:
    """Write and load a model of the zoo, or a causal language model with changes to its small config."""
    if changes:
        model = AutoModelForCausalLM.from_config(small_config(CONFIG_MAPPING[name], **changes), dtype=DTYPE)
        fill(model)
    else:
        model = build_model(name)
    path, saved = str(directory / name), str(directory / f"{name} saved")
    write_checkpoint(model, path)
    full = type(model).from_pretrained(path).eval()
    full.save_pretrained(saved)
    return Published(path, saved, full, full.state_dict())


def read_all(path: str) -> dict[str, Tensor]:
    return {k: v for file in sorted(Path(path).glob("*.safetensors")) for k, v in load_file(file).items()}


class Meshes:
    """Device meshes of this group, each created once."""

    def __init__(self) -> None:
        self._meshes = {}

    def __call__(self, *shape: int):
        if shape not in self._meshes:
            self._meshes[shape] = init_device_mesh("cpu", shape, mesh_dim_names=("outer", "inner")[-len(shape) :])
        return self._meshes[shape]


def placed_by(model: nn.Module, mesh, rule) -> None:
    """Turn all parameters into DTensors with the placements of ``rule(name, parameter)``; tied parameters stay tied."""
    shards: dict[int, nn.Parameter] = {}
    for path, module in model.named_modules():
        for leaf, parameter in module._parameters.items():
            if parameter is None or isinstance(parameter, DTensor):
                continue
            if id(parameter) not in shards:
                placements = rule(f"{path}.{leaf}", parameter)
                shard = distribute_tensor(parameter.data, mesh, placements, src_data_rank=None)
                shards[id(parameter)] = nn.Parameter(shard, requires_grad=parameter.requires_grad)
            module._parameters[leaf] = shards[id(parameter)]


def by_fsdp(model: nn.Module, mesh) -> None:
    for module in model.modules():
        if type(module).__name__.endswith(("DecoderLayer", "VisionBlock")):
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)


def _experts(name, parameter):
    return [Shard(0)] if ".experts." in name else [Replicate()]


def _columns(name, parameter):
    return [Shard(min(1, parameter.ndim - 1))]


def _inner(name, parameter):
    return [Shard(parameter.ndim - 1)]


def _experts_and_fsdp(name, parameter):
    return [Shard(0), Shard(1)] if ".experts." in name else [Replicate(), Shard(0)]


def _rows(name, parameter):
    return [Shard(0)]


def sharded(source, kind: str, meshes, *, meta: bool = False, dtype=None, world: int | None = None) -> nn.Module:
    """Return the model without values, sharded in one of these ways:

    ``experts`` (over all ranks), ``columns``, ``inner`` (the last dimension), ``experts x fsdp`` (both dimensions of
    the experts), ``fsdp`` (FSDP2), ``hsdp`` (its replicas), ``fsdp over tensor`` (its strided shards), ``none``.

    Args:
        source: has the model.
        kind: the way.
        meshes: returns a mesh of a shape.
        meta: whether the model is on the meta device; else its tensors are poisoned.
        dtype: dtype of the model; None: its own.
        world: number of ranks of the meshes; None: all ranks.
    """
    world = world or dist.get_world_size()
    model = copy.deepcopy(source.model)
    if dtype is not None:
        model = model.to(dtype)
    if meta:
        model = model.to("meta")
        model.tie_weights()
    else:
        for tensor in model.state_dict().values():
            tensor.reshape(-1).view(torch.uint8).fill_(POISON)
    rules = {"experts": _experts, "columns": _columns, "inner": _inner}
    if kind in rules:
        placed_by(model, meshes(world), rules[kind])
    elif kind == "none":
        pass
    elif kind == "experts x fsdp":
        placed_by(model, meshes(world // 2, 2), _experts_and_fsdp)
    elif kind == "fsdp":
        by_fsdp(model, meshes(world))
    elif kind == "hsdp":
        by_fsdp(model, meshes(2, world // 2))
    elif kind == "fsdp over tensor":
        mesh = meshes(2, world // 2)
        placed_by(model, mesh["inner"], _rows)
        by_fsdp(model, mesh["outer"])
    else:
        raise ValueError(kind)
    return model


def part_of(whole: Tensor, like: Tensor) -> Tensor:
    """Return the part of this rank by torch's own split, one mesh dimension after the other."""
    if not isinstance(like, DTensor):
        return whole
    mesh = like.device_mesh
    for placement, size, at in zip(like.placements, mesh.shape, mesh.get_coordinate(), strict=True):
        if not placement.is_replicate():
            whole = placement._split_tensor(whole, size, with_padding=False, contiguous=True)[0][at]
    return whole


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def assert_holds(state: dict[str, Tensor], source: Published, *, whole: bool = True) -> None:
    """Check that every local shard is a slice of the full tensor, and that all shards cover it."""
    assert list(state) == list(source.full)
    for name, tensor in state.items():
        wanted = source.full[name].to(tensor.dtype)
        try:
            assert_bytes_equal(local(tensor), part_of(wanted, tensor))
            if whole and isinstance(tensor, DTensor):
                assert_bytes_equal(tensor.full_tensor(), wanted)
        except AssertionError as error:
            raise AssertionError(f"{name} {getattr(tensor, 'placements', '')}: {error}") from None


def assert_same_tensors(actual: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert actual.keys() == wanted.keys()
    for name, tensor in wanted.items():
        try:
            assert_bytes_equal(actual[name], tensor)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None
