"""Tests of a model's own rules among the rules that quantizers of transformers produce."""

import pytest

pytest.importorskip("transformers", reason="rules are objects of transformers")

from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter, WeightRenaming

from automodel_conv.upstream.quantizer_rules import dequantizes, own_rule
from automodel_conv.upstream.registry import model_rules
from automodel_conv.upstream.stored_dtypes import dequantizer
from tests.model_zoo import build_model

SETTINGS = {
    "fp8": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    "mxfp4": {"quant_method": "mxfp4"},
}


def described(rules):
    return [
        (
            type(rule).__name__,
            tuple(pattern.removesuffix("$") for pattern in rule.source_patterns),
            tuple(rule.target_patterns),
            tuple((type(op).__name__, str(vars(op))) for op in getattr(rule, "operations", ())),
        )
        for rule in rules
    ]


def experts():
    return WeightConverter(
        ["experts.*.w1.weight", "experts.*.w3.weight"],
        "experts.gate_up_proj",
        operations=[MergeModulelist(dim=0), Concatenate(dim=1)],
    )


@pytest.mark.parametrize("rule", [experts(), WeightRenaming("a", "b")], ids=["converter", "renaming"])
def test_rules_that_no_quantizer_has_changed_stay_the_same_object(rule):
    assert own_rule(rule) is rule


def test_converters_of_a_quantizer_become_those_of_the_model_again():
    model = build_model("mixtral")
    quantizer = dequantizer(SETTINGS["fp8"])
    own = model_rules(model)
    changed = model_rules(model, hf_quantizer=quantizer)
    converters = [rule for rule in changed if getattr(rule, "operations", None)]
    assert any(dequantizes(rule.operations[0]) for rule in converters)
    undone = [rule for rule in (own_rule(rule) for rule in changed) if rule is not None]
    assert not any(dequantizes(op) for rule in undone for op in getattr(rule, "operations", ()))
    assert [rule for rule in described(undone) if rule[0] == "WeightConverter"] == [
        rule for rule in described(own) if rule[0] == "WeightConverter"
    ]


@pytest.mark.parametrize("method", SETTINGS)
def test_rule_that_only_dequantizes_is_left_out(method):
    quantizer = dequantizer(SETTINGS[method])
    if quantizer is None:
        pytest.skip(f"this transformers has no {method}")
    only = [rule for rule in quantizer.get_weight_conversions() if rule.operations]
    assert only
    assert [own_rule(rule) for rule in only] == [None] * len(only)


def test_operation_is_known_by_its_module_as_well_as_its_name():
    class Fp8Dequantize:
        pass

    assert not dequantizes(Fp8Dequantize())
    Fp8Dequantize.__module__ = "transformers.integrations.finegrained_fp8"
    assert dequantizes(Fp8Dequantize())
    Fp8Dequantize.__name__ = "Fp8Quantize"
    assert not dequantizes(Fp8Dequantize())
