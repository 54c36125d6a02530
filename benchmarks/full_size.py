"""Headers of published checkpoints at full size, over sparse files: for tests and measurements of names and plans.

Names, shapes and dtypes are those of the published files. The files hold no data and use only the disk space of their
headers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from automodel_conv.dtypes import itemsize, nbytes

TensorSpecs = Mapping[str, tuple[str, tuple[int, ...]]]
"""Dtype code and shape of each tensor of a checkpoint by name, in the order of its files. No dtype is F4 or F6."""


@dataclass(frozen=True)
class FullSize:
    """A published checkpoint: its config and tensors, and the number of its files."""

    name: str
    source: str
    config: Mapping[str, Any]
    tensors: Callable[[], TensorSpecs]
    keys: int
    """Number of tensors."""
    files: int

    def write(self, directory: Path | str) -> None:
        """Write ``config.json``, the index and the files."""
        write_headers(directory, self.tensors(), self.files)
        Path(directory, "config.json").write_text(json.dumps(self.config), encoding="utf-8")


def write_headers(directory: Path | str, tensors: TensorSpecs, files: int) -> None:
    """Write an index, and headers over sparse files of about equal sizes.

    Tensors stay in the given order from file to file. Within a file larger dtypes are first, then names are sorted, as
    safetensors does it.
    """
    total = sum(nbytes(dtype, prod(shape)) for dtype, shape in tensors.values())
    weight_map: dict[str, str] = {}
    by_file: dict[str, list[str]] = {}
    before = 0
    for name, (dtype, shape) in tensors.items():
        file = f"model-{before * files // max(total, 1) + 1:05d}-of-{files:05d}.safetensors"
        weight_map[name] = file
        by_file.setdefault(file, []).append(name)
        before += nbytes(dtype, prod(shape))
    for file, names in by_file.items():
        names.sort(key=lambda name: (-itemsize(tensors[name][0]), name))
        write_header(Path(directory, file), {name: tensors[name] for name in names})
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    Path(directory, "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")


def write_header(path: Path | str, tensors: TensorSpecs) -> None:
    """Write the header of one file over a hole that is as large as its tensors, in the given order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    stop = 0
    for name, (dtype, shape) in tensors.items():
        start, stop = stop, stop + nbytes(dtype, prod(shape))
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + stop)


Specs = Iterator[tuple[str, tuple[str, tuple[int, ...]]]]
Linear = Callable[[str, int, int], Specs]
"""Yields the tensors of a linear layer, given its name, rows and columns."""


def plain(name: str, rows: int, columns: int) -> Specs:
    """Yield the weight in bfloat16."""
    yield f"{name}.weight", ("BF16", (rows, columns))


