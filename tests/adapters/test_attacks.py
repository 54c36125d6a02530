"""Tests of adapters that would be merged or converted wrongly without an error, or fail with an error of Python."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import automodel_conv as amc
from tests.comparing import assert_same, tensors_of

A, B = torch.arange(6.0).view(2, 3), torch.arange(8.0).view(4, 2)
EXPERT_SHAPES = {"gate": (64, 128), "up": (64, 128), "down": (128, 64)}
FACTORS = {"base_model.model.q.lora_A.weight": A, "base_model.model.q.lora_B.weight": B}


@pytest.fixture
def base(tmp_path) -> Path:
    (tmp_path / "base").mkdir()
    save_file({"q.weight": torch.zeros(4, 3), "k.weight": torch.ones(4, 3)}, tmp_path / "base" / "model.safetensors")
    return tmp_path / "base"


def written(path: Path, tensors: Mapping[str, Tensor] = FACTORS, **settings) -> Path:
    path.mkdir()
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q"]}
    (path / "adapter_config.json").write_text(json.dumps(config | settings))
    return path


@pytest.mark.parametrize(
    "more",
    [
        {"q.lora_A.weight": A},
        {"base_model.model.q.lora_B.default.weight": B},
        {"k.weight": A, "base_model.model.k.base_layer.weight": A},
    ],
    ids=["prefix", "default", "whole"],
)
def test_two_tensors_for_one_place_are_refused_with_both_names(base, more, tmp_path):
    adapter = written(tmp_path / "adapter", FACTORS | more)
    with pytest.raises(amc.NameProblems, match="two tensors for one place") as caught:
        amc.merge_adapter(base, adapter, tmp_path / "merged")
    assert all(name in str(caught.value) for name in more)
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("alpha", [float("inf"), -float("inf"), 10**400, 1e19])
def test_alpha_beyond_float32_is_refused(base, alpha, tmp_path):
    adapter = written(tmp_path / "adapter", lora_alpha=alpha)
    with pytest.raises(amc.CheckpointError, match="alpha of lora_alpha"):
        amc.merge_adapter(base, adapter, tmp_path / "merged")
    with pytest.raises(amc.CheckpointError, match="alpha of lora_alpha"):
        amc.convert_adapter(adapter, tmp_path / "converted", base=base, layout="per_expert")


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), 10**400, -1e19])
def test_weight_beyond_float32_is_refused(base, weight, tmp_path):
    adapter = written(tmp_path / "adapter")
    with pytest.raises(amc.UnsupportedError, match="weight of at most 1e\\+18"):
        amc.merge_adapter(base, [(adapter, weight)], tmp_path / "merged")


def test_largest_alpha_and_weight_give_a_float32(base, tmp_path):
    amc.merge_adapter(base, [(written(tmp_path / "adapter", lora_alpha=1e18), 1e18)], tmp_path / "merged")
    merged = tensors_of(tmp_path / "merged")["q.weight"]
    torch.testing.assert_close(merged.double(), 5e35 * (B.double() @ A.double()), rtol=2**-22, atol=0)


@pytest.mark.parametrize("pattern", ["(?i)q", "(", "a{99999999999}", "(" * 9999 + ")" * 9999])
@pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern"])
def test_pattern_that_peft_cannot_compile_is_refused(base, key, pattern, tmp_path):
    adapter = written(tmp_path / "adapter", FACTORS, **{key: {pattern: 2}})
    with pytest.raises(amc.CheckpointError, match=key):
        amc.merge_adapter(base, adapter, tmp_path / "merged")


def test_lora_ga_is_refused_because_it_changed_the_base(base, tmp_path):
    adapter = written(tmp_path / "adapter", init_lora_weights="lora_ga")
    with pytest.raises(amc.UnsupportedError, match="lora_ga"):
        amc.merge_adapter(base, adapter, tmp_path / "merged")


def saved_by_peft(path: Path, is_tied: bool = False, **settings):
    """Write a base, and an adapter of PEFT with random matrices; return the model with the adapter."""
    peft = pytest.importorskip("peft", reason="PEFT writes the adapter")
    from tests.adapters.support import dyadic
    from tests.model_zoo import build_model, write_checkpoint

    model = build_model("qwen3_moe")
    if is_tied:
        model.config.tie_word_embeddings = True
        model.tie_weights()
    write_checkpoint(model, path / "base")
    peft_model = peft.get_peft_model(model, peft.LoraConfig(r=2, **settings))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in peft_model.named_parameters():
        if ".lora_" in name or ".modules_to_save." in name:
            parameter.data.copy_(dyadic(parameter.shape, generator))
    peft_model.save_pretrained(path / "adapter")
    return peft_model


@pytest.mark.parametrize("layout", ["per_expert", "transformers", "vllm"])
@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["embed_tokens", "lm_head"]},  # PEFT saves the weights of these layers, too
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "input_layernorm"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["experts"]},
    ],
    ids=["embeddings", "layers", "experts"],
)
def test_replaced_weights_keep_their_bytes_in_another_form(layout, settings, tmp_path):
    saved_by_peft(tmp_path, **settings)
    base, adapter, converted = (tmp_path / name for name in ("base", "adapter", "converted"))
    if layout == "per_expert" and "experts" in settings.get("modules_to_save", ()):
        with pytest.raises(amc.UnsupportedError, match="replaces a part"):
            amc.convert_adapter(adapter, converted, base=base, layout=layout)
        return
    amc.convert_adapter(adapter, converted, base=base, layout=layout)
    assert_same(tensors_of(converted), tensors_of(adapter))
    before, after = (json.loads((p / "adapter_config.json").read_text()) for p in (adapter, converted))
    saved = after["modules_to_save"] or []
    assert all(name.endswith(tuple(before["modules_to_save"])) for name in saved)
    assert bool(saved) == bool(before["modules_to_save"])
    amc.merge_adapter(base, adapter, tmp_path / "merged")
    amc.merge_adapter(base, converted, tmp_path / "again")
    assert_same(tensors_of(tmp_path / "again"), tensors_of(tmp_path / "merged"))


@pytest.mark.parametrize("layout", ["per_expert", "transformers", "vllm"])
@pytest.mark.parametrize("targets", [["lm_head"], ["embed_tokens", "lm_head"]], ids=["head", "both"])
def test_module_of_a_tied_weight_keeps_its_name(layout, targets, tmp_path):
    saved_by_peft(tmp_path, is_tied=True, target_modules=targets)
    assert "lm_head.weight" not in tensors_of(tmp_path / "base")
    amc.convert_adapter(tmp_path / "adapter", tmp_path / "converted", base=tmp_path / "base", layout=layout)
    assert_same(tensors_of(tmp_path / "converted"), tensors_of(tmp_path / "adapter"))
    assert json.loads((tmp_path / "converted" / "adapter_config.json").read_text())["target_modules"] == targets


@pytest.mark.parametrize("adapter", ["merged", "only", "fused"])
def test_changed_scale_in_memory_is_refused(adapter, tmp_path):
    model = saved_by_peft(tmp_path, target_modules=["q_proj"])
    layer = model.get_submodule("base_model.model.model.layers.1.self_attn.q_proj")
    layer.set_scale("default", 0.5)
    with pytest.raises(amc.UnsupportedError, match=r"layers\.1\.self_attn\.q_proj") as caught:
        amc.save_checkpoint(model, tmp_path / "saved", adapter=adapter)
    assert "layers.0" not in str(caught.value)
    layer.set_scale("default", 1)
    amc.save_checkpoint(model, tmp_path / "saved", adapter=adapter)


@pytest.mark.parametrize("name", ["gptq", "awq", "int4 g32", "fp4 experts", "fp8 32x16"])
def test_decoded_weights_in_any_arrangement_are_merged(name, tmp_path):
    pytest.importorskip("transformers", reason="the rules are transformers'")
    from automodel_conv.planning.methods.method import part_name
    from tests.quantized.producers import PRODUCERS

    generator = torch.Generator().manual_seed(0)
    shapes = {f"model.layers.0.mlp.experts.{e}.{p}_proj": s for e in range(2) for p, s in EXPERT_SHAPES.items()}
    base, stored, factors = tmp_path / "base", {}, {}
    for module, (outputs, inputs) in shapes.items():
        parts, _ = PRODUCERS[name].make(torch.randn(outputs, inputs, generator=generator).bfloat16())
        stored |= {part_name(f"{module}.weight", suffix): part.contiguous() for suffix, part in parts.items()}
        a, b = torch.randn(2, inputs, generator=generator), torch.randn(outputs, 2, generator=generator)
        factors |= {f"base_model.model.{module}.lora_A.weight": a, f"base_model.model.{module}.lora_B.weight": b}
    base.mkdir()
    save_file(stored, base / "model.safetensors")
    (base / "config.json").write_text(json.dumps({"quantization_config": PRODUCERS[name].config}))
    adapter = written(tmp_path / "adapter", factors)
    amc.convert_checkpoint(base, tmp_path / "decoded", rules=[], dequantize=True)
    amc.merge_adapter(tmp_path / "decoded", adapter, tmp_path / "expected")
    amc.merge_adapter(base, adapter, tmp_path / "merged", dequantize=True)
    assert_same(tensors_of(tmp_path / "merged"), tensors_of(tmp_path / "expected"))
    amc.convert_adapter(adapter, tmp_path / "same", base=base, layout="per_expert")
    assert_same(tensors_of(tmp_path / "same"), tensors_of(adapter))
    with pytest.raises(amc.UnsupportedError, match="changes 6 tensors that are quantized"):
        amc.merge_adapter(base, adapter, tmp_path / "refused")
