"""Tests of the recipe for DeepSeek-V4.1, on the names and formats of its published files."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers", reason="recipes return transformers' rule objects")

from automodel_conv.recipes import deepseek_v41
from tests.quantized.producers import PRODUCERS, Producer, Stored
from tests.recipes.support import CHECKS, DENSE, FLOAT32, PLAIN, Family, write


def with_exponents(weight: Tensor) -> tuple[Stored, Tensor]:
    """Quantize in blocks of 32 x 32, whose scales are exponents under the name ``.scale``."""
    stored, exact = PRODUCERS["fp8 ue8m0"].make(weight)
    return {"": stored[""], ".scale": stored["_scale_inv"].to(torch.float8_e8m0fnu)}, exact


SIZES = INNER, HIDDEN = 64, 96
QUANTIZATION = {
    "activation_scheme": "dynamic",
    "expert_dtype": "fp4",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "scale_fmt": "ue8m0",
    "weight_block_size": [32, 32],
}


def v41() -> Family:
    """Return DeepSeek-V4.1-Flash: FP4 experts, other matrices FP8 in blocks of 32 x 32.

    Sources: vLLM 0.33.0, ``models/deepseek_v41`` and ``transformers_utils/configs/deepseek_v41.py``; for the names,
    https://github.com/EfficientMoE/MoE-Infinity/pull/210.
    """
    modules = {"layers.0.ffn.experts": 1, "layers.1.ffn.experts": 3, "mtp.0.ffn.experts": 3}
    others = {
        "embed.weight": ((40, HIDDEN), PLAIN),
        "head.weight": ((40, HIDDEN), PLAIN),
        "norm.weight": ((HIDDEN,), PLAIN),
        "vision.patch_embed.proj.weight": ((32, 12), PLAIN),
        "vision.blocks.0.attn.wqkv.weight": ((96, 32), PLAIN),
        "layers.1.engram.embed.weight": ((128, 64), DENSE),
    }
    for module, experts in modules.items():
        prefix = module.removesuffix(".ffn.experts")
        others |= {
            f"{prefix}.attn_norm.weight": ((HIDDEN,), PLAIN),
            f"{prefix}.attn.attn_sink": ((4,), FLOAT32),
            f"{prefix}.attn.wq_a.weight": ((64, HIDDEN), DENSE),
            f"{prefix}.attn.wkv.weight": ((32, HIDDEN), DENSE),
            f"{prefix}.ffn.gate.weight": ((experts, HIDDEN), PLAIN),
            f"{prefix}.ffn.gate.bias": ((experts,), FLOAT32),
            f"{prefix}.ffn.shared_experts.w1.weight": ((INNER, HIDDEN), DENSE),
            f"{prefix}.ffn.shared_experts.w2.weight": ((HIDDEN, INNER), DENSE),
            f"{prefix}.ffn.shared_experts.w3.weight": ((INNER, HIDDEN), DENSE),
            f"{prefix}.hc_ffn_fn": ((24, 4 * HIDDEN), FLOAT32),
        }
    config = {
        "architectures": ["DeepseekV41ForCausalLM"],
        "dtype": "bfloat16",
        "model_type": "deepseek_v41",
        "quantization_config": QUANTIZATION,
        "text_config": {"n_routed_experts": 3, "num_hidden_layers": 2},
    }
    dense = Producer(QUANTIZATION, with_exponents)
    return Family(deepseek_v41, config, modules, ("w1", "w3", "w2"), SIZES, others, PRODUCERS["fp4 experts"], dense)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_published_checkpoint(tmp_path, check):
    check(write(tmp_path / "published", v41()))
