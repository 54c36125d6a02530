"""Tests of the recipes for Kimi models, on the names and formats of their published files."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="recipes return transformers' rule objects")

from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

import automodel_conv as amc
from automodel_conv.recipes import kimi_k2, kimi_k3
from tests.quantized.producers import PRODUCERS
from tests.recipes.support import (
    CHECKS,
    DENSE,
    EXPERTS,
    FLOAT32,
    PLAIN,
    Family,
    Others,
    assert_same,
    tensors_of,
    write,
)

UNQUANTIZED = ["re:.*self_attn.*", "re:.*shared_experts.*", r"re:.*mlp\.(gate|up|gate_up|down)_proj.*"]


def mlp(prefix: str, hidden: int, inner: int) -> Others:
    """Return the matrices of a dense layer, or of shared experts."""
    shapes = {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
    return {f"{prefix}.{name}.weight": (shape, DENSE) for name, shape in shapes.items()}


def k2(scheme: str = "", *, dense: bool = False, sizes: tuple[int, int] = (128, 256)) -> Family:
    """Return Kimi-K2 with experts in a format, and all other matrices too or not.

    Its layers have one and three experts.

    Source: config.json of moonshotai/Kimi-K2-Instruct (FP8), and of Kimi-K2.5 for the INT4 of Kimi-K2-Thinking.
    """
    inner, hidden = sizes
    producer = PRODUCERS.get(scheme)
    config = {
        "architectures": ["DeepseekV3ForCausalLM"],
        "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
        "model_type": "kimi_k2",
        "torch_dtype": "bfloat16",
    }
    if producer is not None:
        ignored = {} if dense else {"ignore": ["lm_head", *UNQUANTIZED]}
        config["quantization_config"] = {**producer.config, **ignored}
    attention = {
        "q_a_proj": (96, hidden),
        "q_b_proj": (192, 96),
        "kv_a_proj_with_mqa": (72, hidden),
        "kv_b_proj": (160, 64),
        "o_proj": (hidden, 128),
    }
    others = {
        "model.embed_tokens.weight": ((40, hidden), PLAIN),
        "model.norm.weight": ((hidden,), PLAIN),
        "lm_head.weight": ((40, hidden), PLAIN),
        **mlp("model.layers.0.mlp", hidden, 2 * inner),
    }
    modules = {"model.layers.1.mlp.experts": 1, "model.layers.2.mlp.experts": 3}
    for module, experts in modules.items():
        prefix = module.removesuffix(".mlp.experts")
        others |= {
            f"{prefix}.input_layernorm.weight": ((hidden,), PLAIN),
            f"{prefix}.self_attn.kv_a_layernorm.weight": ((64,), PLAIN),
            **{f"{prefix}.self_attn.{name}.weight": (shape, DENSE) for name, shape in attention.items()},
            f"{prefix}.mlp.gate.weight": ((experts, hidden), PLAIN),
            f"{prefix}.mlp.gate.e_score_correction_bias": ((experts,), FLOAT32),
            **mlp(f"{prefix}.mlp.shared_experts", hidden, inner),
        }
    return Family(
        kimi_k2,
        config,
        modules,
        ("gate_proj", "up_proj", "down_proj"),
        sizes,
        others,
        producer,
        producer if dense else None,
        are_groupable=dense,
    )


def k3(scheme: str = "mxfp4 of compressed-tensors", dense: str = "") -> Family:
    """Return Kimi-K3: experts that are narrower than the model, and dense matrices in a format of modelopt or in none.

    Sources: config.json of moonshotai/Kimi-K3; https://github.com/lablup/mlxcel/issues/1334 for names and dtypes.
    """
    sizes, experts = (96, 160), 3
    latent, hidden = sizes[1], 192
    producer = PRODUCERS[scheme]
    config: dict[str, Any] = {
        "architectures": ["KimiK3ForConditionalGeneration"],
        "auto_map": {"AutoConfig": "configuration_kimi_k3.KimiK3Config"},
        "dtype": "bfloat16",
        "model_type": "kimi_k3",
        "text_config": {"model_type": "kimi_linear", "dtype": "bfloat16"},
    }
    layer = "language_model.model.layers.1"
    moe = f"{layer}.block_sparse_moe"
    others = {
        "language_model.lm_head.weight": ((40, hidden), PLAIN),
        "language_model.model.embed_tokens.weight": ((40, hidden), PLAIN),
        "language_model.model.output_attn_res_proj.weight": ((1, hidden), PLAIN),
        **mlp("language_model.model.layers.0.mlp", hidden, 64),
        f"{layer}.mlp_res_norm.weight": ((hidden,), PLAIN),
        f"{layer}.self_attention_res_proj.weight": ((1, hidden), PLAIN),
        f"{layer}.self_attn.A_log": ((8,), FLOAT32),
        f"{layer}.self_attn.q_conv1d.weight": ((64, 1, 4), FLOAT32),
        f"{layer}.self_attn.q_proj.weight": ((64, hidden), PLAIN),
        f"{moe}.gate.weight": ((experts, hidden), PLAIN),
        f"{moe}.gate.e_score_correction_bias": ((experts,), FLOAT32),
        f"{moe}.routed_expert_down_proj.weight": ((latent, hidden), PLAIN),
        f"{moe}.routed_expert_norm.weight": ((latent,), PLAIN),
        f"{moe}.routed_expert_up_proj.weight": ((hidden, latent), PLAIN),
        **mlp(f"{moe}.shared_experts", hidden, 64),
        "vision_tower.encoder.blocks.0.wqkv.weight": ((96, 32), PLAIN),
        "mm_projector.proj.0.weight": ((hidden, 32), PLAIN),
    }
    modules, matrices = {f"{moe}.experts": experts}, ("w1", "w3", "w2")
    if not dense:
        ignored = [*UNQUANTIZED, "re:.*lm_head.*", "re:.*vision_tower.*", "re:.*mm_projector.*"]
        config["text_config"]["quantization_config"] = {**producer.config, "ignore": ignored}
        return Family(kimi_k3, config, modules, matrices, sizes, others, producer)
    family = Family(kimi_k3, config, modules, matrices, sizes, others, producer, PRODUCERS[dense])
    algorithms = {EXPERTS: producer.config["quant_algo"], DENSE: PRODUCERS[dense].config["quant_algo"]}
    config["quantization_config"] = {
        "quant_method": "modelopt",
        "quant_algo": "MIXED_PRECISION",
        "quantized_layers": {
            name.removesuffix(".weight"): {"quant_algo": algorithms[kind]}
            for name, (_, kind) in tensors_of(family).items()
            if kind in algorithms
        },
    }
    return family


FAMILIES = {
    "K2 in bfloat16, square": k2(sizes=(64, 64)),
    "K2 in bfloat16, one row": k2(sizes=(1, 3)),
    "K2-Instruct, FP8": k2("fp8 128x128", dense=True),
    "K2-Thinking, INT4": k2("int4 g32"),
    "K2-Thinking-NVFP4": k2("nvfp4 of modelopt"),
    "K3, MXFP4": k3(),
    "K3-NVFP4, other matrices MXFP8": k3("nvfp4 of modelopt", "mxfp8 of modelopt"),
}


def test_k2_fills_a_model_of_deepseek_v3_without_a_recipe(tmp_path):
    sizes: dict[str, Any] = {
        "q_lora_rank": 16,
        "kv_lora_rank": 8,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "v_head_dim": 8,
    }
    config = DeepseekV3Config(
        **sizes,
        hidden_size=24,
        intermediate_size=40,
        moe_intermediate_size=12,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_hidden_layers=2,
        first_k_dense_replace=1,
        n_routed_experts=4,
        n_group=1,
        topk_group=1,
        vocab_size=32,
    )
    model = DeepseekV3ForCausalLM(config)
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(written | {"model_type": "kimi_k2"}))
    with torch.device("meta"):
        filled = DeepseekV3ForCausalLM(config)
    report = amc.load_model(filled, tmp_path)
    loaded = amc.load_state_dict(tmp_path, rules=kimi_k2())
    assert not report.missing_keys
    assert_same(filled.state_dict(), model.state_dict())
    assert_same(loaded, model.state_dict())


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_published_checkpoint(tmp_path, family, check):
    check(write(tmp_path / "published", family))
