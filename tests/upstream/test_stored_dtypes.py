"""Tests of tensors that a quantizer of transformers leaves in their stored dtype."""

import pytest
from torch import nn

pytest.importorskip("transformers", reason="the quantizers are those of transformers")

from automodel_conv.upstream import stored_dtypes
from automodel_conv.upstream.stored_dtypes import dequantizer, left_as_stored
from tests.model_zoo import build_model

FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
NORM, BIAS = "model.norm.weight", "model.layers.0.self_attn.q_proj.bias"


@pytest.fixture(scope="module")
def mixtral():
    return build_model("mixtral")


def test_quantizer_decodes_while_it_loads():
    quantizer = dequantizer(FP8)
    assert quantizer.quantization_config.dequantize is True
    assert FP8.keys() == {"quant_method", "weight_block_size"}


@pytest.mark.parametrize(
    "settings", [{"quant_method": "no such method"}, {}, {"quant_method": "fp8", "weight_block_size": [0]}], ids=str
)
def test_settings_unknown_to_transformers_have_no_quantizer(settings):
    assert dequantizer(settings) is None


def test_without_transformers_there_is_no_quantizer(monkeypatch):
    monkeypatch.setattr(stored_dtypes, "transformers_available", lambda: False)
    assert dequantizer(FP8) is None


def test_without_a_quantizer_or_transformers_model_nothing_stays_as_stored(mixtral):
    assert left_as_stored(mixtral, None) is None
    assert left_as_stored(nn.Linear(2, 2), dequantizer(FP8)) is None
    assert left_as_stored(None, dequantizer(FP8)) is None


def test_decoded_sources_are_cast(mixtral):
    keeps = left_as_stored(mixtral, dequantizer(FP8), decoded={NORM})
    assert keeps(NORM, "F32", NORM) is False


def test_quantizer_that_fails_on_the_model_takes_no_part(mixtral, monkeypatch):
    quantizer = dequantizer(FP8)

    def fails(*arguments):
        raise KeyError("a scheme")

    monkeypatch.setattr(type(quantizer), "update_weight_conversions", fails)
    monkeypatch.setattr(type(quantizer), "get_weight_conversions", fails)
    assert left_as_stored(mixtral, quantizer) is None


def test_weights_that_the_quantizer_collects_keep_their_dtype_and_others_do_not(mixtral):
    quantizer = dequantizer(FP8)
    if not hasattr(quantizer, "get_new_dtype"):
        pytest.skip("this transformers casts by whether a tensor is renamed")
    keeps = left_as_stored(mixtral, quantizer)
    assert keeps(NORM, "BF16", NORM) is True
    assert keeps(BIAS, "BF16", BIAS) is False
