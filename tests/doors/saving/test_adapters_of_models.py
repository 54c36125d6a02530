"""Tests of saving models with adapters of PEFT: merged, or the adapter alone."""

import json

import pytest
import torch

import automodel_conv as amc
from automodel_conv.errors import DestinationError, UnsupportedError
from tests.comparing import assert_same, tensors_of

pytest.importorskip("peft", reason="makes models of PEFT")
pytest.importorskip("transformers", reason="makes models of transformers")

import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from tests.doors.adapters.support import CONFIG, EXPERTS, HIDDEN, INNER

STACKS = ["experts.gate_up_proj", "experts.down_proj"]
WAYS = {
    "stacks": {"target_parameters": STACKS, "target_modules": []},
    "one stack": {"target_parameters": STACKS[1:], "target_modules": ["q_proj", "v_proj"]},
    "layers": {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "embed_tokens"]},
    "whole tensors": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]},
    "scales": {"target_modules": ["q_proj", "o_proj"], "alpha_pattern": {"o_proj": 8}, "rank_pattern": {"q_proj": 4}},
}


def quarters(tensor, seed):
    """Fill a tensor with quarters, whose products and sums are exact in float32."""
    tensor.copy_(torch.randint(-4, 5, tensor.shape, generator=torch.Generator().manual_seed(seed)) / 4)


def base_model(dtype=torch.float32):
    model = transformers.Qwen3MoeForCausalLM._from_config(transformers.Qwen3MoeConfig(**CONFIG), dtype=dtype)
    with torch.no_grad():
        for seed, parameter in enumerate(model.parameters()):
            quarters(parameter, seed)
    return model


def with_adapter(way, dtype=torch.float32, **more):
    model = get_peft_model(base_model(dtype), LoraConfig(r=2, lora_alpha=4, **WAYS[way] | more))
    fill(model)
    return model


def fill(model, seed=1000):
    with torch.no_grad():
        for number, (name, parameter) in enumerate(model.named_parameters()):
            if "lora_" in name or "modules_to_save" in name:
                quarters(parameter, seed + number)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_merged_is_what_peft_merges(tmp_path, way, dtype):
    model = with_adapter(way, dtype)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = amc.save_checkpoint(model, tmp_path / "ours", adapter="merged")
    assert report.files == ("model.safetensors",)
    assert_same(model.state_dict(), before)
    model.merge_and_unload().save_pretrained(tmp_path / "upstream")
    assert_same(tensors_of(tmp_path / "ours"), tensors_of(tmp_path / "upstream"))
    ours, upstream = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("ours", "upstream"))
    assert ours == upstream


@pytest.mark.parametrize("options", [{"layout": "transformers"}, {"threads": 1, "scratch_bytes": 1 << 16}], ids=str)
def test_options_of_a_save_apply_to_the_merged_model(tmp_path, options):
    model = with_adapter("stacks")
    amc.save_checkpoint(model, tmp_path / "ours", adapter="merged", max_shard_size="4KB", **options)
    amc.save_checkpoint(model.merge_and_unload(), tmp_path / "upstream", max_shard_size="4KB", **options)
    assert_same(tensors_of(tmp_path / "ours"), tensors_of(tmp_path / "upstream"))
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 1


def test_weights_are_cast_before_the_sum(tmp_path):
    model = with_adapter("stacks", torch.bfloat16)
    amc.save_checkpoint(model, tmp_path / "ours", adapter="merged", dtype=torch.float32)
    wide = with_adapter("stacks", torch.float32)
    amc.save_checkpoint(wide.merge_and_unload(), tmp_path / "upstream")
    assert_same(tensors_of(tmp_path / "ours"), tensors_of(tmp_path / "upstream"))


def test_active_adapters_are_merged_together(tmp_path):
    model = with_adapter("layers")
    model.add_adapter("second", LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "down"]))
    fill(model)
    model.base_model.set_adapter(["default", "second"])
    amc.save_checkpoint(model, tmp_path / "both", adapter="merged")
    model.base_model.set_adapter(["second"])
    amc.save_checkpoint(model, tmp_path / "second", adapter="merged")
    model.base_model.set_adapter(["default", "second"])
    both = model.merge_and_unload(adapter_names=["default", "second"])
    both.save_pretrained(tmp_path / "upstream")
    assert_same(tensors_of(tmp_path / "both"), tensors_of(tmp_path / "upstream"))
    first, second = tensors_of(tmp_path / "both"), tensors_of(tmp_path / "second")
    assert {name for name in first if not torch.equal(first[name], second[name])} > {"model.embed_tokens.weight"}


@pytest.mark.parametrize("way", ["stacks", "one stack", "layers", "scales"])
@pytest.mark.parametrize("adapter", ["only", "fused"])
def test_saved_adapter_merges_to_the_same_weights(tmp_path, way, adapter):
    model = with_adapter(way)
    report = amc.save_checkpoint(model, tmp_path / "adapter", adapter=adapter)
    assert report.files == ("adapter_model.safetensors",)
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    base_model().save_pretrained(tmp_path / "base")
    amc.merge_adapter(tmp_path / "base", tmp_path / "adapter", tmp_path / "ours")
    model.merge_and_unload().save_pretrained(tmp_path / "upstream")
    assert_same(tensors_of(tmp_path / "ours"), tensors_of(tmp_path / "upstream"))


