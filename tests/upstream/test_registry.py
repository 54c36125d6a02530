"""Tests of the rules of a model as transformers looks them up, and of names that the model itself ignores."""

import pytest
import torch
from torch import nn

from automodel_conv.upstream import registry

pytest.importorskip("transformers", reason="rules are objects of transformers")

from transformers import conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming

from automodel_conv.upstream.registry import (
    has_rules_of_type,
    holds_pretrained,
    is_pretrained_model,
    key_renamings,
    model_rules,
    saving_order,
    saving_rules,
    transformers_available,
    without_ignored,
)
from tests.model_zoo import build_model


@pytest.fixture(scope="module")
def mixtral():
    return build_model("mixtral")


def patterns(rules):
    return [(tuple(rule.source_patterns), tuple(rule.target_patterns)) for rule in rules]


@pytest.mark.parametrize("spec", [None, ImportError, ValueError, "a module"], ids=str)
def test_transformers_without_rules_counts_as_absent(monkeypatch, spec, tmp_path):
    def find_spec(name):
        if isinstance(spec, type):
            raise spec
        module_spec = type("Spec", (), {"submodule_search_locations": [str(tmp_path)]})()
        return module_spec if spec else None

    monkeypatch.setattr(registry, "find_spec", find_spec)
    transformers_available.cache_clear()
    try:
        assert not transformers_available()
        assert not is_pretrained_model(nn.Linear(1, 1))
    finally:
        transformers_available.cache_clear()
    monkeypatch.undo()
    assert transformers_available()


def test_only_models_of_transformers_have_rules_of_their_own(mixtral):
    assert not holds_pretrained(nn.Linear(1, 1))
    assert model_rules(nn.Linear(1, 1)) == model_rules(None) == []
    assert is_pretrained_model(mixtral)
    assert not is_pretrained_model(nn.Sequential(mixtral))
    assert holds_pretrained(nn.Sequential(mixtral))
    registered = patterns(conversion_mapping.get_checkpoint_conversion_mapping("mixtral"))
    assert set(registered) <= set(patterns(model_rules(mixtral)))


def test_model_inside_of_another_module_keeps_its_rules(mixtral):
    inner, outer = model_rules(mixtral), model_rules(nn.ModuleDict({"policy": mixtral}))
    assert sum(isinstance(rule, WeightConverter) for rule in outer) == 2
    assert len(outer) == len(inner)


def test_reverse_leaves_out_legacy_names_and_prefixes(mixtral):
    given = [*model_rules(mixtral), *conversion_mapping.get_checkpoint_conversion_mapping("legacy")]
    legacy = set(patterns(conversion_mapping.get_checkpoint_conversion_mapping("legacy")))
    kept = saving_rules(None, given)
    assert legacy.isdisjoint(patterns(kept))
    assert [rule for rule in kept if isinstance(rule, WeightConverter)] == [
        rule for rule in given if isinstance(rule, WeightConverter)
    ]
    assert saving_rules(None, []) == []


def test_rules_used_by_a_load_are_kept(mixtral, monkeypatch):
    used = [WeightRenaming("a", "b")]
    monkeypatch.setattr(mixtral, "_weight_conversions", used, raising=False)
    assert saving_rules(mixtral, None) == used
    given = [WeightRenaming("c", "d")]
    assert saving_rules(mixtral, given) == given


def test_only_models_with_rules_are_saved_in_an_order_of_their_own(mixtral):
    assert saving_order(nn.Linear(1, 1)) is None
    key = saving_order(mixtral)
    if key is None:
        pytest.skip("this transformers keeps the order of the model")
    assert sorted(["a.10", "a.9"], key=key) == ["a.9", "a.10"]


@pytest.mark.parametrize("module", ["eh_proj", "self_attn"])
def test_layers_for_multi_token_prediction_are_ignored_by_their_own_tensors(module):
    model = build_model("deepseek_v3")
    layers = len(model.model.layers)
    names = [f"model.layers.{layers}.{module}.weight", f"model.layers.{layers + 1}.{module}.weight", "other"]
    ignored = names[:1] if module == "eh_proj" else []
    assert without_ignored(model, [], names)[1] == [name for name in names if name not in ignored]


@pytest.mark.parametrize("stated", ["num_nextn_predict_layers", "num_mtp_modules"])
def test_config_may_state_how_many_layers_for_multi_token_prediction_there_are(stated):
    model = build_model("mixtral")
    setattr(model.config, stated, 2)
    names = [f"model.layers.{len(model.model.layers) + number}.eh_proj.weight" for number in range(3)]
    assert without_ignored(model, [], names)[1] == names[2:]


def test_mapping_of_a_user_becomes_renamings_in_its_order():
    first, second = key_renamings({"^a": "b", "c": "d"})
    assert (first.rename_source_key("a.c")[0], second.rename_source_key("a.c")[0]) == ("b.c", "a.d")
    assert key_renamings(None) == key_renamings({}) == []
    assert len(model_rules(torch.nn.Linear(2, 2), {"a": "b"})) == 1
    assert model_rules(None) == []


def test_only_transformers_models_ignore_names():
    assert without_ignored(torch.nn.Linear(1, 1), ["a"], ["b"]) == (["a"], ["b"])


def test_type_has_rules_if_they_are_registered_for_it(mixtral):
    assert has_rules_of_type(mixtral)
    assert not has_rules_of_type(build_model("gpt_oss"))


@pytest.mark.parametrize("config", [None, {}, "mixtral"], ids=str)
def test_module_that_is_no_transformers_model_has_no_rules_of_a_type(config):
    model = nn.Linear(2, 2)
    assert not has_rules_of_type(model)
    model.config = config
    assert not has_rules_of_type(model)
