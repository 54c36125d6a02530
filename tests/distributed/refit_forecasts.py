"""Ranks of a trainer and of an engine for meshes of ``refit-plan``, and the forecast that their refit makes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import automodel_conv as amc
from tests.distributed.models import by_fsdp
from tests.distributed.starting import send

BUCKET_BYTES = 6000
TRAINER_RANKS = {"fsdp=2": 2, "ep=2": 2, "replicate=2": 2, "fsdp=2,ep=2": 4}
ENGINE_RANKS = {"tp=2": 2, "tp=2,ep=2": 2, "ep=2": 2, "dp=2": 2, "replicate=2": 2}
SIZES: dict[str, dict[str, Any]] = {
    # One head of keys, which two ranks both hold. Experts that two ranks do not divide evenly.
    "qwen3_moe": {"num_experts": 5, "num_key_value_heads": 1, "head_dim": 8, "tie_word_embeddings": False},
    "qwen3_moe, tied": {"num_experts": 4, "num_key_value_heads": 2, "head_dim": 8, "tie_word_embeddings": True},
    "deepseek_v3": {
        "n_routed_experts": 4,
        "first_k_dense_replace": 1,
        "num_key_value_heads": 4,
        "q_lora_rank": 12,
        "kv_lora_rank": 12,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "v_head_dim": 8,
        "n_group": 1,
        "topk_group": 1,
    },
}


def build(name: str, device: str = "cpu") -> PreTrainedModel:
    """Return a model of two layers in bfloat16, with what ``from_pretrained`` keeps in float32."""
    sizes = {
        "num_hidden_layers": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "moe_intermediate_size": 16,
        "num_attention_heads": 4,
        "num_experts_per_tok": 2,
        "vocab_size": 128,
    }
    config = AutoConfig.for_model(name.partition(",")[0], **sizes, **SIZES[name])
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for module in model.modules():
        if "e_score_correction_bias" in module._buffers:
            module.e_score_correction_bias = module.e_score_correction_bias.float()
    return model


def prepare(directory: Path, world: int) -> dict[str, PreTrainedModel]:
    return {name: build(name) for name in SIZES}


def rank(models: Mapping[str, PreTrainedModel], variant: str, directory: Path) -> None:
    name, trainer, engine = variant.split("; ")
    me, senders = dist.get_rank(), TRAINER_RANKS[trainer]
    shape = [int(part.partition("=")[2]) for part in trainer.split(",")]
    of_trainer = DeviceMesh("cpu", torch.arange(senders).reshape(shape))
    of_engine = DeviceMesh("cpu", torch.arange(senders, senders + ENGINE_RANKS[engine]))
    model = copy.deepcopy(models[name])
    if me < senders:
        if trainer == "fsdp=2":
            by_fsdp(model, of_trainer)
        else:
            place(model, of_trainer, lambda name, tensor: TRAINERS[trainer][".experts." in name])
        refit = amc.Refit(model, sends=True, bucket_bytes=BUCKET_BYTES)
    else:
        module = in_layout_of_vllm(model)
        kv_heads = model.config.num_key_value_heads
        place(module, of_engine, lambda name, tensor: [ENGINES[engine](name, kv_heads)])
        rules = amc.get_model_conversion_mapping(model)
        refit = amc.Refit(module, sends=False, layout="vllm", rules=rules, bucket_bytes=BUCKET_BYTES)
    forecast = refit.forecast()
    if me == 0:
        links = [[*link, nbytes] for link, nbytes in sorted(forecast.links.items())]
        send([links, forecast.messages, forecast.rounds, forecast.peak_extra_bytes, forecast.left_out])


# Placements of all other tensors, and of routed experts.
TRAINERS: dict[str, tuple[list[Any], list[Any]]] = {
    "ep=2": ([Replicate()], [Shard(0)]),
    "replicate=2": ([Replicate()], [Replicate()]),
    "fsdp=2,ep=2": ([Shard(0), Shard(0)], [Shard(1), Shard(0)]),
}


def _tensor_parallel(name: str, kv_heads: int) -> Any:
    module = name.split(".")[-2]
    if module in ("k_proj", "v_proj"):
        return Shard(0) if kv_heads % 2 == 0 else Replicate()
    if module in ("q_proj", "q_b_proj", "kv_b_proj", "gate_proj", "up_proj", "embed_tokens", "lm_head"):
        return Shard(0)
    return Shard(1) if module in ("o_proj", "down_proj") else Replicate()


def _experts(name: str, kv_heads: int) -> Any:
    return Shard(0) if ".experts." in name else Replicate()


def _intermediate(name: str, kv_heads: int) -> Any:
    if name.endswith("w13_weight"):
        return _StridedShard(1, split_factor=2)
    return Shard(2) if name.endswith("w2_weight") else Replicate()


ENGINES: dict[str, Callable[[str, int], Any]] = {
    "tp=2": lambda name, heads: (_intermediate if ".experts." in name else _tensor_parallel)(name, heads),
    "tp=2,ep=2": lambda name, heads: (_experts if ".experts." in name else _tensor_parallel)(name, heads),
    "ep=2": _experts,
    "dp=2": _intermediate,
    "replicate=2": lambda name, heads: Replicate(),
}


def in_layout_of_vllm(model: PreTrainedModel) -> nn.Module:
    """Return a module of no type with the tensors of a model, its experts in the layout of vLLM."""
    root = nn.Module()
    seen: dict[int, nn.Parameter] = {}
    for name, tensor in model.state_dict().items():
        *path, leaf = name.split(".")
        if path[-1] == "experts":
            leaf = {"gate_up_proj": "w13_weight", "down_proj": "w2_weight"}[leaf]
        module = root
        for part in path:
            if part not in module._modules:
                module.add_module(part, nn.Module())
            module = module._modules[part]
        module.register_parameter(leaf, seen.setdefault(tensor.data_ptr(), nn.Parameter(tensor, requires_grad=False)))
    root.config = model.config  # the rules of RoPE need its number of heads
    return root


def place(model: nn.Module, mesh: DeviceMesh, rule: Callable[[str, Tensor], list[Any]]) -> None:
    """Turn all parameters into DTensors of this rank's parts; tied parameters stay tied."""
    seen: dict[int, nn.Parameter] = {}
    for path, module in model.named_modules():
        for leaf, tensor in [*module._parameters.items()]:
            if tensor is not None:
                if id(tensor) not in seen:
                    part = _part(tensor.data, mesh, rule(f"{path}.{leaf}", tensor))
                    seen[id(tensor)] = nn.Parameter(part, requires_grad=False)
                module._parameters[leaf] = seen[id(tensor)]


def _part(tensor: Tensor, mesh: DeviceMesh, placements: list[Any]) -> DTensor:
    own = tensor
    for placement, size, at in zip(placements, mesh.shape, mesh.get_coordinate(), strict=True):
        if not placement.is_replicate():
            own = placement._split_tensor(own, size, with_padding=False, contiguous=True)[0][at]
    return DTensor.from_local(
        own.contiguous(), mesh, placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )
