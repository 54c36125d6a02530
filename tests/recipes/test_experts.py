"""Tests of the rules that group experts, and of the call that the names of a checkpoint suggest."""

from __future__ import annotations

import sys
import time

import pytest
import torch

pytest.importorskip("transformers", reason="recipes return transformers' rule objects")

import automodel_conv as amc
from automodel_conv.recipes.experts import call_for, grouped_experts
from automodel_conv.testing import assert_bytes_equal

MODULE = "layers.7.ffn.experts"


def per_expert(number, inner, hidden, names=("g", "u", "d")):
    shapes = dict(zip(names, ((inner, hidden), (inner, hidden), (hidden, inner)), strict=True))
    return {
        f"{MODULE}.{expert}.{name}.weight": torch.randn(shape)
        for expert in range(number)
        for name, shape in shapes.items()
    }


@pytest.mark.parametrize(("number", "inner", "hidden"), [(11, 2, 3), (1, 1, 1), (2, 4, 4), (3, 0, 2)])
def test_experts_are_grouped_in_the_order_of_their_numbers(number, inner, hidden):
    tensors = per_expert(number, inner, hidden)
    grouped = amc.convert_state_dict(tensors, rules=grouped_experts("ffn.experts", gate="g", up="u", down="d"))
    assert grouped.keys() == {f"{MODULE}.gate_up_proj", f"{MODULE}.down_proj"}
    for expert in range(number):
        first, down = grouped[f"{MODULE}.gate_up_proj"][expert], grouped[f"{MODULE}.down_proj"][expert]
        assert_bytes_equal(first[:inner], tensors[f"{MODULE}.{expert}.g.weight"])
        assert_bytes_equal(first[inner:], tensors[f"{MODULE}.{expert}.u.weight"])
        assert_bytes_equal(down, tensors[f"{MODULE}.{expert}.d.weight"])


def test_shared_experts_and_other_modules_keep_their_names():
    others = ["layers.7.ffn.shared_experts.g.weight", "layers.7.ffn.experts.g.weight", "layers.7.ffn.g.weight"]
    tensors = per_expert(2, 2, 3) | {name: torch.randn(2, 3) for name in others}
    grouped = amc.convert_state_dict(tensors, rules=grouped_experts("ffn.experts", gate="g", up="u", down="d"))
    for name in others:
        assert_bytes_equal(grouped[name], tensors[name])


def test_without_transformers_the_error_names_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers.core_model_loading", None)
    with pytest.raises(amc.UnsupportedError, match="recipes need transformers") as caught:
        grouped_experts("experts", gate="g", up="u", down="d")
    assert "pip install transformers" in str(caught.value)


SUGGESTED = {
    "model.layers.0.mlp.experts.3.{}_proj.weight": '("mlp.experts", gate="gate_proj", up="up_proj", down="down_proj")',
    "layers.0.moe.experts.3.{}_proj.weight_packed": '("moe.experts", gate="gate_proj", up="up_proj", down="down_proj")',
    "model.layers.0.mlp.shared_experts.{}_proj.weight": None,
    "model.layers.0.experts_of.3.{}_proj.weight": None,
    "experts.3.{}_proj.weight": None,
}


@pytest.mark.parametrize(("name", "arguments"), SUGGESTED.items())
def test_names_of_experts_suggest_the_call_that_groups_them(name, arguments):
    names = [name.format(matrix) for matrix in ("gate", "up", "down")]
    assert call_for(["a.weight", *names]) == (None if arguments is None else f"grouped_experts{arguments}")


def test_time_does_not_grow_with_the_square_of_a_name():
    start = time.process_time()
    assert call_for(["a" * 100_000, "b.experts." + "1" * 100_000]) is None
    assert time.process_time() - start < 5


def test_names_by_number_are_gate_up_and_down_as_in_mixtral():
    names = [f"x.0.moe.experts.1.w{number}.weight" for number in (1, 2, 3)]
    assert call_for(names) == 'grouped_experts("moe.experts", gate="w1", up="w3", down="w2")'


@pytest.mark.parametrize("matrices", [("w1", "w2"), ("w1", "w2", "w3", "w4"), ("a", "b", "c"), ()], ids=str)
def test_other_matrices_suggest_nothing(matrices):
    assert call_for(f"x.0.moe.experts.1.{matrix}.weight" for matrix in matrices) is None


def test_call_that_is_suggested_groups_the_experts():
    tensors = per_expert(2, 2, 3, names=("gate_proj", "up_proj", "down_proj"))
    call = call_for(tensors)
    assert call is not None
    grouped = amc.convert_state_dict(tensors, rules=eval(f"amc.recipes.{call}", {"amc": amc}))
    assert grouped.keys() == {f"{MODULE}.gate_up_proj", f"{MODULE}.down_proj"}
