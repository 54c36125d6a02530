"""Tests of the recipe for Ling and Ring models, on the names of their published files."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers", reason="recipes return transformers' rule objects")

from automodel_conv.recipes import bailing_moe
from tests.recipes.support import CHECKS, FLOAT32, PLAIN, Family, is_named_by_the_error_without_rules, write


def ling(model_type: str) -> Family:
    """Return Ling-mini-2.0, which has a layer of multi-token prediction. Source: vLLM 0.33.0, ``bailing_moe.py``."""
    inner, hidden = 24, 40
    modules = {"model.layers.1.mlp.experts": 3, "model.layers.2.mlp.experts": 3}
    others = {
        "model.word_embeddings.weight": ((48, hidden), PLAIN),
        "model.norm.weight": ((hidden,), PLAIN),
        "lm_head.weight": ((48, hidden), PLAIN),
        "model.layers.0.mlp.gate_proj.weight": ((64, hidden), PLAIN),
        "model.layers.0.mlp.up_proj.weight": ((64, hidden), PLAIN),
        "model.layers.0.mlp.down_proj.weight": ((hidden, 64), PLAIN),
        "model.layers.2.eh_proj.weight": ((hidden, 2 * hidden), PLAIN),
    }
    for module, experts in modules.items():
        prefix = module.removesuffix(".mlp.experts")
        others |= {
            f"{prefix}.attention.query_key_value.weight": ((3 * 16, hidden), PLAIN),
            f"{prefix}.attention.dense.weight": ((hidden, 16), PLAIN),
            f"{prefix}.mlp.gate.weight": ((experts, hidden), PLAIN),
            f"{prefix}.mlp.gate.expert_bias": ((experts,), FLOAT32),
            f"{prefix}.mlp.shared_experts.gate_proj.weight": ((inner, hidden), PLAIN),
            f"{prefix}.mlp.shared_experts.up_proj.weight": ((inner, hidden), PLAIN),
            f"{prefix}.mlp.shared_experts.down_proj.weight": ((hidden, inner), PLAIN),
        }
    config = {
        "architectures": ["BailingMoeV2ForCausalLM"],
        "auto_map": {"AutoConfig": "configuration_bailing_moe_v2.BailingMoeV2Config"},
        "model_type": model_type,
        "torch_dtype": "bfloat16",
    }
    return Family(bailing_moe, config, modules, ("gate_proj", "up_proj", "down_proj"), (inner, hidden), others)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_published_checkpoint(tmp_path, check):
    check(write(tmp_path / "published", ling("bailing_moe")))


def test_second_type_has_the_same_recipe(tmp_path):
    is_named_by_the_error_without_rules(write(tmp_path / "published", ling("bailing_moe_v2")))
