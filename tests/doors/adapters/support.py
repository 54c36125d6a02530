"""A small checkpoint of a Qwen3-MoE model, adapters for it, and the tensors after a merge."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.lora.support import PREFIX, dyadic, write_adapter

LAYERS, EXPERTS, HIDDEN, INNER, RANK, SCALE = 2, 3, 16, 8, 2, 2.0
"""Gate and up together are square: ``[2 * INNER, HIDDEN]``."""
CONFIG: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "architectures": ["Qwen3MoeForCausalLM"],
    "vocab_size": 10,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "moe_intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "tie_word_embeddings": False,
}


def shapes() -> dict[str, tuple[int, ...]]:
    """Return the published tensors."""
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (10, HIDDEN)}
    for layer in range(LAYERS):
        start = f"model.layers.{layer}."
        attention = {"q_proj": (16, HIDDEN), "k_proj": (8, HIDDEN), "v_proj": (8, HIDDEN), "o_proj": (HIDDEN, 16)}
        found |= {f"{start}self_attn.{name}.weight": shape for name, shape in attention.items()}
        found |= {f"{start}self_attn.{name}.weight": (8,) for name in ("q_norm", "k_norm")}
        found |= {f"{start}{name}.weight": (HIDDEN,) for name in ("input_layernorm", "post_attention_layernorm")}
        found[f"{start}mlp.gate.weight"] = (EXPERTS, HIDDEN)
        for expert in range(EXPERTS):
            one = f"{start}mlp.experts.{expert}."
            found |= {f"{one}{name}_proj.weight": (INNER, HIDDEN) for name in ("gate", "up")}
            found[f"{one}down_proj.weight"] = (HIDDEN, INNER)
    return found | {"model.norm.weight": (HIDDEN,), "lm_head.weight": (10, HIDDEN)}


def published(dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """Return random tensors whose sums with products of adapters are exact in float32, and rounded in bfloat16."""
    return {
        name: (torch.randint(-512, 513, shape, generator=torch.Generator().manual_seed(seed)) / 32).to(dtype)
        for seed, (name, shape) in enumerate(shapes().items())
    }


def write_base(directory: Path, tensors: Mapping[str, Tensor], files: int = 1, **config: Any) -> Path:
    """Write a checkpoint in one file or several."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(CONFIG | config))
    names = list(tensors)
    if files == 1:
        save_file(dict(tensors), directory / "model.safetensors")
        return directory
    places = {}
    for number in range(files):
        file = f"model-{number + 1:05}-of-{files:05}.safetensors"
        part = names[number * len(names) // files : (number + 1) * len(names) // files]
        save_file({name: tensors[name] for name in part}, directory / file)
        places |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": places}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def factors(*modules: str, seed: int = 100, rank: int = RANK) -> dict[str, Tensor]:
    """Return the tensors of an adapter of published modules."""
    tensors = {}
    for number, module in enumerate(modules):
        outputs, inputs = shapes()[f"{module}.weight"]
        a, b = dyadic(rank, inputs, seed=seed + number), dyadic(outputs, rank, seed=seed + 1000 + number)
        tensors |= {f"{PREFIX}{module}.lora_A.weight": a, f"{PREFIX}{module}.lora_B.weight": b}
    return tensors


MODULES = (
    *(
        f"model.layers.{layer}.mlp.experts.{expert}.{name}_proj"
        for layer in range(LAYERS)
        for expert in (0, 2)
        for name in ("gate", "up", "down")
    ),
    *(f"model.layers.{layer}.self_attn.{name}_proj" for layer in range(LAYERS) for name in "qkvo"),
    "model.layers.0.mlp.gate",
)
"""Modules of the adapter of these tests; expert 1 has none."""


def default_adapter(directory: Path, **settings: Any) -> Path:
    return write_adapter(directory, factors(*MODULES), **settings)


def merged(
    tensors: Mapping[str, Tensor], adapter: Mapping[str, Tensor], scale: float = SCALE, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Return all tensors after a merge: computed in float64, rounded to float32, which is exact, and to the dtype."""
    result = {name: tensor if dtype is None else tensor.to(dtype) for name, tensor in tensors.items()}
    modules = {name.removeprefix(PREFIX).rpartition(".lora_")[0] for name in adapter}
    for module in modules:
        a, b = (adapter[f"{PREFIX}{module}.lora_{part}.weight"].double() for part in "AB")
        weight = result[f"{module}.weight"]
        exact = weight.double() + scale * (b @ a)
        assert torch.equal(exact.float().double(), exact)
        result[f"{module}.weight"] = exact if weight.dtype == torch.float64 else exact.float().to(weight.dtype)
    return result
