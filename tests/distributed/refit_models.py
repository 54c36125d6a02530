"""Modules of trainers and engines for refits: types, placements, layouts and values, and what an engine must hold.

Each type has weights for several steps, in bfloat16 and in float32. ``save_pretrained`` writes each step, and a load of
that checkpoint gives what the engine must hold.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

import automodel_conv as amc
from automodel_conv.testing import POISON
from tests.distributed.models import (
    TRANSPOSING,
    local,
    part_of,
    placed_by,
    read_all,
    rope_types,
    sharded,
)
from tests.model_zoo import DTYPE, build_model, fill, small_config

STEPS = 3
LAYOUTS = ("transformers", "vllm", "nemo")
# A number of experts that no number of ranks divides, and tied embeddings.
UNEVEN = "qwen3_moe of 5 experts"
PER_EXPERT = ("qwen3_moe", "deepseek_v3", UNEVEN)
"""Types with a tensor for each matrix of an expert in their checkpoints, under names that ``Fused`` loads."""
TYPES = (*PER_EXPERT, *rope_types(), TRANSPOSING)
DTYPES = ("bfloat16", "float32")


class Step(NamedTuple):
    """The weights of one step."""

    values: dict[str, Tensor]
    """Those of the trainer, by name."""
    engines: dict[str, dict[str, Tensor]]
    """The tensors that a load of the saved checkpoint gives, by kind of engine."""


class Weights(NamedTuple):
    """A model, and its weights for each step, of the trainer in one dtype and of the engine in bfloat16."""

    model: PreTrainedModel
    saved: list[str]
    """Directory of the checkpoint of each step."""
    steps: list[Step]
    rules: list[Any]

    @property
    def num_experts(self) -> int:
        return next(len(t) for name, t in self.steps[0].values.items() if name.endswith("experts.down_proj"))


def weights(name: str, dtype: str, directory: Path) -> Weights:
    """Write the checkpoint of each step, and load it into each kind of engine."""
    if name == UNEVEN:
        config = small_config(CONFIG_MAPPING["qwen3_moe"], num_experts=5, tie_word_embeddings=True)
        model = AutoModelForCausalLM.from_config(config, dtype=DTYPE).eval()
    else:
        model = build_model(name)
    fill(model)
    trainer = copy.deepcopy(model).to(getattr(torch, dtype))
    steps, saved = [], []
    for number in range(STEPS):
        fill(trainer, seed=1 + number)
        path = str(directory / f"{name} {dtype} {number}")
        trainer.save_pretrained(path)
        values = {key: tensor.clone() for key, tensor in trainer.state_dict().items()}
        saved.append(path)
        steps.append(Step(values, _engines(name, model, path)))
    return Weights(model, saved, steps, amc.get_model_conversion_mapping(model))


def _engines(name: str, model: PreTrainedModel, path: str) -> dict[str, dict[str, Tensor]]:
    own = copy.deepcopy(model)
    amc.load_model(own, path)
    engines: dict[str, dict[str, Tensor]] = {"own": dict(own.state_dict())}
    engines |= {layout: dict(amc.load_state_dict(path, model, layout=layout)) for layout in LAYOUTS}
    if name in PER_EXPERT:
        for ranks in (1, 2, 4):
            for rank in range(ranks):
                fused = Fused.build(engines["vllm"], rank, ranks)
                fused.load_weights(read_all(path).items())
                engines[f"loader {rank} of {ranks}"] = dict(fused.module.state_dict())
    return engines


def module_of(tensors: Mapping[str, Tensor]) -> nn.Module:
    """Return a module of no type with copies of these tensors; those that share memory are one parameter."""
    root, known = nn.Module(), {}
    for name, tensor in tensors.items():
        *path, leaf = name.split(".")
        module = root
        for part in path:
            if part not in module._modules:
                module.add_module(part, nn.Module())
            module = module._modules[part]
        if not tensor.is_floating_point():
            module.register_buffer(leaf, tensor.clone())
            continue
        key = tensor.data_ptr() if tensor.numel() else name
        if key not in known:
            known[key] = nn.Parameter(tensor.detach().clone(), requires_grad=False)
        module.register_parameter(leaf, known[key])
    return root


EMBEDDING = "model.embed_tokens.weight"
_MATRICES = {"gate_proj": ("w13_weight", 0), "up_proj": ("w13_weight", 1), "down_proj": ("w2_weight", 0)}
_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(\w+)\.weight")


class Fused(NamedTuple):
    """An engine as vLLM's: ``load_weights`` takes the names of a checkpoint, and keeps the part of this rank.

    Gate and up are one parameter. Experts are divided among the ranks in turn, and the rows of the embedding in blocks,
    the last of which is padded with zeros.
    """

    module: nn.Module
    rank: int
    ranks: int

    @classmethod
    def build(cls, like: Mapping[str, Tensor], rank: int, ranks: int) -> Fused:
        """Return an engine of zeros; ``like`` has its whole tensors, in the layout of vLLM."""
        own: dict[str, Tensor] = {}
        for name, tensor in like.items():
            if ".experts." in name:
                tensor = tensor[rank::ranks]
            elif name == EMBEDDING:
                tensor = tensor.new_zeros(-(-len(tensor) // ranks), *tensor.shape[1:])
            elif tensor.data_ptr() == like[EMBEDDING].data_ptr():
                continue  # it is tied, and the checkpoint does not have it
            own[name] = torch.zeros_like(tensor, memory_format=torch.contiguous_format)
        module = module_of(own)
        module.register_buffer("steps", torch.zeros(3))
        return cls(module, rank, ranks)

    def load_weights(self, pairs: Iterable[tuple[str, Tensor]]) -> None:
        own = {name: parameter.data for name, parameter in self.module.named_parameters()}
        own |= dict(self.module.named_buffers())
        for name, tensor in pairs:
            expert = _EXPERT.fullmatch(name)
            if expert is not None:
                path, number, matrix = expert.groups()
                if int(number) % self.ranks == self.rank:
                    leaf, half = _MATRICES[matrix]
                    place = own[f"{path}.{leaf}"][int(number) // self.ranks]
                    (place.chunk(2)[half] if leaf == "w13_weight" else place).copy_(tensor)
            elif name == EMBEDDING:
                rows = len(own[name])
                part = tensor[self.rank * rows : (self.rank + 1) * rows]
                own[name][: len(part)].copy_(part)
                own[name][len(part) :].zero_()
            else:
                own[name].copy_(tensor)


class Side(NamedTuple):
    """The module of a rank, the arguments of ``Refit`` for it, and the experts that its plain tensors hold."""

    module: nn.Module
    options: dict[str, Any]
    experts: Sequence[int] | None = None
    expected: str = "own"
    """For an engine: the kind whose whole tensors it divides."""
    padding: int = 0
    """Bytes of its tensors that are in no tensor of the trainer."""


class RankMeshes:
    """Device meshes of some ranks; all ranks of the world create them, in the same order."""

    def __init__(self, ranks: Sequence[int]) -> None:
        count = len(ranks)
        shapes = {(count,), *(((2, count // 2), (count // 2, 2)) if count % 2 == 0 else ())}
        self._meshes = {
            shape: DeviceMesh("cpu", torch.tensor(ranks).view(shape), mesh_dim_names=("outer", "inner")[-len(shape) :])
            for shape in sorted(shapes)
        }

    def __call__(self, *shape: int) -> DeviceMesh:
        return self._meshes[shape]


class Place(NamedTuple):
    """The place of a rank among those of its side."""

    rank: int
    ranks: int
    meshes: RankMeshes


def _sharded(source: Weights, kind: str, place: Place, dtype: torch.dtype | None) -> Side:
    return Side(sharded(source, kind, place.meshes, dtype=dtype, world=place.ranks), {})


def _copied(source: Weights, dtype: torch.dtype | None) -> nn.Module:
    model = copy.deepcopy(source.model)
    return model if dtype is None else model.to(dtype)


def _with_experts(source: Weights, numbers: Sequence[int], dtype: torch.dtype | None) -> nn.Module:
    model = _copied(source, dtype)
    for module in model.modules():
        for leaf in ("gate_up_proj", "down_proj"):
            parameter = module._parameters.get(leaf)
            if parameter is not None:
                module._parameters[leaf] = nn.Parameter(parameter.data[list(numbers)].clone(), requires_grad=False)
    return model


def _local_experts(source: Weights, kind: str, place: Place, dtype: torch.dtype | None) -> Side:
    """Return two groups of ranks with half of the experts each, and FSDP2 for all other parameters."""
    first = -(-source.num_experts // 2)
    numbers = range(first) if place.rank % 2 == 0 else range(first, source.num_experts)
    model = _with_experts(source, numbers, dtype)
    ignored = {parameter for name, parameter in model.named_parameters() if ".experts." in name}
    fully_shard(model, mesh=place.meshes(place.ranks), ignored_params=ignored)
    return Side(model, {"experts": numbers}, numbers)


def _experts_in_turn(source: Weights, kind: str, place: Place, dtype: torch.dtype | None) -> Side:
    numbers = range(place.rank, source.num_experts, place.ranks)
    return Side(_with_experts(source, numbers, dtype), {"experts": numbers}, numbers)


def _stages(source: Weights, kind: str, place: Place, dtype: torch.dtype | None) -> Side:
    """Return two stages of a pipeline; with four ranks each stage has two, which FSDP2 does not divide."""
    model = _copied(source, dtype)
    is_last = place.rank % 2 == 1
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    layers = next(each for each in lists if type(each[0]).__name__.endswith("DecoderLayer"))
    for number in [*layers._modules]:
        if (int(number) > 0) != is_last:
            del layers._modules[number]
    for parent in list(model.modules()):
        for leaf in [*parent._modules]:
            is_of_first = leaf in ("embed_tokens", "visual", "vision_tower")
            is_of_last = leaf == "lm_head" or (leaf == "norm" and "layers" in parent._modules)
            if (is_last and is_of_first) or (not is_last and is_of_last):
                del parent._modules[leaf]
    return Side(model, {})


def _in_layout(source: Weights, kind: str, place: Place, dtype: torch.dtype | None) -> Side:
    """Return a module of no type in a layout, with its experts divided by DTensors."""
    layout = kind.partition(" ")[0]
    module = module_of(source.steps[0].engines[layout])
    if dtype is not None:
        module = module.to(dtype)
    module.config = source.model.config  # the rules of RoPE need its number of heads
    if kind.endswith("experts"):
        placed_by(module, place.meshes(place.ranks), _experts)
    return Side(module, {"layout": layout, "rules": source.rules}, None, layout)


def _experts(name: str, parameter: Tensor) -> list[Any]:
    return [Shard(0)] if ".experts." in name else [Replicate()]


def _by_loader(source: Weights, kind: str, place: Place, dtype: torch.dtype | None) -> Side:
    fused = Fused.build(source.steps[0].engines["vllm"], place.rank, place.ranks)
    rows, columns = source.model.get_input_embeddings().weight.shape
    padded = max(0, (place.rank + 1) * -(-rows // place.ranks) - rows)
    extra = padded * columns * DTYPE.itemsize + fused.module.steps.nbytes
    return Side(fused.module, {"loader": fused.load_weights}, None, f"loader {place.rank} of {place.ranks}", extra)


Make = Callable[[Weights, str, Place, "torch.dtype | None"], Side]
TRAINERS: dict[str, Make] = {
    **dict.fromkeys(
        ("none", "fsdp", "hsdp", "experts", "experts x fsdp", "columns", "inner", "fsdp over tensor"), _sharded
    ),
    "local experts": _local_experts,
    "experts in turn": _experts_in_turn,
    "stages": _stages,
    "nemo experts": _in_layout,
}
ENGINES: dict[str, Make] = {
    **dict.fromkeys(("none", "fsdp", "columns", "inner", "experts"), _sharded),
    **dict.fromkeys((*LAYOUTS, "vllm experts"), _in_layout),
    "experts in turn": _experts_in_turn,
    "loader": _by_loader,
}
_IN_TWO_DIMENSIONS = ("hsdp", "experts x fsdp", "fsdp over tensor")


def fits(trainers: int, engines: int, name: str, trainer: str, engine: str) -> bool:
    """Return whether a combination exists."""
    return (
        (trainers > 2 or trainer not in _IN_TWO_DIMENSIONS)
        and (engines > 1 or engine in ("none", "loader", *LAYOUTS))
        and (name in PER_EXPERT or engine != "loader")
        and (name != UNEVEN or trainer != "stages")
    )


def give(side: Side, values: Mapping[str, Tensor]) -> None:
    """Write whole tensors to the module of a rank, to each tensor its part."""
    for name, tensor in side.module.state_dict().items():
        local(tensor).copy_(part_of_rank(side, values[name], tensor))


def part_of_rank(side: Side, whole: Tensor, like: Tensor) -> Tensor:
    """Return what a tensor of a rank must hold of a whole tensor."""
    if side.experts is not None and not isinstance(like, DTensor) and like.shape != whole.shape:
        whole = whole[list(side.experts)]
    return part_of(whole, like)


def in_nemo(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return weights in the layout of NeMo AutoModel, from those of transformers."""
    names = {"experts.gate_up_proj": "experts.gate_and_up_projs", "experts.down_proj": "experts.down_projs"}
    nemo = {}
    for name, tensor in values.items():
        for old, new in names.items():
            if name.endswith(old):
                name, tensor = name.replace(old, new), tensor.transpose(1, 2)
        nemo[name] = tensor
    return nemo


def poison(module: nn.Module) -> None:
    """Overwrite all tensors except the buffer that no checkpoint has."""
    for name, tensor in module.state_dict().items():
        if name != "steps":
            local(tensor).reshape(-1).view(torch.uint8).fill_(POISON)
