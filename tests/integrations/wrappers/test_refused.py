"""Tests of wrapped models that every public function refuses, with what to call first: FSDP1 and adapters."""

from __future__ import annotations

import copy
from unittest import mock

import pytest
import torch
from torch import nn

pytest.importorskip("transformers", reason="needs models of transformers")
from torch.distributed.fsdp import FullyShardedDataParallel

import automodel_conv as amc
from automodel_conv.errors import UnsupportedError
from automodel_conv.integrations.dcp import HuggingFaceReader, HuggingFaceWriter
from automodel_conv.testing import assert_bytes_equal
from tests.comparing import contents
from tests.integrations.wrappers.support import PARTS, in_place_of
from tests.model_zoo import save_upstream

pytestmark = pytest.mark.filterwarnings("ignore")


def refusals(model, published, tmp_path):
    """Return the error of each public function for a model that it refuses."""
    state = published.model.state_dict()
    doors = {
        "save_checkpoint": lambda: amc.save_checkpoint(model, tmp_path / "made"),
        "revert_state_dict": lambda: amc.revert_state_dict(state, model),
        "convert_state_dict": lambda: amc.convert_state_dict(published.tensors, model),
        "load_model": lambda: amc.load_model(model, published.path),
        "load_state_dict": lambda: amc.load_state_dict(published.path, model),
        "compile_plan": lambda: amc.compile_plan(published.path, model),
        "HuggingFaceReader": lambda: HuggingFaceReader(published.path, model),
        "HuggingFaceWriter": lambda: HuggingFaceWriter(tmp_path / "made", model),
    }
    before = {name: tensor.clone() for name, tensor in model.named_parameters()}
    texts = {}
    for name, door in doors.items():
        with pytest.raises(UnsupportedError) as caught:
            door()
        texts[name] = str(caught.value)
    assert not (tmp_path / "made").exists()
    for name, tensor in model.named_parameters():
        assert_bytes_equal(tensor, before[name])
    return set(texts.values())


def test_fsdp1_is_refused_everywhere_with_advice(mixtral, tmp_path):
    model = FullyShardedDataParallel(copy.deepcopy(mixtral.model), device_id=torch.device("cpu"))
    [text] = refusals(model, mixtral, tmp_path)
    assert "fully_shard (FSDP2)" in text
    assert "get_model_state_dict" in text


class AdaptedLinear(nn.Module):
    """A layer wrapped as PEFT does."""

    def __init__(self, layer):
        super().__init__()
        self.base_layer = layer
        self.lora_A = nn.Linear(layer.in_features, 2, bias=False)


def lora(**where):
    peft = pytest.importorskip("peft")
    return peft.LoraConfig(r=2, **where)


EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def peft_model(model, **where):
    return pytest.importorskip("peft").get_peft_model(model, lora(**where))


def prompted(model):
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(model, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))


def with_own_adapter(model):
    adapter = lora(target_modules=["q_proj"])
    # transformers 5.24.0 requires a PEFT that is newer than any on PyPI.
    with mock.patch("transformers.integrations.peft.check_peft_version"):
        model.add_adapter(adapter)
    return model


ADAPTED = {
    "stand-in": in_place_of("model.layers.0.self_attn.q_proj", AdaptedLinear),
    "attention": lambda m: peft_model(m, target_modules=["q_proj"]),
    "its inner model": lambda m: peft_model(m, target_modules=["q_proj"]).base_model.model,
    "experts": lambda m: peft_model(m, target_modules=[], target_parameters=EXPERTS),
    "inner model of experts": lambda m: peft_model(m, target_modules=[], target_parameters=EXPERTS).base_model.model,
    "compiled": lambda m: torch.compile(peft_model(m, target_modules=["q_proj"])),
    "adapter of a compiled layer": lambda m: peft_model(PARTS["a compiled layer"](m), target_modules=["v_proj"]),
    "modules to save": lambda m: peft_model(m, target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "prompts": prompted,
    "add_adapter": with_own_adapter,
}


@pytest.mark.parametrize("kind", ADAPTED)
def test_adapters_are_refused_everywhere_with_advice(mixtral, kind, tmp_path):
    [text] = refusals(ADAPTED[kind](copy.deepcopy(mixtral.model)), mixtral, tmp_path)
    assert "the model has PEFT adapters" in text
    for call in ('save_checkpoint(..., adapter="merged")', "merge_and_unload()", "load the base model before"):
        assert call in text


@pytest.mark.parametrize("kind", ["stand-in", "attention", "inner model of experts"])
def test_names_of_adapted_layers_are_refused_without_the_model_too(mixtral, kind, tmp_path):
    state = ADAPTED[kind](copy.deepcopy(mixtral.model)).state_dict()
    rules = amc.get_model_conversion_mapping(mixtral.model)
    for call in (amc.revert_state_dict, amc.convert_state_dict):
        with pytest.raises(UnsupportedError, match=r"(?s)PEFT adapters.*base_layer.*merge_and_unload"):
            call(state, rules=rules)
    with pytest.raises(UnsupportedError, match="PEFT adapters"):
        amc.save_checkpoint(state, tmp_path / "made", rules=rules)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    "where", [{"target_modules": ["q_proj"]}, {"target_modules": [], "target_parameters": EXPERTS}]
)
def test_merged_adapter_is_saved_as_by_transformers(mixtral, tmp_path, where):
    adapted = peft_model(copy.deepcopy(mixtral.model), init_lora_weights=False, **where)
    merged = adapted.merge_and_unload()
    amc.save_checkpoint(merged, tmp_path / "ours")
    save_upstream(merged, tmp_path / "upstream", "5GB")
    assert contents(tmp_path / "ours") == contents(tmp_path / "upstream")
    assert contents(tmp_path / "ours") != contents(mixtral.path)
