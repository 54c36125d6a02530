"""Small quantized checkpoints under their published names, for vLLM's classes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

BLOCK = 128
"""Rows and columns of the blocks of FP8."""
GROUP = 32
"""Columns that share a scale, in formats of integers."""


class Values:
    """Random codes and scales."""

    def __init__(self, seed: int = 0):
        self._generator = torch.Generator().manual_seed(seed)

    def bytes(self, *shape: int) -> Tensor:
        return torch.randint(0, 256, shape, generator=self._generator, dtype=torch.uint8)

    def words(self, *shape: int) -> Tensor:
        return self.bytes(*shape[:-1], shape[-1] * 4).view(torch.int32)

    def fp8(self, *shape: int) -> Tensor:
        return (self.bytes(*shape) % 120).view(torch.float8_e4m3fn)

    def scales(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return (torch.rand(shape, generator=self._generator) + 0.5).to(dtype)


@dataclass(frozen=True)
class Format:
    """How the linear layers of a checkpoint are quantized."""

    config: Mapping[str, Any]
    """The ``quantization_config`` of its config, without the names of layers that are not quantized."""
    linear: Callable[[Values, int, int], dict[str, Tensor]]
    """Returns the tensors of a layer of so many rows and columns, by the last part of their names."""
    ignored_as: str = "ignore"
    """Key of the names of layers that are not quantized."""
    dtype: str = "bfloat16"
    """Dtype of the tensors without codes, and of the model."""
    cache_scales: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Shapes of the scales of the KV cache, by their names in an attention layer."""
    shared: tuple[str, ...] = ()
    """Tensors of a layer that ``gate_proj`` and ``up_proj``, and q, k and v, have in common."""


def _bfloat16(values: Values, rows: int, columns: int) -> dict[str, Tensor]:
    return {"weight": (values.scales(rows, columns) - 1).bfloat16()}