@pytest.mark.parametrize("way", WAYS)
def test_fused_adapter_is_loaded_by_peft(tmp_path, way):
    model = with_adapter(way)
    amc.save_checkpoint(model, tmp_path / "adapter", adapter="fused")
    loaded = PeftModel.from_pretrained(base_model(), str(tmp_path / "adapter"))
    expected, found = model.merge_and_unload().state_dict(), loaded.merge_and_unload().state_dict()
    assert_same(found, expected)


def test_only_names_every_expert(tmp_path):
    amc.save_checkpoint(with_adapter("stacks"), tmp_path, adapter="only")
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items() if ".layers.1.mlp." in name}
    start = "base_model.model.model.layers.1.mlp.experts"
    for expert in range(EXPERTS):
        for name, outputs, inputs in (("gate", INNER, HIDDEN), ("up", INNER, HIDDEN), ("down", HIDDEN, INNER)):
            assert shapes.pop(f"{start}.{expert}.{name}_proj.lora_A.weight") == (2, inputs)
            assert shapes.pop(f"{start}.{expert}.{name}_proj.lora_B.weight") == (outputs, 2)
    assert not shapes


def test_transformers_model_with_adapters_is_saved(tmp_path):
    model = base_model()
    try:
        model.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"]))
    except (ImportError, ValueError) as error:
        pytest.skip(f"transformers wants another PEFT: {error}")
    fill(model)
    expected = base_model().state_dict()
    layer = model.model.layers[0].self_attn.q_proj
    with torch.no_grad():
        expected["model.layers.0.self_attn.q_proj.weight"] += layer.get_delta_weight("default")
    amc.save_checkpoint(model, tmp_path / "merged", adapter="merged")
    found = tensors_of(tmp_path / "merged")
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(found[name], expected[name])


def nothing_is_written(directory):
    return not directory.exists()


def test_model_with_adapters_needs_the_argument(tmp_path):
    with pytest.raises(UnsupportedError, match=r'(?s)has PEFT adapters.*adapter="merged".*adapter="only"'):
        amc.save_checkpoint(with_adapter("layers"), tmp_path / "out")
    assert nothing_is_written(tmp_path / "out")


@pytest.mark.parametrize("value", ["Merged", "per_expert", "", True, 3], ids=str)
def test_other_values_are_refused(tmp_path, value):
    with pytest.raises(UnsupportedError, match=r"(?s)unknown adapter=.*merged.*only.*fused"):
        amc.save_checkpoint(with_adapter("layers"), tmp_path / "out", adapter=value)
    assert nothing_is_written(tmp_path / "out")


@pytest.mark.parametrize("value", ["merged", "only", "fused"])
def test_model_without_adapters_is_refused(tmp_path, value):
    for thing in (base_model(), dict(base_model().state_dict())):
        with pytest.raises(UnsupportedError, match=r"(?s)no model with adapters of PEFT.*leave adapter= out"):
            amc.save_checkpoint(thing, tmp_path / "out", adapter=value)
    assert nothing_is_written(tmp_path / "out")


@pytest.mark.parametrize("value", ["only", "fused"])
def test_several_active_adapters_cannot_be_saved_alone(tmp_path, value):
    model = with_adapter("layers")
    model.add_adapter("second", LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj"]))
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(UnsupportedError, match=r"(?s)only one adapter.*default.*second.*set_adapter"):
        amc.save_checkpoint(model, tmp_path / "out", adapter=value)
    assert nothing_is_written(tmp_path / "out")


@pytest.mark.parametrize("value", ["merged", "only", "fused"])
def test_merged_adapters_are_refused(tmp_path, value):
    model = with_adapter("layers")
    model.merge_adapter()
    with pytest.raises(UnsupportedError, match=r"(?s)merged into the weights.*q_proj"):
        amc.save_checkpoint(model, tmp_path / "out", adapter=value)
    assert nothing_is_written(tmp_path / "out")


@pytest.mark.parametrize("value", ["merged", "only", "fused"])
def test_variants_are_refused(tmp_path, value):
    with pytest.raises(UnsupportedError, match=r"use_dora"):
        amc.save_checkpoint(with_adapter("scales", use_dora=True), tmp_path / "out", adapter=value)
    assert nothing_is_written(tmp_path / "out")


@pytest.mark.parametrize("value", ["merged", "only", "fused"])
def test_directory_with_weights_is_refused(tmp_path, value):
    amc.save_checkpoint(base_model(), tmp_path / "out")
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    with pytest.raises(DestinationError):
        amc.save_checkpoint(with_adapter("layers"), tmp_path / "out", adapter=value)
    assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
