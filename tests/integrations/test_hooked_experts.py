"""Tests of experts under names that transformers has no rule for: refused under the hook instead of random experts."""

from __future__ import annotations

import shutil

import pytest
import torch

pytest.importorskip("transformers", reason="hooks functions of transformers")

from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, MixtralForCausalLM, core_model_loading

import automodel_conv as amc
from automodel_conv.testing import assert_bytes_equal
from tests.model_zoo import build_model, write_checkpoint
from tests.quantized.per_expert import granite, write_per_expert
from tests.quantized.producers import PRODUCERS


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    directory = tmp_path_factory.mktemp("published")
    write_checkpoint(build_model("mixtral"), directory)
    return directory


def written(published, directory, layout, mark=None, **more):
    """Write a checkpoint in a layout under the name that transformers looks for, as another program might."""
    directory.mkdir()
    shutil.copy(published / "config.json", directory)
    tensors = {name: tensor.clone() for name, tensor in amc.load_state_dict(published, layout=layout).items()}
    save_file(tensors | more, directory / "model.safetensors", metadata={"format": "pt"} | (mark or {}))
    return directory


def same(tensors, expected):
    assert tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert_bytes_equal(tensors[name], tensor)


@pytest.mark.parametrize("mark", [None, "expert_layout"])
@pytest.mark.parametrize("layout", ["nemo", "vllm"])
def test_names_of_another_layout_are_refused_and_the_advice_helps(published, tmp_path, layout, mark):
    source = written(published, tmp_path / "made", layout, {mark: layout} if mark else None)
    with amc.accelerate_transformers() as done, pytest.raises(amc.UnsupportedError) as error:
        AutoModelForCausalLM.from_pretrained(source)
    assert done.loads == []
    text = str(error.value)
    assert f"layout '{layout}'" in text
    assert "load_model(" in text
    assert 'layout="per_expert"' in text
    expected = AutoModelForCausalLM.from_pretrained(published)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source), dtype=expected.dtype)
    amc.load_model(model, source, source_layout=layout)
    same(model.state_dict(), expected.state_dict())
    amc.convert_checkpoint(source, tmp_path / "back", source_layout=layout, layout="per_expert")
    with amc.accelerate_transformers():
        same(AutoModelForCausalLM.from_pretrained(tmp_path / "back").state_dict(), expected.state_dict())


def test_tensors_in_memory_are_refused_with_advice_of_their_own(published):
    tensors = dict(amc.load_state_dict(published, layout="nemo"))
    config = AutoConfig.from_pretrained(published)
    with amc.accelerate_transformers(), pytest.raises(amc.UnsupportedError, match="result of convert_state_dict"):
        MixtralForCausalLM.from_pretrained(None, config=config, state_dict=tensors)
    model = MixtralForCausalLM.from_pretrained(published)
    again = amc.convert_state_dict(tensors, model, source_layout="nemo")
    with amc.accelerate_transformers():
        loaded = MixtralForCausalLM.from_pretrained(None, config=config, state_dict=again)
    same(loaded.state_dict(), model.state_dict())


def test_names_of_another_layout_are_left_out_if_the_model_has_its_experts(published, tmp_path):
    extra = {"model.layers.9.mlp.experts.w2_weight": torch.ones(2, 4, 3)}
    source = written(published, tmp_path / "made", "transformers", **extra)
    with amc.accelerate_transformers() as done:
        model = AutoModelForCausalLM.from_pretrained(source)
    assert done.loads[0].left_out == tuple(extra)
    same(model.state_dict(), AutoModelForCausalLM.from_pretrained(published).state_dict())


@pytest.mark.skipif(
    not hasattr(core_model_loading, "Interleave"), reason="this transformers groups no experts of Granite"
)
@pytest.mark.parametrize("producer", [None, "fp8 per channel"])
def test_per_expert_tensors_of_a_type_published_grouped_are_refused_and_the_advice_helps(tmp_path, producer):
    model = granite()
    source = tmp_path / "source"
    write_per_expert(model, source, producer and PRODUCERS[producer])
    with amc.accelerate_transformers() as done, pytest.raises(amc.UnsupportedError) as error:
        AutoModelForCausalLM.from_pretrained(source)
    assert done.loads == []
    text = str(error.value)
    assert "no rule that groups" in text
    assert "model.layers.0.block_sparse_moe.experts.0.gate_proj.weight" in text.replace("down", "gate")
    expected = amc.load_state_dict(source)
    filled = granite()
    amc.load_model(filled, source)
    same(filled.state_dict(), expected)
    amc.convert_checkpoint(source, tmp_path / "grouped", dequantize=producer is not None)
    with amc.accelerate_transformers():
        same(AutoModelForCausalLM.from_pretrained(tmp_path / "grouped").state_dict(), expected)


def test_per_expert_tensors_of_layers_that_the_model_lacks_are_left_out(published, tmp_path):
    extra = {"model.layers.9.mlp.experts.0.gate_proj.weight": torch.ones(4, 3)}
    source = written(published, tmp_path / "made", "transformers", **extra)
    with amc.accelerate_transformers() as done:
        AutoModelForCausalLM.from_pretrained(source)
    assert done.loads[0].left_out == tuple(extra)
