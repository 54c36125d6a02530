"""Tests of adapters of embeddings and heads, with which PEFT saves the weights of the base model too."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("transformers", reason="compares with models of transformers")
pytest.importorskip("peft", reason="compares with PEFT")

from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

import automodel_conv as amc
from tests.adapters.support import dyadic
from tests.comparing import assert_same, tensors_of
from tests.model_zoo import build_model, write_checkpoint

EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
# Settings of PEFT, and the names of the weights that its file has in addition to matrices.
SETTINGS = {
    "head": ({"target_modules": ["lm_head"]}, ["lm_head.base_layer.weight"]),
    "embedding": ({"target_modules": ["embed_tokens"]}, ["model.embed_tokens.base_layer.weight"]),
    "head and experts": (
        {"target_modules": ["lm_head", "q_proj"], "target_parameters": EXPERTS},
        ["lm_head.base_layer.weight"],
    ),
    "a head of its own": ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, ["lm_head.weight"]),
}


@pytest.fixture
def base(tmp_path):
    model = build_model("qwen3_moe")
    write_checkpoint(model, tmp_path / "base")
    return model, tmp_path / "base"


def trained(model, directory, settings):
    """Return a model of PEFT with random adapters and, if it saves embeddings, with other values in them."""
    adapted = get_peft_model(model, LoraConfig(r=2, **settings))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in adapted.named_parameters():
        if ".lora_" in name:
            parameter.data = dyadic(parameter.shape, generator).to(parameter.dtype)
        elif any(part in name for part in ("lm_head.base_layer", "embed_tokens.base_layer", "modules_to_save")):
            parameter.data = parameter.data + 1
    adapted.save_pretrained(directory)
    return adapted


@pytest.mark.parametrize("kind", SETTINGS)
def test_saved_embeddings_replace_those_of_the_base(base, tmp_path, kind):
    model, path = base
    settings, extra = SETTINGS[kind]
    adapted = trained(model, tmp_path / "adapter", settings)
    names = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert [name.removeprefix("base_model.model.") for name in names if ".lora_" not in name] == extra
    amc.merge_adapter(path, tmp_path / "adapter", tmp_path / "merged")
    loaded = amc.load_state_dict(tmp_path / "merged")
    merged = adapted.merge_and_unload().state_dict()
    assert_same({name: loaded[name] for name in merged}, merged)


@pytest.mark.parametrize("form", ["transformers", "vllm", "per_expert"])
@pytest.mark.parametrize("kind", SETTINGS)
def test_saved_embeddings_are_kept_by_a_conversion(base, tmp_path, kind, form):
    model, path = base
    settings, extra = SETTINGS[kind]
    adapted = trained(model, tmp_path / "adapter", settings)
    amc.convert_adapter(tmp_path / "adapter", tmp_path / "new", base=path, layout=form)
    before, after = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("adapter", "new"))
    for name in extra:
        assert torch.equal(after[f"base_model.model.{name}"], before[f"base_model.model.{name}"])
    config = json.loads((tmp_path / "new" / "adapter_config.json").read_text())
    assert config["modules_to_save"] == settings.get("modules_to_save")
    amc.merge_adapter(path, tmp_path / "new", tmp_path / "merged")
    loaded = amc.load_state_dict(tmp_path / "merged")
    merged = adapted.merge_and_unload().state_dict()
    assert_same({name: loaded[name] for name in merged}, merged)
    amc.convert_adapter(tmp_path / "new", tmp_path / "back", base=path, layout="transformers")
    assert_same(tensors_of(tmp_path / "back"), before)


def test_peft_loads_a_converted_adapter_of_a_head(base, tmp_path):
    model, path = base
    settings, _ = SETTINGS["head and experts"]
    adapted = trained(model, tmp_path / "adapter", settings)
    merged = adapted.merge_and_unload().state_dict()
    amc.convert_adapter(tmp_path / "adapter", tmp_path / "published", base=path, layout="per_expert")
    amc.convert_adapter(tmp_path / "published", tmp_path / "again", base=path, layout="transformers")
    loaded = PeftModel.from_pretrained(type(model).from_pretrained(path), tmp_path / "again").merge_and_unload()
    assert_same(loaded.state_dict(), merged)
