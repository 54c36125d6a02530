"""Tests of the names of modules in a form, and of the stacks that a form needs in addition."""

import pytest

from automodel_conv.lora.naming import named
from automodel_conv.lora.parts import Component, NewModule
from tests.lora.support import EXPERTS, HIDDEN, INNER, toy_base

GATE_UP, DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"


def module(weight, shape=(EXPERTS, HIDDEN, INNER)):
    component = Component(0, 0, (), slice(0, 2))
    return NewModule(weight, weight, weight, shape, ((component,),) * shape[0], ((),), (0,), 2, 0.5)


def names(modules, form, base=None):
    """Return name, name in the config and kind of each module."""
    return {m.weight: (m.name, m.stated, m.is_parameter) for m in named(modules, base or toy_base(), form)}


@pytest.mark.parametrize("form", ["transformers", "vllm"])
@pytest.mark.parametrize("order", [1, -1])
def test_first_parameter_of_a_module_is_wrapped_innermost(form, order):
    modules = [module(GATE_UP), module(DOWN)][::order]
    assert names(modules, form) == {
        GATE_UP: ("mlp.experts.base_layer", GATE_UP, True),
        DOWN: ("mlp.experts", DOWN, True),
    }


@pytest.mark.parametrize("weight", [GATE_UP, DOWN])
def test_single_parameter_has_the_name_of_its_module(weight):
    assert names([module(weight)], "transformers") == {weight: ("mlp.experts", weight, True)}


@pytest.mark.parametrize("form", ["per_expert", "transformers", "vllm"])
def test_weight_of_a_layer_has_the_name_of_the_layer(form):
    modules = [module("q_proj.weight", (1, 6, HIDDEN)), module("embed.weight", (1, 7, HIDDEN))]
    assert names(modules, form) == {
        "q_proj.weight": ("q_proj", "q_proj", False),
        "embed.weight": ("embed", "embed", False),
    }


def test_weight_of_a_module_that_is_no_layer_is_a_parameter_for_transformers():
    router = module("mlp.gate.weight", (1, EXPERTS, HIDDEN))
    assert names([router], "transformers") == {"mlp.gate.weight": ("mlp.gate", "mlp.gate.weight", True)}
    for form in ("per_expert", "vllm"):
        assert names([router], form) == {"mlp.gate.weight": ("mlp.gate", "mlp.gate", False)}


def test_experts_by_themselves_are_layers():
    assert names([module("mlp.experts.0.up_proj.weight", (1, INNER, HIDDEN))], "per_expert") == {
        "mlp.experts.0.up_proj.weight": ("mlp.experts.0.up_proj", "mlp.experts.0.up_proj", False)
    }


def test_published_names_of_experts_are_used_for_vllm_only():
    base = toy_base()
    base.paths_when_published = {"mlp.experts": "block.sparse.experts"}
    modules = [module(GATE_UP), module(DOWN)]
    assert names(modules, "vllm", base) == {
        GATE_UP: ("block.sparse.experts.base_layer", "block.sparse.experts.gate_up_proj", True),
        DOWN: ("block.sparse.experts", "block.sparse.experts.down_proj", True),
    }
    assert names(modules, "transformers", base)[DOWN] == ("mlp.experts", DOWN, True)


def test_name_that_peft_would_change_is_replaced_by_one_that_it_changes_to_it(monkeypatch):
    base = toy_base()
    renamings = {"mlp.experts": "other", "block.experts": "mlp.experts", "q_proj": "q", "wq": "q_proj"}
    monkeypatch.setattr(base, "renamed", lambda path: renamings.get(path, path))
    base.paths_when_published = {"mlp.experts": "block.experts"}
    base.layers_when_published = {"q_proj": "wq"}
    modules = [module(GATE_UP), module(DOWN), module("q_proj.weight", (1, 6, HIDDEN))]
    assert names(modules, "transformers", base) == {
        GATE_UP: ("block.experts.base_layer", GATE_UP, True),
        DOWN: ("block.experts", DOWN, True),
        "q_proj.weight": ("wq", "q_proj", False),
    }


@pytest.mark.parametrize("kind", ["linear", "transposed", "interleaved"])
@pytest.mark.parametrize(
    ("trained", "added", "sizes"), [(GATE_UP, DOWN, (HIDDEN, INNER)), (DOWN, GATE_UP, (2 * INNER, HIDDEN))]
)
def test_vllm_gets_zeros_for_the_stack_that_is_not_trained(kind, trained, added, sizes):
    found = {m.weight: m for m in named([module(trained)], toy_base(kind), "vllm")}
    assert found.keys() == {trained, added}
    assert found[added].shape == (EXPERTS, *sizes)
    assert (found[added].rank, found[added].scale) == (2, 0.5)
    assert found[added].components == ((),) * EXPERTS
    assert found[added].untrained() == []
    assert [m.weight for m in named([module(trained)], toy_base(kind), "transformers")] == [trained]
