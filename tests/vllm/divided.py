"""Checkpoints that transformers does not write: tensors of vLLM's own model, divided as they are published.

Published checkpoints have matrices of q, k and v, of gate and up, and of each expert, where vLLM's models have one
parameter. All other names are the same.
"""
# pyright: reportMissingImports=false

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import transformers
from safetensors.torch import save_file
from torch import nn
from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from vllm.config import set_current_vllm_config
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.utils.torch_utils import set_default_torch_dtype

from tests.model_zoo import SIZES, small_config
from tests.vllm.engine import engine_config

# Values of published configs in addition to the sizes of the model zoo.
_COMMON: dict[str, Any] = {
    **{name: size for name, size in SIZES.items() if not name.startswith("index_")},
    "moe_top_k": 2,
    "num_attention_groups": 2,
    "norm_topk_prob": True,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": False,
    "use_bias": False,
    "use_qkv_bias": False,
    "attention_bias": False,
    "bias": False,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "score_function": "sigmoid",
    "routed_scaling_factor": 1.0,
    "moe_router_enable_expert_bias": True,
    "use_qk_norm": True,
    "norm_head": False,
    "moe_layer_freq": 1,
    "embedding_dropout": 0.0,
    "output_dropout": 0.0,
    "sliding_window": None,
    "dtype": "bfloat16",
}
_EXPERTS = {
    "w13_weight": slice(0, 2),
    "w2_weight": slice(2, 3),
    "ws": slice(0, 2),
    "w2s": slice(2, 3),
}
"""Parameters of experts, and which of their matrices these have."""
_EMBEDDINGS = ("embed_tokens", "word_embeddings", "lm_head")


class Division(NamedTuple):
    """How a model of vLLM is published.

    model_type: that of its config; None: its config is a small one of transformers.
    values: what its config has besides the common values, or those of transformers.
    experts: names of the matrices of an expert, gate, up and down, with a place for its number; without one, the
        matrices of all experts are one tensor.
    packed: names of the parts of a parameter, if its class does not tell them.
    renamed: regexes, and what published names have in their places.
    """

    model_type: str | None
    values: Mapping[str, Any] = MappingProxyType({})
    experts: tuple[str, str, str] = ("experts.{}.gate_proj", "experts.{}.up_proj", "experts.{}.down_proj")
    packed: Mapping[str, list[str]] = MappingProxyType({})
    renamed: Mapping[str, str] = MappingProxyType({})


def write_divided(architecture: str, division: Division, directory: Path) -> None:
    """Write the checkpoint of a model of vLLM's registry, with random values, to an existing folder."""
    (directory / "config.json").write_text(json.dumps(_config(architecture, division)))
    engine = engine_config(directory)
    with set_current_vllm_config(engine), set_default_torch_dtype(torch.bfloat16):
        model = initialize_model(vllm_config=engine, model_config=engine.model_config)
    generator = torch.Generator().manual_seed(0)
    tensors = {name: _values(shape, dtype, generator) for name, shape, dtype in _divided(model, division)}
    for old, new in division.renamed.items():
        tensors = {re.sub(old, new, name): tensor for name, tensor in tensors.items()}
    save_file(tensors, directory / "model.safetensors")


def _config(architecture: str, division: Division) -> dict[str, Any]:
    model_type, values = division.model_type, division.values
    if model_type is None:
        config = small_config(getattr(transformers, architecture).config_class, **values).to_dict()
        return {**config, "architectures": [architecture]}
    if model_type not in CONFIG_MAPPING:
        AutoConfig.register(model_type, type(model_type, (PreTrainedConfig,), {"model_type": model_type}))
    return {**_COMMON, **values, "model_type": model_type, "architectures": [architecture]}


def _divided(model: nn.Module, division: Division) -> Iterator[tuple[str, list[int], torch.dtype]]:
    """Yield names, shapes and dtypes of the published tensors."""
    packed = {**getattr(model, "packed_modules_mapping", {}), **division.packed}
    for name, parameter in model.named_parameters():
        owner, _, leaf = name.rpartition(".")
        layer, _, last = owner.rpartition(".")
        module, shape, dtype = model.get_submodule(owner), [*parameter.shape], parameter.dtype
        if leaf in _EXPERTS:
            matrices = division.experts[_EXPERTS[leaf]]
            shape[1] //= len(matrices)
            base = owner.partition(".experts")[0]
            for matrix in matrices:
                if "{}" not in matrix:
                    yield f"{base}.{matrix}.weight", shape, dtype
                    continue
                for number in range(shape[0]):
                    yield f"{base}.{matrix.format(number)}.weight", shape[1:], dtype
        elif len(packed.get(last, ())) > 1:
            parts = packed[last]
            sizes: Any = getattr(module, "output_sizes", [shape[0] // len(parts)] * len(parts))
            for part, rows in zip(parts, sizes, strict=True):
                yield f"{layer}.{part}.{leaf}", [rows, *shape[1:]], dtype
        elif last in _EMBEDDINGS:
            rows: Any = module.org_vocab_size
            yield name, [rows, *shape[1:]], dtype
        else:
            yield name, shape, dtype


def _values(shape: list[int], dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """Return random values, none of them 0: floats with both signs, 16 exponents and any mantissa."""
    if not dtype.is_floating_point:
        return torch.randint(1, 8, shape, dtype=dtype, generator=generator)
    sign = torch.randint(0, 2, shape, generator=generator) * 2 - 1
    exponent = torch.randint(-12, 4, shape, generator=generator)
    return (sign * torch.ldexp(1 + torch.rand(shape, generator=generator), exponent)).to(dtype)
