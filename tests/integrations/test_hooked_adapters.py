"""Tests of adapters that PEFT loads into models that were loaded under the hook."""

import copy
import io
import json

import pytest
import torch
from safetensors.torch import save_file

pytest.importorskip("peft")
pytest.importorskip("transformers")

from peft import PeftModel
from transformers import Qwen3MoeForCausalLM

import automodel_conv as amc
from automodel_conv.integrations.hooked_adapters import refuse_lost_adapters
from tests import model_zoo

ATTENTION = "model.layers.0.self_attn.q_proj"
DENSE = "model.layers.0.mlp.down_proj"  # PEFT takes it for that of an expert


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    directory = tmp_path_factory.mktemp("base")
    model_zoo.write_checkpoint(model_zoo.build_model("qwen3_moe"), directory)
    return directory


@pytest.fixture
def loaded(base):
    with amc.accelerate_transformers():
        return Qwen3MoeForCausalLM.from_pretrained(base, dtype=torch.bfloat16)


def write_adapter(directory, base, modules):
    checkpoint = amc.open_checkpoint(base)
    tensors = {}
    for module in modules:
        outputs, inputs = checkpoint.shapes[checkpoint.position[f"{module}.weight"]]
        tensors[f"base_model.model.{module}.lora_A.weight"] = torch.ones(2, inputs)
        tensors[f"base_model.model.{module}.lora_B.weight"] = torch.ones(outputs, 2)
    directory.mkdir()
    save_file(tensors, directory / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": [m.rpartition(".")[2] for m in modules]}
    (directory / "adapter_config.json").write_text(json.dumps(config | {"peft_version": "0.21.2"}))
    return directory


def test_adapter_that_peft_would_load_in_part_is_refused_with_the_names_of_the_rest(base, loaded, tmp_path):
    adapter = write_adapter(tmp_path / "adapter", base, [ATTENTION, DENSE])
    with pytest.raises(
        amc.NameProblems, match=r"2 tensors of the adapter would have no effect(.|\n)*convert_adapter"
    ) as caught:
        PeftModel.from_pretrained(loaded, str(adapter))
    assert {name.partition("base_model.model.")[2].split(".lora_")[0] for name in caught.value.unexpected} == {DENSE}


def test_adapter_that_has_a_place_is_loaded(base, loaded, tmp_path):
    adapter = write_adapter(tmp_path / "adapter", base, [ATTENTION])
    weight = loaded.get_submodule(ATTENTION).weight.detach().clone()
    merged = PeftModel.from_pretrained(loaded, str(adapter)).merge_and_unload()
    assert torch.equal(merged.get_submodule(ATTENTION).weight, weight + 4)


def test_converted_adapter_is_loaded_whole(base, loaded, tmp_path):
    adapter = write_adapter(tmp_path / "adapter", base, [ATTENTION, DENSE])
    amc.convert_adapter(adapter, tmp_path / "converted", base=base, layout="transformers")
    weight = loaded.get_submodule(DENSE).weight.detach().clone()
    merged = PeftModel.from_pretrained(loaded, str(tmp_path / "converted")).merge_and_unload()
    assert torch.equal(merged.get_submodule(DENSE).weight, weight + 4)


def test_model_without_the_hook_is_left_alone(base, tmp_path):
    adapter = write_adapter(tmp_path / "adapter", base, [ATTENTION, DENSE])
    model = Qwen3MoeForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    PeftModel.from_pretrained(model, str(adapter))
    assert not model._load_state_dict_post_hooks


def test_loaded_model_can_be_copied_and_pickled(loaded):
    refuse_lost_adapters(loaded)
    assert len(loaded._load_state_dict_post_hooks) == 1
    file = io.BytesIO()
    torch.save(loaded, file)
    file.seek(0)
    for copied in (copy.deepcopy(loaded), torch.load(file, weights_only=False)):
        copied.load_state_dict(loaded.state_dict())