def _fp8_block(values: Values, rows: int, columns: int) -> dict[str, Tensor]:
    blocks = values.scales(-(-rows // BLOCK), -(-columns // BLOCK))
    return {"weight": values.fp8(rows, columns), "weight_scale_inv": blocks}


def _fp8_block_of_deepseek_v4(values: Values, rows: int, columns: int) -> dict[str, Tensor]:
    scales = values.bytes(-(-rows // BLOCK), -(-columns // BLOCK)).view(torch.float8_e8m0fnu)
    return {"weight": values.fp8(rows, columns), "scale": scales}


def _fp8_static(values: Values, rows: int, columns: int) -> dict[str, Tensor]:
    return {"weight": values.fp8(rows, columns), "weight_scale": values.scales(), "input_scale": values.scales()}


def _fp8_static_of_one(values: Values, rows: int, columns: int) -> dict[str, Tensor]:
    """As compressed-tensors writes them: scales are tensors of one element, in the dtype of the model."""
    tensors = _fp8_static(values, rows, columns)
    return {name: t.bfloat16().reshape(1) if name != "weight" else t for name, t in tensors.items()}


def _fp8_channel(values: Values, rows: int, columns: int) -> dict[str, Tensor]:
    return {"weight": values.fp8(rows, columns), "weight_scale": values.scales(rows, 1, dtype=torch.bfloat16)}


def _fp8_block_of_compressed_tensors(values: Values, rows: int, columns: int) -> dict[str, Tensor]:
    tensors = _fp8_block(values, rows, columns)
    return {"weight": tensors["weight"], "weight_scale": tensors["weight_scale_inv"].bfloat16()}


def _int8_channel(values: Values, rows: int, columns: int) -> dict[str, Tensor]:
    return {
        "weight": values.bytes(rows, columns).view(torch.int8),
        "weight_scale": values.scales(rows, 1, dtype=torch.bfloat16),
    }


def _packed(values: Values, rows: int, columns: int, codes: int) -> dict[str, Tensor]:
    return {
        "weight_packed": values.words(rows, columns // codes),
        "weight_scale": values.scales(rows, columns // GROUP, dtype=torch.bfloat16),
        "weight_shape": torch.tensor([rows, columns]),
    }


def _int4_packed(values: Values, rows: int, columns: int) -> dict[str, Tensor]:
    return _packed(values, rows, columns, codes=8)


def _int8_packed(values: Values, rows: int, columns: int) -> dict[str, Tensor]:
    return _packed(values, rows, columns, codes=4)


def _int4_packed_asymmetric(values: Values, rows: int, columns: int) -> dict[str, Tensor]:
    zero_points = values.words(rows // 8, columns // GROUP)
    return {**_int4_packed(values, rows, columns), "weight_zero_point": zero_points}


def _nvfp4_packed(values: Values, rows: int, columns: int) -> dict[str, Tensor]:
    return {
        "weight_packed": values.bytes(rows, columns // 2),
        "weight_scale": values.fp8(rows, columns // 16),
        "weight_global_scale": values.scales(1),
        "input_global_scale": values.scales(1),
    }


def _nvfp4_packed_without_inputs(values: Values, rows: int, columns: int) -> dict[str, Tensor]:
    return {n: t for n, t in _nvfp4_packed(values, rows, columns).items() if n != "input_global_scale"}


def _mxfp4_packed(values: Values, rows: int, columns: int) -> dict[str, Tensor]:
    return {"weight_packed": values.bytes(rows, columns // 2), "weight_scale": values.bytes(rows, columns // 32)}


def _mxfp4(values: Values, rows: int, columns: int) -> dict[str, Tensor]:
    return {"weight": values.bytes(rows, columns // 2), "weight_scale": values.bytes(rows, columns // 32)}


def _nvfp4(values: Values, rows: int, columns: int) -> dict[str, Tensor]:
    return {
        "weight": values.bytes(rows, columns // 2),
        "weight_scale": values.fp8(rows, columns // 16),
        "weight_scale_2": values.scales(),
        "input_scale": values.scales(),
    }


def _mxfp8(values: Values, rows: int, columns: int) -> dict[str, Tensor]:
    return {"weight": values.fp8(rows, columns), "weight_scale": values.bytes(rows, columns // 32)}


def _mxfp4_blocks(values: Values, rows: int, columns: int) -> dict[str, Tensor]:
    return {"_blocks": values.bytes(rows, columns // 32, 16), "_scales": values.bytes(rows, columns // 32)}


def _awq(values: Values, rows: int, columns: int) -> dict[str, Tensor]:
    return {
        "qweight": values.words(columns, rows // 8),
        "qzeros": values.words(columns // GROUP, rows // 8),
        "scales": values.scales(columns // GROUP, rows, dtype=torch.float16),
    }


def _gptq(values: Values, rows: int, columns: int) -> dict[str, Tensor]:
    return {
        "qweight": values.words(columns // 8, rows),
        "qzeros": values.words(columns // GROUP, rows // 8),
        "scales": values.scales(columns // GROUP, rows, dtype=torch.float16),
        "g_idx": torch.arange(columns, dtype=torch.int32) // GROUP,
    }


def _compressed(format: str, weights: dict[str, Any], inputs: dict[str, Any] | None = None, **rest: Any) -> dict:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": format,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "kv_cache_scheme": None,
        **rest,
    }


def _floats(bits: int, strategy: str, dynamic: bool | str = False, **rest: Any) -> dict[str, Any]:
    return {"num_bits": bits, "type": "float", "strategy": strategy, "symmetric": True, "dynamic": dynamic, **rest}


def _integers(bits: int, strategy: str, dynamic: bool = False, symmetric: bool = True, **rest: Any) -> dict[str, Any]:
    return _floats(bits, strategy, dynamic, **rest) | {"type": "int", "symmetric": symmetric}


def _modelopt(algorithm: str, **rest: Any) -> dict[str, Any]:
    return {
        "quant_method": "modelopt",
        "quant_algo": algorithm,
        "producer": {"name": "modelopt", "version": "0.41.0"},
        "kv_cache_scheme": {"dynamic": False, "num_bits": 8, "type": "float"},
        **rest,
    }


def _gptq_of_8_bits(values: Values, rows: int, columns: int) -> dict[str, Tensor]:
    return {
        **_gptq(values, rows, columns),
        "qweight": values.words(columns // 4, rows),
        "qzeros": values.words(columns // GROUP, rows // 4),
    }


def _of_gptq(bits: int = 4, **rest: Any) -> dict[str, Any]:
    return {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": GROUP,
        "desc_act": False,
        "sym": True,
        "lm_head": False,
        "dynamic": {"-:.*mlp.gate$": {}},
        **rest,
    }


def _quark(weight: dict[str, Any], inputs: dict[str, Any]) -> dict[str, Any]:
    return {
        "quant_method": "quark",
        "export": {"kv_cache_group": [], "pack_method": "reorder", "weight_format": "real_quantized"},
        "global_quant_config": {"weight": weight, "input_tensors": inputs, "output_tensors": None, "bias": None},
        "layer_quant_config": {},
        "layer_type_quant_config": {},
    }


_FP8_OF_QUARK = {"dtype": "fp8_e4m3", "qscheme": "per_tensor", "is_dynamic": False, "symmetric": None}
_MXFP4_OF_QUARK = {
    "dtype": "fp4",
    "qscheme": "per_group",
    "group_size": 32,
    "ch_axis": -1,
    "is_dynamic": False,
    "scale_format": "e8m0",
    "symmetric": None,
}

_MODELOPT_CACHE: dict[str, tuple[int, ...]] = {"k_proj.k_scale": (), "v_proj.v_scale": ()}

FORMATS = {
    "bfloat16": Format({}, _bfloat16),
    "fp8 per block": Format(
        {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [BLOCK, BLOCK],
        },
        _fp8_block,
        ignored_as="modules_to_not_convert",
    ),
    "fp8 and mxfp4": Format(
        {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "scale_fmt": "ue8m0",
            "activation_scheme": "dynamic",
            "weight_block_size": [BLOCK, BLOCK],
        },
        _fp8_block_of_deepseek_v4,
        ignored_as="modules_to_not_convert",
    ),
    "fp8 per tensor": Format(
        {"quant_method": "fp8", "activation_scheme": "static"},
        _fp8_static,
        ignored_as="ignored_layers",
        cache_scales={"k_proj.k_scale": (), "v_proj.v_scale": ()},
    ),
    "compressed-tensors fp8 per channel": Format(
        _compressed("float-quantized", _floats(8, "channel"), _floats(8, "token", dynamic=True)), _fp8_channel
    ),
    "compressed-tensors fp8 per tensor": Format(
        _compressed(
            "float-quantized", _floats(8, "tensor"), _floats(8, "tensor"), kv_cache_scheme=_floats(8, "tensor")
        ),
        _fp8_static_of_one,
        cache_scales={"k_scale": (1,), "v_scale": (1,)},
        shared=("input_scale",),
    ),
    "compressed-tensors fp8 per block": Format(
        _compressed(
            "float-quantized",
            _floats(8, "block", block_structure=[BLOCK, BLOCK]),
            _floats(8, "group", dynamic=True, group_size=BLOCK),
        ),
        _fp8_block_of_compressed_tensors,
    ),
    "compressed-tensors int8 per channel": Format(
        _compressed("int-quantized", _integers(8, "channel"), _integers(8, "token", dynamic=True)), _int8_channel
    ),
    "compressed-tensors w8a16": Format(
        _compressed("pack-quantized", _integers(8, "group", group_size=GROUP)), _int8_packed
    ),
    "compressed-tensors w4a16": Format(
        _compressed("pack-quantized", _integers(4, "group", group_size=GROUP)), _int4_packed
    ),
    "compressed-tensors w4a16 with zero points": Format(
        _compressed("pack-quantized", _integers(4, "group", symmetric=False, group_size=GROUP)), _int4_packed_asymmetric
    ),
    "compressed-tensors nvfp4": Format(
        _compressed(
            "nvfp4-pack-quantized",
            _floats(4, "tensor_group", group_size=16),
            _floats(4, "tensor_group", dynamic="local", group_size=16),
        ),
        _nvfp4_packed,
        shared=("weight_global_scale", "input_global_scale"),
    ),
    "compressed-tensors nvfp4a16": Format(
        _compressed("nvfp4-pack-quantized", _floats(4, "tensor_group", group_size=16)),
        _nvfp4_packed_without_inputs,
        shared=("weight_global_scale",),
    ),
    "compressed-tensors mxfp4": Format(
        _compressed(
            "mxfp4-pack-quantized",
            _floats(4, "group", group_size=32, scale_dtype="torch.uint8"),
        ),
        _mxfp4_packed,
    ),
    "quark fp8": Format(_quark(_FP8_OF_QUARK, _FP8_OF_QUARK), _fp8_static, ignored_as="exclude"),
    "quark mxfp4": Format(
        _quark(_MXFP4_OF_QUARK, {**_MXFP4_OF_QUARK, "is_dynamic": True}), _mxfp4, ignored_as="exclude"
    ),
    "modelopt fp8": Format(_modelopt("FP8"), _fp8_static, cache_scales=_MODELOPT_CACHE),
    "modelopt nvfp4": Format(
        _modelopt(
            "NVFP4",
            config_groups={
                "group_0": {
                    "input_activations": {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16},
                    "weights": {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16},
                    "targets": ["Linear"],
                }
            },
        ),
        _nvfp4,
        cache_scales=_MODELOPT_CACHE,
        shared=("weight_scale_2", "input_scale"),
    ),
    "modelopt mxfp8": Format(_modelopt("MXFP8", kv_cache_scheme=None), _mxfp8),
    "mxfp4": Format({"quant_method": "mxfp4"}, _mxfp4_blocks, ignored_as="modules_to_not_convert"),
    "awq": Format(
        {
            "quant_method": "awq",
            "bits": 4,
            "group_size": GROUP,
            "version": "gemm",
            "zero_point": True,
        },
        _awq,
        ignored_as="modules_to_not_convert",
        dtype="float16",
    ),
    "gptq": Format(_of_gptq(), _gptq, dtype="float16"),
    "gptq of 8 bits": Format(_of_gptq(8), _gptq_of_8_bits, dtype="float16"),
    "auto-round": Format(
        {
            "quant_method": "auto-round",
            "bits": 4,
            "data_type": "int",
            "group_size": GROUP,
            "sym": True,
            "packing_format": "auto_round:auto_gptq",
            "block_name_to_quantize": "model.layers",
            "extra_config": {f"model.layers.{layer}.mlp.gate": {"bits": 16} for layer in range(2)},
        },
        _gptq,
        dtype="float16",
    ),
}

_COMMON = {
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "vocab_size": 128,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}


class Checkpoint:
    """A checkpoint in the making.

    Args:
        format: how its linear layers are quantized.
        ignored: names of those that are not, as the config has them.
        is_ignored: returns whether a layer is not quantized.
    """

    def __init__(
        self, format: Format, ignored: Sequence[str] = (), is_ignored: Callable[[str], bool] = lambda name: False
    ):
        self.format, self._ignored, self._is_ignored = format, ["lm_head", *ignored], is_ignored
        self.values = Values()
        self.tensors: dict[str, Tensor] = {}
        self.config: dict[str, Any] = {}

    def plain(self, name: str, *shape: int, dtype: str | None = None) -> None:
        """Add a tensor that is not quantized."""
        self.tensors[name] = self.values.scales(*shape, dtype=getattr(torch, dtype or self.format.dtype))

    def linears(self, prefix: str, columns: int, **rows: int) -> None:
        """Add layers that have the same inputs."""
        common: dict[str, Tensor] = {}
        for name, count in rows.items():
            if self._is_ignored(f"{prefix}.{name}"):
                self.plain(f"{prefix}.{name}.weight", count, columns)
                continue
            made = self.format.linear(self.values, count, columns)
            common = common or {part: made[part] for part in self.format.shared}
            for part, tensor in {**made, **common}.items():
                self.tensors[f"{prefix}.{name}.{part}"] = tensor

    def feed_forward(self, prefix: str, hidden: int, inner: int) -> None:
        """Add a gated feed-forward layer."""
        self.linears(prefix, hidden, gate_proj=inner, up_proj=inner)
        self.linears(prefix, inner, down_proj=hidden)

    def cache_scales(self, prefix: str) -> None:
        """Add the scales of the KV cache of an attention layer."""
        for part, shape in self.format.cache_scales.items():
            self.tensors[f"{prefix}.{part}"] = self.values.scales(*shape)

    def around(self, hidden: int) -> None:
        """Add what is not in a layer."""
        self.plain("model.embed_tokens.weight", _COMMON["vocab_size"], hidden)
        self.plain("model.norm.weight", hidden)
        self.plain("lm_head.weight", _COMMON["vocab_size"], hidden)

    def write(self, directory: Path) -> None:
        """Write the files."""
        save_file({name: t.clone().contiguous() for name, t in self.tensors.items()}, directory / "model.safetensors")
        config = {**_COMMON, **self.config, "dtype": self.format.dtype}
        if self.format.config:
            config["quantization_config"] = {**self.format.config, self.format.ignored_as: self._ignored}
        (directory / "config.json").write_text(json.dumps(config))


def qwen3(format: Format, experts: int = 0, inner: int = 256) -> Checkpoint:
    """Return a Qwen3 or, with experts, a Qwen3-MoE."""
    hidden, heads, kv_heads, head_dim = 256, 4, 2, 128
    layers = [f"model.layers.{number}" for number in range(2)]
    checkpoint = Checkpoint(format, [f"{layer}.mlp.gate" for layer in layers if experts])
    for layer in layers:
        attention = f"{layer}.self_attn"
        q, kv = heads * head_dim, kv_heads * head_dim
        checkpoint.linears(attention, hidden, q_proj=q, k_proj=kv, v_proj=kv)
        checkpoint.linears(attention, q, o_proj=hidden)
        checkpoint.cache_scales(attention)
        checkpoint.plain(f"{attention}.q_norm.weight", head_dim)
        checkpoint.plain(f"{attention}.k_norm.weight", head_dim)
        checkpoint.plain(f"{layer}.input_layernorm.weight", hidden)
        checkpoint.plain(f"{layer}.post_attention_layernorm.weight", hidden)
        if not experts:
            checkpoint.feed_forward(f"{layer}.mlp", hidden, inner)
            continue
        checkpoint.plain(f"{layer}.mlp.gate.weight", experts, hidden)
        for expert in range(experts):
            checkpoint.feed_forward(f"{layer}.mlp.experts.{expert}", hidden, inner)
    checkpoint.around(hidden)
    checkpoint.config = {
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "model_type": "qwen3_moe" if experts else "qwen3",
        "architectures": ["Qwen3MoeForCausalLM" if experts else "Qwen3ForCausalLM"],
    }
    if experts:
        checkpoint.config |= {"num_experts": experts, "num_experts_per_tok": 2, "moe_intermediate_size": inner}
        checkpoint.config |= {"decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True}
    return checkpoint


def qwen3_moe(format: Format) -> Checkpoint:
    """Return a Qwen3-MoE of four experts."""
    return qwen3(format, experts=4)


def qwen3_moe_of_one_block(format: Format) -> Checkpoint:
    """Return a Qwen3-MoE whose experts have as many inner rows as a block, so that ranks have half a block."""
    return qwen3(format, experts=4, inner=BLOCK)


def deepseek_v3(format: Format, only_experts: bool = False) -> Checkpoint:
    """Return a DeepSeek-V3, whose first layer has no experts; or one whose routed experts only are quantized."""
    hidden, inner, heads, experts, q_rank, kv_rank, nope, rope = 256, 256, 4, 4, 128, 128, 128, 64
    ignored = ["re:.*self_attn.*", "re:.*shared_experts.*", r"re:.*mlp\.(gate|up|gate_up|down)_proj.*"]
    checkpoint = Checkpoint(
        format,
        ignored if only_experts else [],
        (lambda name: ".experts." not in name) if only_experts else (lambda name: False),
    )
    for number in range(2):
        layer = f"model.layers.{number}"
        attention = f"{layer}.self_attn"
        checkpoint.linears(attention, hidden, q_a_proj=q_rank, kv_a_proj_with_mqa=kv_rank + rope)
        checkpoint.linears(attention, q_rank, q_b_proj=heads * (nope + rope))
        checkpoint.linears(attention, kv_rank, kv_b_proj=heads * 2 * nope)
        checkpoint.linears(attention, heads * nope, o_proj=hidden)
        checkpoint.plain(f"{attention}.q_a_layernorm.weight", q_rank)
        checkpoint.plain(f"{attention}.kv_a_layernorm.weight", kv_rank)
        checkpoint.plain(f"{layer}.input_layernorm.weight", hidden)
        checkpoint.plain(f"{layer}.post_attention_layernorm.weight", hidden)
        if number == 0:
            checkpoint.feed_forward(f"{layer}.mlp", hidden, inner)
            continue
        checkpoint.plain(f"{layer}.mlp.gate.weight", experts, hidden)
        checkpoint.plain(f"{layer}.mlp.gate.e_score_correction_bias", experts, dtype="float32")
        checkpoint.feed_forward(f"{layer}.mlp.shared_experts", hidden, inner)
        for expert in range(experts):
            checkpoint.feed_forward(f"{layer}.mlp.experts.{expert}", hidden, inner)
    checkpoint.around(hidden)
    checkpoint.config = {
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "q_lora_rank": q_rank,
        "kv_lora_rank": kv_rank,
        "qk_nope_head_dim": nope,
        "qk_rope_head_dim": rope,
        "v_head_dim": nope,
        "n_routed_experts": experts,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": inner,
        "first_k_dense_replace": 1,
        "moe_layer_freq": 1,
        "n_group": 1,
        "topk_group": 1,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "model_type": "deepseek_v3",
        "architectures": ["DeepseekV3ForCausalLM"],
    }
    return checkpoint


def deepseek_v32(format: Format) -> Checkpoint:
    """Return a DeepSeek-V3.2, whose attention has an indexer."""
    hidden, q_rank, heads, head_dim = 256, 128, 4, 128
    checkpoint = deepseek_v3(format)
    for indexer in (f"model.layers.{number}.self_attn.indexer" for number in range(2)):
        checkpoint.linears(indexer, q_rank, wq_b=heads * head_dim)
        checkpoint.linears(indexer, hidden, wk=head_dim)
        checkpoint.plain(f"{indexer}.weights_proj.weight", heads, hidden)
        checkpoint.plain(f"{indexer}.k_norm.weight", head_dim, dtype="float32")
        checkpoint.plain(f"{indexer}.k_norm.bias", head_dim, dtype="float32")
    checkpoint.config |= {
        "index_n_heads": heads,
        "index_head_dim": head_dim,
        "index_topk": 64,
        "model_type": "deepseek_v32",
        "architectures": ["DeepseekV32ForCausalLM"],
    }
    return checkpoint


def kimi_k2(format: Format) -> Checkpoint:
    """Return a Kimi-K2.5 without its tower: a DeepSeek-V3 whose routed experts only are quantized."""
    return deepseek_v3(format, only_experts=True)


def deepseek_v4(format: Format) -> Checkpoint:
    """Return a DeepSeek-V4: a layer with a table of experts by token, one with an indexer, and a plain one."""
    hidden, inner, heads, head_dim, experts, rank, groups, streams = 256, 256, 4, 128, 4, 128, 2, 4
    checkpoint = Checkpoint(format)
    mixed = 2 * streams + streams**2

    def connections(name: str, rows: int, scales: int) -> None:
        checkpoint.plain(f"{name}_fn", rows, streams * hidden, dtype="float32")
        checkpoint.plain(f"{name}_base", rows, dtype="float32")
        checkpoint.plain(f"{name}_scale", scales, dtype="float32")

    def compressor(name: str, ratio: int, twice: bool) -> None:
        width = head_dim * (2 if twice else 1)
        checkpoint.plain(f"{name}.ape", ratio, width, dtype="float32")
        checkpoint.plain(f"{name}.wkv.weight", width, hidden)
        checkpoint.plain(f"{name}.wgate.weight", width, hidden)
        checkpoint.plain(f"{name}.norm.weight", head_dim)

    for number in range(3):
        layer = f"layers.{number}"
        attention, feed_forward = f"{layer}.attn", f"{layer}.ffn"
        connections(f"{layer}.hc_attn", mixed, 3)
        connections(f"{layer}.hc_ffn", mixed, 3)
        checkpoint.plain(f"{attention}.attn_sink", heads, dtype="float32")
        checkpoint.linears(attention, hidden, wq_a=rank, wkv=head_dim)
        checkpoint.linears(attention, rank, wq_b=heads * head_dim)
        checkpoint.linears(attention, heads * head_dim // groups, wo_a=groups * rank)
        checkpoint.linears(attention, groups * rank, wo_b=hidden)
        checkpoint.plain(f"{attention}.q_norm.weight", rank)
        checkpoint.plain(f"{attention}.kv_norm.weight", head_dim)
        if number == 1:
            checkpoint.linears(f"{attention}.indexer", rank, wq_b=heads * head_dim)
            checkpoint.plain(f"{attention}.indexer.weights_proj.weight", heads, hidden)
            compressor(f"{attention}.indexer.compressor", 4, twice=True)
            compressor(f"{attention}.compressor", 4, twice=True)
        if number == 2:
            compressor(f"{attention}.compressor", 128, twice=False)
        checkpoint.plain(f"{feed_forward}.gate.weight", experts, hidden)
        if number == 0:
            checkpoint.tensors[f"{feed_forward}.gate.tid2eid"] = (
                checkpoint.values.words(_COMMON["vocab_size"], 2) % experts
            )
        else:
            checkpoint.plain(f"{feed_forward}.gate.bias", experts, dtype="float32")
        checkpoint.linears(f"{feed_forward}.shared_experts", hidden, w1=inner, w3=inner)
        checkpoint.linears(f"{feed_forward}.shared_experts", inner, w2=hidden)
        for expert in range(experts):
            for name, rows, columns in (("w1", inner, hidden), ("w2", hidden, inner), ("w3", inner, hidden)):
                weight = f"{feed_forward}.experts.{expert}.{name}"
                codes, scales = (
                    checkpoint.values.bytes(rows, columns // 2),
                    checkpoint.values.bytes(rows, columns // 32),
                )
                checkpoint.tensors[f"{weight}.weight"] = codes.view(torch.int8)
                checkpoint.tensors[f"{weight}.scale"] = scales.view(torch.float8_e8m0fnu)
        checkpoint.plain(f"{layer}.attn_norm.weight", hidden)
        checkpoint.plain(f"{layer}.ffn_norm.weight", hidden)
    connections("hc_head", streams, 1)
    checkpoint.plain("embed.weight", _COMMON["vocab_size"], hidden)
    checkpoint.plain("norm.weight", hidden)
    checkpoint.plain("head.weight", _COMMON["vocab_size"], hidden)
    checkpoint.config = {
        "num_hidden_layers": 3,
        "num_hash_layers": 1,
        "num_nextn_predict_layers": 0,
        "compress_ratios": [0, 4, 128],
        "num_attention_heads": heads,
        "num_key_value_heads": 1,
        "head_dim": head_dim,
        "qk_rope_head_dim": 64,
        "q_lora_rank": rank,
        "o_lora_rank": rank,
        "o_groups": groups,
        "index_n_heads": heads,
        "index_head_dim": head_dim,
        "index_topk": 64,
        "hc_mult": streams,
        "hc_eps": 1e-6,
        "hc_sinkhorn_iters": 20,
        "n_routed_experts": experts,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": inner,
        "expert_dtype": "fp4",
        "scoring_func": "sqrtsoftplus",
        "topk_method": "noaux_tc",
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.5,
        "swiglu_limit": 10.0,
        "sliding_window": 128,
        "rope_theta": 10000,
        "compress_rope_theta": 160000,
        "rope_scaling": {
            "type": "yarn",
            "factor": 16,
            "beta_fast": 32,
            "beta_slow": 1,
            "original_max_position_embeddings": 16,
        },
        "model_type": "deepseek_v4",
        "architectures": ["DeepseekV4ForCausalLM"],
    }
    return checkpoint


def gpt_oss(format: Format) -> Checkpoint:
    """Return a gpt-oss, whose experts are stacked, with bias; the rest is not quantized."""
    hidden, inner, heads, kv_heads, head_dim, experts = 256, 256, 4, 2, 64, 4
    checkpoint = Checkpoint(format, ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens"])
    for number in range(2):
        layer = f"model.layers.{number}"
        attention, stacks = f"{layer}.self_attn", f"{layer}.mlp.experts"
        rows = {"q_proj": heads * head_dim, "k_proj": kv_heads * head_dim, "v_proj": kv_heads * head_dim}
        for name, count in rows.items():
            checkpoint.plain(f"{attention}.{name}.weight", count, hidden)
            checkpoint.plain(f"{attention}.{name}.bias", count)
        checkpoint.plain(f"{attention}.o_proj.weight", hidden, heads * head_dim)
        checkpoint.plain(f"{attention}.o_proj.bias", hidden)
        checkpoint.plain(f"{attention}.sinks", heads)
        checkpoint.plain(f"{layer}.mlp.router.weight", experts, hidden)
        checkpoint.plain(f"{layer}.mlp.router.bias", experts)
        for name, count, columns in (("gate_up_proj", 2 * inner, hidden), ("down_proj", hidden, inner)):
            for part, tensor in format.linear(checkpoint.values, experts * count, columns).items():
                checkpoint.tensors[f"{stacks}.{name}{part}"] = tensor.unflatten(0, (experts, count))
            checkpoint.plain(f"{stacks}.{name}_bias", experts, count)
        checkpoint.plain(f"{layer}.input_layernorm.weight", hidden)
        checkpoint.plain(f"{layer}.post_attention_layernorm.weight", hidden)
    checkpoint.around(hidden)
    checkpoint.config = {
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "num_local_experts": experts,
        "num_experts_per_tok": 2,
        "intermediate_size": inner,
        "sliding_window": 128,
        "layer_types": ["sliding_attention", "full_attention"],
        "swiglu_limit": 7.0,
        "model_type": "gpt_oss",
        "architectures": ["GptOssForCausalLM"],
    }
    return checkpoint


def quantize_experts(directory: Path) -> int:
    """Quantize the experts of a checkpoint to FP8 per channel, if each has tensors of its own; return their number."""
    file, config = directory / "model.safetensors", json.loads((directory / "config.json").read_text())
    format, values = FORMATS["compressed-tensors fp8 per channel"], Values()
    tensors = load_file(file)
    names = [name for name in tensors if re.search(r"\.experts\.\d+\..*\.weight$", name)]
    for name in names:
        made = format.linear(values, *tensors.pop(name).shape)
        tensors |= {f"{name.removesuffix('weight')}{part}": tensor for part, tensor in made.items()}
    save_file(tensors, file)
    others = r"re:^(?!.*\.experts\.\d).*"
    (directory / "config.json").write_text(
        json.dumps({**config, "quantization_config": {**format.config, format.ignored_as: [others]}})
    )
    return len(names)


def quantize_llama4(directory: Path, seed: int = 0) -> None:
    """Quantize the language model of a Llama-4 as ModelOpt does: one scale for the experts of a layer."""
    file, config = directory / "model.safetensors", json.loads((directory / "config.json").read_text())
    format, values, tensors = FORMATS["modelopt fp8"], Values(seed), load_file(file)
    for name in [*tensors]:
        if not name.startswith("language_model.model.layers.") or not re.search(r"_proj(\.weight)?$", name):
            continue
        made = format.linear(values, 1, 1)
        tensors[name] = values.fp8(*tensors[name].shape)
        prefix = f"{name}_" if ".experts." in name else name.removesuffix("weight")
        tensors |= {f"{prefix}{part}": tensor for part, tensor in made.items() if part != "weight"}
    save_file(tensors, file)
    others = ["*router*", "*vision_model*", "*multi_modal_projector*", "*lm_head*"]
    (directory / "config.json").write_text(
        json.dumps({**config, "quantization_config": {**format.config, format.ignored_as: others}})
    )
