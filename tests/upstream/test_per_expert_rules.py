"""Tests of per-expert tensors of types that are published grouped: loaded as the model has them, at every door."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

pytest.importorskip("transformers", reason="rules are objects of transformers")

from transformers import core_model_loading

import automodel_conv as amc
from automodel_conv.testing import assert_bytes_equal
from automodel_conv.upstream.per_expert_rules import per_expert_rules
from automodel_conv.upstream.registry import model_rules
from tests.model_zoo import build_model
from tests.quantized.per_expert import MODELS, gemma4, gpt_oss, granite, write_per_expert

pytestmark = pytest.mark.skipif(
    not hasattr(core_model_loading, "Interleave"), reason="this transformers groups no experts of Granite"
)
FILE = "model.safetensors"


def assert_same(tensors, model):
    expected = model.state_dict()
    assert tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert_bytes_equal(tensors[name], tensor)


# Eleven experts are in another order as texts. Square matrices fit both orientations.
@pytest.mark.parametrize("sizes", [(3, 16, 8), (11, 16, 8), (2, 16, 16), (1, 16, 32)], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_per_expert_tensors_load_as_the_grouped_ones_that_they_were(tmp_path, name, sizes):
    model = MODELS[name](*sizes)
    write_per_expert(model, tmp_path)
    assert any(".experts.0.gate_proj.weight" in stored for stored in load_file(tmp_path / FILE))
    loaded = amc.load_state_dict(tmp_path)
    assert_same(loaded, model)
    assert loaded.report.fallbacks == ()
    filled = MODELS[name](*sizes)
    for parameter in filled.parameters():
        parameter.data.fill_(torch.nan)
    amc.load_model(filled, tmp_path)
    assert_same(filled.state_dict(), model)


@pytest.mark.parametrize("name", MODELS)
def test_a_conversion_groups_them_for_from_pretrained(tmp_path, name):
    model = MODELS[name]()
    write_per_expert(model, tmp_path / "source")
    for layout in (None, "nemo"):
        amc.convert_checkpoint(tmp_path / "source", tmp_path / str(layout), layout=layout)
    assert_same(type(model).from_pretrained(tmp_path / "None").state_dict(), model)
    assert_same(amc.load_state_dict(tmp_path / "nemo"), model)


def test_tensors_in_memory_are_grouped_too(tmp_path):
    model = granite()
    write_per_expert(model, tmp_path)
    assert_same(amc.convert_state_dict(load_file(tmp_path / FILE), model), model)


def test_another_prefix_needs_only_a_mapping_of_it(tmp_path):
    """Check the names of RedHatAI/gemma-4-26B-A4B-it-NVFP4, ``layers.0.moe.experts.0.gate_proj``."""
    model = gemma4()
    write_per_expert(model, tmp_path)
    renamed = {n.replace(".experts.", ".moe.experts."): t for n, t in load_file(tmp_path / FILE).items()}
    save_file(renamed, tmp_path / FILE, metadata={"format": "pt"})
    assert_same(amc.load_state_dict(tmp_path, key_mapping={r"\.moe\.experts\.": ".experts."}), model)
    with pytest.raises(amc.NameProblems, match=r"moe\.experts\.gate_up_proj"):
        amc.load_state_dict(tmp_path)


def test_an_expert_that_is_missing_is_named(tmp_path):
    write_per_expert(granite(), tmp_path)
    stored = load_file(tmp_path / FILE)
    absent = "model.layers.1.block_sparse_moe.experts.1.up_proj.weight"
    del stored[absent]
    save_file(stored, tmp_path / FILE, metadata={"format": "pt"})
    with pytest.raises(amc.NameProblems) as error:
        amc.load_state_dict(tmp_path)
    assert absent in str(error.value)


def test_models_with_rules_or_without_grouped_experts_get_no_further_rules():
    name = "model.layers.0.mlp.experts.0.gate_proj.weight"
    for own in ("qwen3_moe", "mixtral"):  # the names of mixtral's are other ones
        model = build_model(own)
        assert per_expert_rules(model, model_rules(model), [name]) == []
    assert per_expert_rules(granite(), [], ["model.layers.0.block_sparse_moe.input_linear.weight"]) == []
    assert per_expert_rules(nn.Linear(2, 2), [], [name]) == []
    assert per_expert_rules(None, [], [name]) == []
    assert len(per_expert_rules(granite(), [], [name])) == 2
    assert len(per_expert_rules(gpt_oss(), [], [name, name.replace("weight", "bias")])) == 4


def test_the_layout_per_expert_leaves_them_as_they_are(tmp_path):
    write_per_expert(granite(), tmp_path / "source")
    amc.convert_checkpoint(tmp_path / "source", tmp_path / "same", layout="per_expert")
    stored, same = load_file(tmp_path / "source" / FILE), load_file(tmp_path / "same" / FILE)
    assert stored.keys() == same.keys()
    for name, tensor in stored.items():
        assert_bytes_equal(same[name], tensor)


def test_a_release_that_cannot_interleave_adds_no_rules(monkeypatch):
    names = [f"model.layers.0.mlp.experts.{e}.{p}_proj.weight" for e in range(3) for p in ("gate", "up", "down")]
    model = gpt_oss(3, 16, 8)
    assert per_expert_rules(model, [], names)
    monkeypatch.delattr(core_model_loading, "Interleave")
    assert per_expert_rules(model, [], names) == []
