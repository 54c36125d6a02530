"""Checkpoints of types that are published grouped, written per expert as tools that quantize single matrices do."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    Gemma4ForCausalLM,
    Gemma4TextConfig,
    GptOssConfig,
    GptOssForCausalLM,
    GraniteMoeConfig,
    GraniteMoeForCausalLM,
    GraniteMoeHybridConfig,
    GraniteMoeHybridForCausalLM,
)

from tests.model_zoo import fill
from tests.quantized.producers import Producer

ATTENTION = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_hidden_layers": 2, "vocab_size": 32}


def granite(experts: int = 3, hidden: int = 16, intermediate: int = 8) -> nn.Module:
    sizes = {"num_local_experts": experts, "hidden_size": hidden, "intermediate_size": intermediate}
    return built(GraniteMoeForCausalLM, GraniteMoeConfig(**sizes, **ATTENTION, num_experts_per_tok=1))


def granite_hybrid(experts: int = 3, hidden: int = 16, intermediate: int = 8) -> nn.Module:
    sizes = {"num_local_experts": experts, "hidden_size": hidden, "intermediate_size": intermediate}
    kinds = {"layer_types": ["mamba", "attention"], "mamba_n_heads": 4, "mamba_d_head": hidden // 2}
    config = GraniteMoeHybridConfig(**sizes, **ATTENTION, **kinds, num_experts_per_tok=1, shared_intermediate_size=8)
    return built(GraniteMoeHybridForCausalLM, config)


def gemma4(experts: int = 3, hidden: int = 16, intermediate: int = 8) -> nn.Module:
    sizes = {"num_experts": experts, "hidden_size": hidden, "moe_intermediate_size": intermediate}
    shape = {"enable_moe_block": True, "top_k_experts": 1, "head_dim": 8, "global_head_dim": 8, "intermediate_size": 8}
    config = Gemma4TextConfig(**sizes, **ATTENTION, **shape, hidden_size_per_layer_input=0, num_kv_shared_layers=0)
    return built(Gemma4ForCausalLM, config)


def gpt_oss(experts: int = 3, hidden: int = 16, intermediate: int = 8) -> nn.Module:
    sizes = {"num_local_experts": experts, "hidden_size": hidden, "intermediate_size": intermediate, "head_dim": 8}
    return built(GptOssForCausalLM, GptOssConfig(**sizes, **ATTENTION, num_experts_per_tok=1))


def built(cls: Any, config: Any) -> nn.Module:
    config.architectures = [cls.__name__]
    model = cls._from_config(config, dtype=torch.bfloat16)
    fill(model)
    return model


MODELS: dict[str, Callable[..., nn.Module]] = {
    "granite": granite,
    "granite hybrid": granite_hybrid,
    "gemma 4": gemma4,
    "gpt-oss": gpt_oss,
}

GROUPED = {
    "input_linear.weight": "gate_up_proj",
    "output_linear.weight": "down_proj",
    "experts.gate_up_proj": "gate_up_proj",
    "experts.gate_up_proj_bias": "gate_up_proj_bias",
    "experts.down_proj": "down_proj",
    "experts.down_proj_bias": "down_proj_bias",
}
"""Ends of the published names of grouped experts, with the names of the parameters."""


def divided(stored: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of a published checkpoint with grouped experts divided into matrices ``[out, in]``."""
    alternates = type(model).__name__.startswith("GptOss")
    tensors: dict[str, Tensor] = {}
    for name, tensor in stored.items():
        end = next((end for end in GROUPED if name.endswith(f".{end}")), None)
        if end is None or "shared_mlp" in name:
            tensors[name] = tensor
            continue
        kind = "bias" if end.endswith("_bias") else "weight"
        path = name.removesuffix(end).removesuffix("experts.") + "experts"
        for expert, part in enumerate(tensor):
            part = part.T if alternates and kind == "weight" else part
            rows = len(part)
            if GROUPED[end].startswith("down"):
                halves = {"down": part}
            elif alternates:
                halves = {"gate": part[::2], "up": part[1::2]}
            else:
                halves = {"gate": part[: rows // 2], "up": part[rows // 2 :]}
            tensors |= {f"{path}.{expert}.{half}_proj.{kind}": value for half, value in halves.items()}
    return {name: tensor.contiguous().clone() for name, tensor in tensors.items()}


def write_per_expert(model: nn.Module, directory: Path, producer: Producer | None = None) -> dict[str, Tensor]:
    """Write a model per expert, its experts quantized if a producer is given; return their exact values by name."""
    model.save_pretrained(directory)
    tensors = divided(load_file(directory / "model.safetensors"), model)
    stored, exact = {}, {}
    for name, tensor in tensors.items():
        if producer is None or ".experts." not in name or tensor.dim() != 2:
            stored[name] = tensor
            continue
        parts, exact[name] = producer.make(tensor)
        stored |= {name + suffix: part.contiguous() for suffix, part in parts.items()}
    save_file(stored, directory / "model.safetensors", metadata={"format": "pt"})
    if producer is not None:
        config = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps(config | {"quantization_config": dict(producer.config)}))
    return exact