def fp8(name: str, rows: int, columns: int) -> Specs:
    """Yield FP8 codes and a scale per 128 x 128 block."""
    yield f"{name}.weight", ("F8_E4M3", (rows, columns))
    yield f"{name}.weight_scale_inv", ("F32", (-(-rows // 128), -(-columns // 128)))


def nvfp4(name: str, rows: int, columns: int) -> Specs:
    """Yield FP4 codes, a scale per 16 codes, the scale of the whole tensor, and that of activations."""
    yield f"{name}.input_scale", ("F32", ())
    yield f"{name}.weight", ("U8", (rows, columns // 2))
    yield f"{name}.weight_scale", ("F8_E4M3", (rows, columns // 16))
    yield f"{name}.weight_scale_2", ("F32", ())


def deepseek(config: Mapping[str, Any], attention: Linear, mlp: Linear, kv_scales: bool) -> TensorSpecs:
    """Return the tensors of DeepSeek-V3 and of models with its names, multi-token prediction layers included.

    Args:
        config: ``config.json``.
        attention, mlp: how linear layers of attention and of MLPs are stored.
        kv_scales: whether there are scales of a quantized KV cache.
    """
    hidden, vocabulary = config["hidden_size"], config["vocab_size"]
    layers = config["num_hidden_layers"]
    specs = dict(plain("model.embed_tokens", vocabulary, hidden))
    for layer in range(layers + config["num_nextn_predict_layers"]):
        path = f"model.layers.{layer}"
        if layer >= layers:
            specs |= plain(f"{path}.embed_tokens", vocabulary, hidden)
            specs |= {f"{path}.{norm}.weight": ("BF16", (hidden,)) for norm in ("enorm", "hnorm", "shared_head.norm")}
            specs |= plain(f"{path}.eh_proj", hidden, 2 * hidden)
            specs |= plain(f"{path}.shared_head.head", vocabulary, hidden)
        specs |= _deepseek_attention(f"{path}.self_attn", config, attention)
        if kv_scales:
            specs |= {f"{path}.self_attn.{part}_proj.{part}_scale": ("F32", ()) for part in "kv"}
        specs |= _deepseek_mlp(f"{path}.mlp", config, mlp, layer < config["first_k_dense_replace"])
        specs |= {f"{path}.{n}_layernorm.weight": ("BF16", (hidden,)) for n in ("input", "post_attention")}
    specs["model.norm.weight"] = "BF16", (hidden,)
    return specs | dict(plain("lm_head", vocabulary, hidden))


def _deepseek_attention(path: str, config: Mapping[str, Any], linear: Linear) -> Specs:
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    query, key_value = config["q_lora_rank"], config["kv_lora_rank"]
    nope, rope, value = (config[name] for name in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
    yield from linear(f"{path}.q_a_proj", query, hidden)
    yield f"{path}.q_a_layernorm.weight", ("BF16", (query,))
    yield from linear(f"{path}.q_b_proj", heads * (nope + rope), query)
    yield from linear(f"{path}.kv_a_proj_with_mqa", key_value + rope, hidden)
    yield f"{path}.kv_a_layernorm.weight", ("BF16", (key_value,))
    yield from linear(f"{path}.kv_b_proj", heads * (nope + value), key_value)
    yield from linear(f"{path}.o_proj", hidden, heads * value)


def _deepseek_mlp(path: str, config: Mapping[str, Any], linear: Linear, is_dense: bool) -> Specs:
    hidden, intermediate = config["hidden_size"], config["moe_intermediate_size"]
    if is_dense:
        yield from _gated(path, ("gate_proj", "up_proj", "down_proj"), config["intermediate_size"], hidden, linear)
        return
    experts = config["n_routed_experts"]
    yield from plain(f"{path}.gate", experts, hidden)
    yield f"{path}.gate.e_score_correction_bias", ("F32", (experts,))
    for expert in [*(f"experts.{number}" for number in range(experts)), "shared_experts"]:
        yield from _gated(f"{path}.{expert}", ("gate_proj", "up_proj", "down_proj"), intermediate, hidden, linear)


def _gated(path: str, names: tuple[str, str, str], intermediate: int, hidden: int, linear: Linear) -> Specs:
    gate, up, down = names
    yield from linear(f"{path}.{gate}", intermediate, hidden)
    yield from linear(f"{path}.{up}", intermediate, hidden)
    yield from linear(f"{path}.{down}", hidden, intermediate)


def minimax(config: Mapping[str, Any]) -> TensorSpecs:
    """Return the tensors of MiniMax-M2, in FP8."""
    hidden, experts, size = config["hidden_size"], config["num_local_experts"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * size, config["num_key_value_heads"] * size
    specs = dict(plain("model.embed_tokens", config["vocab_size"], hidden))
    for layer in range(config["num_hidden_layers"]):
        path = f"model.layers.{layer}"
        specs |= plain(f"{path}.block_sparse_moe.gate", experts, hidden)
        specs[f"{path}.block_sparse_moe.e_score_correction_bias"] = "BF16", (experts,)
        for expert in range(experts):
            name = f"{path}.block_sparse_moe.experts.{expert}"
            specs |= _gated(name, ("w1", "w3", "w2"), config["intermediate_size"], hidden, fp8)
        for part, rows, columns in (
            ("q_proj", queries, hidden),
            ("k_proj", keys, hidden),
            ("v_proj", keys, hidden),
            ("o_proj", hidden, queries),
        ):
            specs |= fp8(f"{path}.self_attn.{part}", rows, columns)
        specs |= {f"{path}.self_attn.{p}_norm.weight": ("BF16", (rows,)) for p, rows in (("q", queries), ("k", keys))}
        specs |= {f"{path}.{n}_layernorm.weight": ("BF16", (hidden,)) for n in ("input", "post_attention")}
    specs["model.norm.weight"] = "BF16", (hidden,)
    return specs | dict(plain("lm_head", config["vocab_size"], hidden))


_DEEPSEEK_V3 = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "num_hidden_layers": 61,
    "num_nextn_predict_layers": 1,
    "first_k_dense_replace": 3,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "vocab_size": 129280,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
_FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
_KIMI_K2 = {
    **_DEEPSEEK_V3,
    "num_nextn_predict_layers": 0,
    "first_k_dense_replace": 1,
    "n_routed_experts": 384,
    "num_attention_heads": 64,
    "num_key_value_heads": 64,
    "vocab_size": 163840,
}
_MINIMAX_M2 = {
    "architectures": ["MiniMaxM2ForCausalLM"],
    "model_type": "minimax_m2",
    "num_hidden_layers": 62,
    "num_local_experts": 256,
    "hidden_size": 3072,
    "intermediate_size": 1536,
    "num_attention_heads": 48,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 200064,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}

DEEPSEEK_V3_FP8 = FullSize(
    "DeepSeek-V3 in FP8",
    "config.json and names of deepseek-ai/DeepSeek-V3",
    {**_DEEPSEEK_V3, "quantization_config": _FP8},
    lambda: deepseek(_DEEPSEEK_V3, fp8, fp8, kv_scales=False),
    keys=91_991,
    files=163,
)
MINIMAX_M2_FP8 = FullSize(
    "MiniMax-M2.5 in FP8",
    "config.json and names of MiniMaxAI/MiniMax-M2.5",
    {**_MINIMAX_M2, "quantization_config": _FP8},
    lambda: minimax(_MINIMAX_M2),
    keys=96_103,
    files=125,
)
KIMI_K2_NVFP4 = FullSize(
    "Kimi-K2 in NVFP4",
    "config.json of nvidia/Kimi-K2.5-NVFP4: its language model, with the names of DeepSeek-V3",
    {
        **_KIMI_K2,
        "quantization_config": {
            "quant_method": "modelopt",
            "quant_algo": "NVFP4",
            "group_size": 16,
            "ignore": ["lm_head", "model.layers.*.self_attn*"],
            "kv_cache_scheme": {"dynamic": False, "num_bits": 8, "type": "float"},
        },
    },
    lambda: deepseek(_KIMI_K2, plain, nvfp4, kv_scales=True),
    keys=278_006,
    files=119,
)
