"""Tests of rules that callers give: rule objects, and the error for anything else."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import automodel_conv as amc
from automodel_conv.errors import UnsupportedError
from automodel_conv.upstream.given_rules import given_rules


class Rule:
    source_patterns = ("a",)


def test_rules_are_listed_and_none_stays_none():
    rule = Rule()
    assert given_rules(iter([rule])) == [rule]
    assert given_rules([]) == given_rules(()) == []
    assert given_rules(None) is None


def test_rules_of_transformers_are_rules():
    pytest.importorskip("transformers")
    rules = amc.get_checkpoint_conversion_mapping("qwen3_moe")
    assert given_rules(rules) == rules
    assert given_rules(amc.recipes.kimi_k3()) is not None


NAMES = {
    "kimi_k3": "pass rules=automodel_conv.recipes.kimi_k3()",
    "Kimi-K3": "pass rules=automodel_conv.recipes.kimi_k3()",
    "qwen3_moe": 'pass rules=automodel_conv.get_checkpoint_conversion_mapping("qwen3_moe")',
    "qwen3-mo": 'pass rules=automodel_conv.get_checkpoint_conversion_mapping("qwen3_moe")',
    "nobodys own type": None,
    "": None,
}


@pytest.mark.parametrize(("name", "advice"), NAMES.items())
def test_name_of_a_type_is_an_error_that_advises_its_rules(name, advice, tmp_path):
    pytest.importorskip("transformers")
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(UnsupportedError) as caught:
        amc.load_state_dict(tmp_path, rules=name)
    text = caught.value.args[0]
    assert text.startswith("rules= are not rules of transformers\n")
    assert f"found:    {name!r}" in text
    assert text.endswith(f"do:       {advice}") if advice else "do:" not in text


@pytest.mark.parametrize("rules", [[3], ["qwen3_moe"], 3, b"ab", [Rule(), "b"], [None]])
def test_other_things_are_an_error(rules):
    with pytest.raises(UnsupportedError, match="rules= are not rules of transformers"):
        given_rules(rules)


def test_renames_belong_to_another_argument(tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(UnsupportedError, match="pass key_mapping=, which takes a dict of patterns"):
        amc.compile_plan(tmp_path, rules={"a": "b"})


DOORS = {
    "load_state_dict": lambda path, out: amc.load_state_dict(path, rules="qwen3_moe"),
    "load_model": lambda path, out: amc.load_model(nn.Linear(2, 2), path, rules="qwen3_moe"),
    "compile_plan": lambda path, out: amc.compile_plan(path, rules="qwen3_moe"),
    "convert_checkpoint": lambda path, out: amc.convert_checkpoint(path, out, rules="qwen3_moe"),
    "verify_checkpoint": lambda path, out: amc.verify_checkpoint(path, path, rules="qwen3_moe"),
    "save_checkpoint": lambda path, out: amc.save_checkpoint({"a": torch.ones(1)}, out, rules="qwen3_moe"),
    "convert_state_dict": lambda path, out: amc.convert_state_dict({"a": torch.ones(1)}, rules="qwen3_moe"),
    "revert_state_dict": lambda path, out: amc.revert_state_dict({"a": torch.ones(1)}, rules="qwen3_moe"),
    "published_tensors": lambda path, out: dict(amc.published_tensors(nn.Linear(2, 2), rules="qwen3_moe")),
}


@pytest.mark.parametrize("door", DOORS)
def test_every_function_that_takes_rules_refuses_a_name(door, tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(UnsupportedError, match="rules= are not rules of transformers"):
        DOORS[door](tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
