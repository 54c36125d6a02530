"""Tests of transformers' quantizers: the settings read from them, and which loads need them."""

from types import SimpleNamespace

import pytest

from automodel_conv.integrations.quantizers import (
    plain_load,
    quantization_method,
    quantizes,
    rounds_the_same,
)
from automodel_conv.planning.copies import Decode

RULES = ["a rule", "another"]


def quantizer(settings=None, pre_quantized=True, dequantize=True, **config):
    made = SimpleNamespace(dequantize=dequantize, to_dict=lambda: dict(settings or {}), **config)
    return SimpleNamespace(pre_quantized=pre_quantized, quantization_config=made)


def test_a_load_without_a_quantizer_keeps_its_rules():
    load = plain_load(None, RULES)
    assert load.rules is RULES
    assert (load.config, load.why_not) == (None, None)


def test_a_quantizer_that_dequantizes_leaves_the_settings_of_its_config():
    load = plain_load(quantizer({"quant_method": "fp8", "weight_block_size": [128, 128]}), RULES)
    assert load.rules == RULES
    assert load.config == {"quant_method": "fp8", "weight_block_size": [128, 128]}
    assert load.why_not is None


def test_settings_may_be_nested_and_their_method_an_attribute_or_a_member_of_an_enum():
    nested = plain_load(quantizer({"quantization_config": {"format": "x"}}, quant_method="compressed-tensors"), RULES)
    assert nested.config == {"format": "x", "quant_method": "compressed-tensors"}
    member = SimpleNamespace(value="mxfp4")
    assert plain_load(quantizer({"quant_method": member}), RULES).config == {"quant_method": "mxfp4"}


@pytest.mark.parametrize("change", [{"pre_quantized": False}, {"dequantize": False}], ids=str)
def test_a_quantizer_that_does_more_is_the_reason_for_what_is_left(change):
    load = plain_load(quantizer({"quant_method": "fp8"}, **change), RULES)
    assert load.config is None
    assert "more than dequantize" in load.why_not


@pytest.mark.parametrize(
    ("code_format", "global_scale", "natural", "wanted", "same"),
    [
        ("e4m3", None, "F32", "BF16", True),
        ("e4m3", None, "F32", "F64", False),
        ("e2m1", 3, "BF16", "BF16", False),
        ("int4", None, "BF16", "BF16", True),
        ("int4", None, "F16", "BF16", False),
        ("int8", None, "BF16", "BF16", True),
        ("int8", None, "F32", "BF16", False),
    ],
)
def test_values_are_rounded_the_same_unless_transformers_computes_in_another_dtype(
    code_format, global_scale, natural, wanted, same
):
    decode = Decode(code_format, (4, 4), (4, 4), 1, global_scale=global_scale)
    assert rounds_the_same(decode, natural, wanted) == same


def model(config=None, text=None):
    of_text = SimpleNamespace(quantization_config=text)
    return SimpleNamespace(config=SimpleNamespace(quantization_config=config, get_text_config=lambda decoder: of_text))


def test_the_method_is_that_of_the_quantizer_or_else_of_the_config():
    assert quantization_method(model({"quant_method": "modelopt"}), None) == "modelopt"
    assert quantization_method(model(None, {"quant_method": "awq"}), None) == "awq"
    assert quantization_method(model(), None) is None
    assert quantization_method(model({}), quantizer(quant_method=SimpleNamespace(value="fp8"))) == "fp8"


def test_a_quantizer_of_plain_values_declares_no_method():
    assert quantization_method(model({"quant_method": "fp8"}), quantizer(pre_quantized=False)) is None


def test_parameters_are_quantized_only_by_a_quantizer_of_plain_values():
    asked = SimpleNamespace(pre_quantized=False, param_needs_quantization=lambda model, name: name == "a")
    assert quantizes(asked, None, "a")
    assert not quantizes(asked, None, "b")
    assert not quantizes(None, None, "a")
    asked.pre_quantized = True
    assert not quantizes(asked, None, "a")
