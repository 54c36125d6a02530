"""Tests of configs of quantized checkpoints: methods, schemes, and scales that belong to no weight."""

import pytest

from automodel_conv.errors import QuantizationError, UnsupportedError
from automodel_conv.planning.methods.table import METHODS
from automodel_conv.planning.schemes import implied_config, is_of_kv_cache, kv_cache_rows, read_config

NVFP4 = {"quant_method": "modelopt", "quant_algo": "NVFP4"}


@pytest.mark.parametrize("name", METHODS)
def test_method_is_that_of_the_config(name):
    algorithm = {"quant_algo": "FP8"} if name == "modelopt" else {}
    config = {"quant_method": name, "bits": 4, **algorithm}
    assert read_config(config)[0] is METHODS[name]


@pytest.mark.parametrize("name", ["hqq", None, 7, ["fp8"]])
def test_unknown_method_is_named_with_the_known_ones(name):
    with pytest.raises(UnsupportedError, match="config here") as caught:
        read_config({"quant_method": name}, "config here")
    assert repr(name) in str(caught.value)
    for method in METHODS.values():
        assert (method.name in str(caught.value)) == (not method.model_types)


@pytest.mark.parametrize("size", [16, 2, 3, 1])
def test_groups_of_four_bit_codes_have_any_size(size):
    assert read_config(NVFP4 | {"group_size": size})[1][0].block == (1, size)


def test_scheme_that_is_not_decoded_is_named_with_its_file():
    with pytest.raises(UnsupportedError, match=r"modelopt's W4A8(.|\n)*where: +a file"):
        read_config({"quant_method": "modelopt", "quant_algo": "W4A8"}, "a file")


@pytest.mark.parametrize("block", [3, [1], [0, 1], ["a", "b"], {"a": 1}], ids=str)
def test_malformed_config_is_an_error_of_the_checkpoint(block):
    with pytest.raises(QuantizationError, match=r"method fp8 is malformed(.|\n)*(Type|Value)Error"):
        read_config({"quant_method": "fp8", "weight_block_size": block})


@pytest.mark.parametrize(
    ("name", "is_one"),
    [
        ("layers.0.self_attn.k_scale", True),
        ("layers.0.self_attn.attn.v_scale", True),
        ("k_scale", True),
        ("layers.0.self_attn.q_zero_point", True),
        ("layers.0.self_attn.k_cache.scale", True),
        ("layers.0.self_attn.q.scale", True),
        ("layers.0.self_attn.k_proj.output_scale", True),
        ("layers.0.self_attn.kv_b_proj.output_scale", True),
        ("layers.0.self_attn.kv_a_proj_with_mqa.output_quantizer.scale", True),
        ("layers.0.self_attn.prob_output_scale", True),
        ("layers.0.self_attn.o_proj.output_scale", False),
        ("layers.0.output_scale", False),
        ("layers.0.self_attn.k_proj.k_bias", True),
        ("layers.0.self_attn.v_proj.v_bias", True),
        ("layers.0.self_attn.v_proj.k_bias", False),
        ("layers.0.self_attn.k_bias", False),  # a bias of attention
        ("layers.0.self_attn.k_proj.bias", False),
        ("layers.0.self_attn.k_proj.weight_scale", False),
        ("layers.0.norm.scale", False),
        ("layers.0.bulk_scale", False),
        ("layers.0.self_attn.k_scale.weight", False),
    ],
)
def test_scales_of_caches_are_recognized_by_their_names(name, is_one):
    assert is_of_kv_cache(name) is is_one
    assert kv_cache_rows(["a", name, "b.weight"]) == ([1] if is_one else [])


def test_a_model_type_may_imply_a_method():
    assert implied_config("inkling2_loop") == implied_config("inkling2_loop_text") == {"quant_method": "inkling2_loop"}
    assert implied_config("qwen3_moe") is None
    assert implied_config(None) is None
