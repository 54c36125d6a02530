"""Tests of the data of each quantization method: consistent with itself, and with the decoder."""

import pytest

from automodel_conv.kernels.code_tables import CODE_VALUES, bits_of
from automodel_conv.planning.copies import CODE_BITS, ZeroPacking
from automodel_conv.planning.methods.method import (
    CHANNEL,
    EXPONENT_SCALES,
    FLOAT_SCALES,
    FP8_SCALES,
    TENSOR,
    Packing,
    Scheme,
    UnsupportedScheme,
    block_of,
    modules_of,
    part_name,
    weight_name,
)
from automodel_conv.planning.methods.table import METHODS, method_of


def test_formats_have_the_bits_of_their_tables():
    assert CODE_BITS == {code_format: bits_of(code_format) for code_format in CODE_VALUES}


@pytest.mark.parametrize("name", METHODS)
def test_tensor_is_packed_in_one_way(name):
    method = METHODS[name]
    assert method.name == name
    forms = [(packing.suffix, packing.dtype) for packing in method.codes]
    assert len(set(forms)) == len(forms)
    assert all(packing.codes_per_element for packing in method.codes)


@pytest.mark.parametrize(
    ("packing", "stored", "unpacked"),
    [
        (Packing("", "F8_E4M3", "e4m3"), (3, 5), (3, 5)),
        (Packing("", "F4", "e2m1"), (3, 5), (3, 10)),
        (Packing("", "I32", "int4"), (2, 3, 5), (2, 3, 40)),
        (Packing("", "I16", "e4m3"), (3, 5), (3, 10)),
        (Packing("", "U8", "e2m1", group=16), (2, 3, 5, 16), (2, 3, 160)),
        (Packing("", "U8", "e2m1", group=16), (5, 16), None),
        (Packing("", "U8", "e2m1", group=16), (2, 3, 5, 12), None),
        (Packing("", "U8", "e2m1"), (5,), None),
    ],
    ids=str,
)
def test_shapes_of_codes(packing, stored, unpacked):
    assert packing.unpacked(stored) == unpacked


@pytest.mark.parametrize(
    ("weight", "suffix", "part"),
    [
        ("a.weight", "_scale", "a.weight_scale"),
        ("a.weight", ".scale", "a.scale"),
        ("a.bias", "", "a.bias"),
        ("a.down_proj", "_weight_scale", "a.down_proj_weight_scale"),
    ],
)
def test_part_is_named_after_its_weight(weight, suffix, part):
    assert part_name(weight, suffix) == part
    assert weight_name(part, suffix) == weight
    assert part_name("a.bias", ".scale") is None
    assert part_name("a.weight", "_weight_scale") is None


def compressed(stored, **weights):
    return {"format": stored, "config_groups": {"0": {"weights": weights}}}


GPTQ_V1 = ZeroPacking(by_columns=True, added=0x11111111)
INT4 = {"num_bits": 4, "type": "int"}
FLOAT8 = {"num_bits": 8, "type": "float"}


@pytest.mark.parametrize(
    ("method", "config", "scheme"),
    [
        ("fp8", {"weight_block_size": [64, 32]}, Scheme("e4m3", (64, 32), FLOAT_SCALES | EXPONENT_SCALES)),
        ("fp8", {}, Scheme("e4m3", (128, 128), FLOAT_SCALES | EXPONENT_SCALES)),
        ("fp8", {"weight_block_size": None}, Scheme("e4m3", TENSOR, FLOAT_SCALES | EXPONENT_SCALES)),
        ("fbgemm_fp8", {}, Scheme("e4m3", CHANNEL, FLOAT_SCALES)),
        ("mxfp4", {}, Scheme("e2m1", (1, 32), EXPONENT_SCALES)),
        ("modelopt", {"quant_algo": "fp8"}, Scheme("e4m3", TENSOR, FLOAT_SCALES)),
        ("modelopt", {"quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"}, Scheme("e4m3", CHANNEL, FLOAT_SCALES)),
        ("modelopt", {"quant_algo": "fp8_pb_wo"}, Scheme("e4m3", (128, 128), FLOAT_SCALES)),
        ("modelopt", {"quant_algo": "FP8_BLOCK_SCALES", "group_size": 64}, Scheme("e4m3", (64, 64), FLOAT_SCALES)),
        ("modelopt", {"quant_algo": "MXFP8"}, Scheme("e4m3", (1, 32), EXPONENT_SCALES)),
        ("modelopt", {"quant_algo": "NVFP4"}, Scheme("e2m1", (1, 16), FP8_SCALES, global_scale=True)),
        ("modelopt", {"quant_algo": "NVFP4", "group_size": 0}, Scheme("e2m1", (1, 16), FP8_SCALES, global_scale=True)),
        ("modelopt", {"quant_algo": "W4A16_NVFP4"}, Scheme("e2m1", (1, 16), FP8_SCALES, global_scale=True)),
        ("modelopt", {"quant_algo": "W4A8_NVFP4_FP8"}, Scheme("e2m1", (1, 16), FP8_SCALES, global_scale=True)),
        ("modelopt", {"quant_algo": "W4A8_MXFP4_FP8"}, Scheme("e2m1", (1, 32), EXPONENT_SCALES)),
        ("modelopt", {"quant_algo": "W8A16"}, Scheme("int8", CHANNEL, FLOAT_SCALES)),
        ("modelopt", {"quantization": {"quant_algo": "MXFP8"}}, Scheme("e4m3", (1, 32), EXPONENT_SCALES)),
        (
            "compressed-tensors",
            compressed("pack-quantized", **INT4, strategy="group", group_size=32, symmetric=False),
            Scheme("int4", (1, 32), FLOAT_SCALES, zero_points=True),
        ),
        (
            "compressed-tensors",
            compressed("int-quantized", num_bits=8, type="int", strategy="channel"),
            Scheme("int8", CHANNEL, FLOAT_SCALES),
        ),
        (
            "compressed-tensors",
            compressed("float-quantized", **FLOAT8, strategy="channel"),
            Scheme("e4m3", CHANNEL, FLOAT_SCALES),
        ),
        (
            "compressed-tensors",
            compressed("nvfp4-pack-quantized", num_bits=4, type="float", strategy="tensor_group", group_size=16),
            Scheme("e2m1", (1, 16), FP8_SCALES, global_scale=True),
        ),
        ("gptq", {"bits": 4, "group_size": 128}, Scheme("int4", (16, 8), FLOAT_SCALES, True, zero_packing=GPTQ_V1)),
        ("gptq", {"bits": 4, "group_size": -1}, Scheme("int4", (None, 8), FLOAT_SCALES, True, zero_packing=GPTQ_V1)),
        (
            "gptq",
            {"bits": 4, "group_size": 8, "checkpoint_format": "gptq_v2"},
            Scheme("int4", (1, 8), FLOAT_SCALES, True, zero_packing=ZeroPacking(by_columns=True)),
        ),
        (
            "awq",
            {"w_bit": 4, "q_group_size": 64, "version": "GEMM"},
            Scheme("int4", (64, 1), FLOAT_SCALES, True, zero_packing=ZeroPacking(by_columns=True)),
        ),
        (
            "awq",
            {"bits": 4, "group_size": -1, "zero_point": False},
            Scheme("int4", (None, 1), FLOAT_SCALES, zero_packing=ZeroPacking(by_columns=True)),
        ),
    ],
    ids=lambda value: value.format if isinstance(value, Scheme) else str(value),  # sets have no order
)
def test_config_states_its_scheme(method, config, scheme):
    assert METHODS[method].schemes(config)[0] == scheme


def test_schemes_of_mixed_precision_are_stated_for_their_modules():
    layers = {
        "a": {"quant_algo": "mxfp8"},
        "b": {"quant_algo": "NVFP4", "group_size": 16},
        "c.*": {"quant_algo": "MXFP8"},
    }
    first, *nvfp4 = METHODS["modelopt"].schemes({"quant_algo": "MIXED_PRECISION", "quantized_layers": layers})
    assert first == Scheme("e4m3", (1, 32), EXPONENT_SCALES, modules=modules_of(["a", "c.*"]))
    assert nvfp4[0] == Scheme("e2m1", (1, 16), FP8_SCALES, global_scale=True, modules=modules_of(["b"]))
    assert all(scheme.modules == modules_of(["b"]) for scheme in nvfp4)
    of_experts = {"quant_method": "fp8", "quant_algo": "MIXED_PRECISION", "moe_quant_algo": "NVFP4"}
    every_expert = modules_of(["*.experts", "*.experts.*"])
    dense = METHODS["fp8"].schemes(of_experts)
    experts = [scheme._replace(modules=every_expert) for scheme in nvfp4]
    assert method_of(of_experts).schemes(of_experts) == [*dense, *experts]


@pytest.mark.parametrize("alias", ["modelopt_fp4", "modelopt_mxfp8", "modelopt_mixed"])
def test_method_has_the_names_of_vllm(alias):
    assert method_of({"quant_method": alias}) is METHODS["modelopt"]


@pytest.mark.parametrize("name", ["modelopt_int8", "FP8", None, 3, ["fp8"]])
def test_other_names_are_of_no_method(name):
    assert method_of({"quant_method": name}) is None


def test_config_for_only_the_kv_cache_states_no_scheme():
    assert METHODS["modelopt"].schemes({"kv_cache_quant_algo": "NVFP4"}) == []
    assert METHODS["modelopt"].schemes({"kv_cache_scheme": "FP8"}) == []
    assert METHODS["modelopt"].schemes({"quantization": {"quant_algo": None, "kv_cache_quant_algo": "FP8"}}) == []
    assert METHODS["compressed-tensors"].schemes({"config_groups": {"0": {"weights": None}}}) == []


@pytest.mark.parametrize(
    ("method", "config", "named"),
    [
        ("modelopt", {"quant_algo": "W4A8"}, "W4A8"),
        ("modelopt", {"quant_algo": "nvfp4_awq"}, "modelopt's NVFP4_AWQ, which multiplies inputs by a pre_quant_scale"),
        ("modelopt", {"quant_algo": None}, "modelopt's NONE"),
        ("compressed-tensors", compressed("pack-quantized", num_bits=3, type="int"), "3-bit int"),
        ("compressed-tensors", compressed("pack-quantized", **INT4, actorder="group"), "activation order"),
        ("compressed-tensors", compressed("float-quantized", **FLOAT8, symmetric=False), "zero points of e4m3"),
        ("compressed-tensors", compressed("float-quantized", **FLOAT8, strategy="token"), "strategy 'token'"),
        ("compressed-tensors", {"sparsity_config": {"format": "sparse-24"}}, "sparse-24"),
        ("compressed-tensors", {"transform_config": {"config_groups": {"R1": {}}}}, "transforms"),
        ("gptq", {"bits": 8}, "gptq with 8-bit codes"),
        ("gptq", {"bits": 3}, "gptq with 3-bit codes"),
        ("gptq", {"bits": 4, "group_size": 12}, "groups of 12"),
        ("gptq", {"bits": 4, "group_size": 32, "desc_act": True}, "desc_act"),
        ("gptq", {"bits": 4, "checkpoint_format": "marlin"}, "format marlin"),
        ("gptq", {"bits": 4, "is_marlin_format": True}, "format marlin"),
        ("gptq", {"bits": 4, "pack_dtype": "int64"}, "int64"),
        ("gptq", {"bits": 4, "dynamic": {"+:.*down.*": {"bits": 8}}}, "gptq with 8-bit codes"),
        ("gptq", {"bits": 4, "group_size": -1, "desc_act": True, "dynamic": {"a": {"group_size": 32}}}, "desc_act"),
        ("awq", {"bits": 8}, "awq with 8-bit codes"),
        ("awq", {"bits": 4, "version": "gemv"}, "format gemv of awq"),
        ("awq", {"bits": 4, "version": "exllama"}, "format exllama of awq"),
        ("awq", {"bits": 4, "checkpoint_format": "marlin"}, "format marlin of awq"),
        ("awq", {"bits": 4, "backend": "llm-awq"}, "format llm-awq of awq"),
    ],
    ids=str,
)
def test_scheme_that_is_not_decoded_is_named(method, config, named):
    with pytest.raises(UnsupportedScheme, match=named):
        METHODS[method].schemes(config)


@pytest.mark.parametrize(
    "config",
    [{"group_size": -1, "desc_act": True}, {"desc_act": True, "static_groups": True}, {"dynamic": {"-:lm_head": {}}}],
    ids=str,
)
def test_groups_of_gptq_that_are_in_order_are_decoded(config):
    [scheme] = METHODS["gptq"].schemes({"bits": 4, "group_size": 128} | config)
    assert scheme.format == "int4"


def test_modules_of_gptq_may_have_other_groups():
    config = {"bits": 4, "group_size": 128, "dynamic": {"+:.*down.*": {"group_size": 32}, "-:.*gate$": {}}}
    assert [scheme.block for scheme in METHODS["gptq"].schemes(config)] == [(16, 8), (4, 8)]


@pytest.mark.parametrize("sizes", [(1,), (1, 2, 3), (0, 32), (1, -1), (1, 1 << 31), (1.0, 32), ("1", 32), (True, 32)])
def test_block_has_two_positive_sizes(sizes):
    with pytest.raises((ValueError, TypeError)):
        block_of(sizes)
    assert block_of([1, 32]) == (1, 32)


@pytest.mark.parametrize(
    ("weight", "whole"),
    [
        ("model.ngram_embedding.shard_12.weight", "model.ngram_embedding.weight"),
        ("ngram_embedding.weight", "ngram_embedding.weight"),
        ("model.ngram_embedding.shard_1.bias", None),
        ("model.embedding.shard_1.weight", None),
    ],
)
def test_shards_of_an_ngram_embedding_are_parts_of_one_weight(weight, whole):
    assert METHODS["fp8"].whole_name(weight) == whole
    assert METHODS["mxfp4"].whole_name(weight) is None


def quark(weight, **layers):
    """Return a config of AMD Quark, and of layers by name with two underscores for a glob's dot."""
    named = {name.replace("__", "*."): {"weight": other} for name, other in layers.items()}
    return {"global_quant_config": {"weight": weight}, "layer_quant_config": named}


PER_TENSOR = {"dtype": "fp8_e4m3", "qscheme": "per_tensor"}
PER_GROUP = {"dtype": "fp4", "qscheme": "per_group", "group_size": 32, "ch_axis": -1}


@pytest.mark.parametrize(
    ("weight", "scheme"),
    [
        (PER_TENSOR, Scheme("e4m3", TENSOR, FLOAT_SCALES)),
        (PER_TENSOR | {"dtype": "fp8_e5m2"}, Scheme("e5m2", TENSOR, FLOAT_SCALES)),
        (PER_TENSOR | {"dtype": "int8", "symmetric": True}, Scheme("int8", TENSOR, FLOAT_SCALES)),
        ([PER_TENSOR], Scheme("e4m3", TENSOR, FLOAT_SCALES)),
        (PER_TENSOR | {"qscheme": "per_channel", "ch_axis": 0}, Scheme("e4m3", CHANNEL, FLOAT_SCALES)),
        (PER_TENSOR | {"qscheme": "per_block", "block_size": [128, 64]}, Scheme("e4m3", (128, 64), FLOAT_SCALES)),
        (
            PER_TENSOR | {"qscheme": "per_block", "block_size": [32, 32], "scale_type": "float8_e8m0fnu"},
            Scheme("e4m3", (32, 32), EXPONENT_SCALES),
        ),
        (PER_GROUP | {"scale_format": "e8m0"}, Scheme("e2m1", (1, 32), EXPONENT_SCALES)),
        (PER_GROUP | {"scale_format": "e8m0", "dtype": "fp8_e4m3"}, Scheme("e4m3", (1, 32), EXPONENT_SCALES)),
        (PER_GROUP | {"scale_format": "float32", "ch_axis": 1}, Scheme("e2m1", (1, 32), FLOAT_SCALES)),
        (
            [PER_GROUP | {"group_size": 16}, PER_TENSOR | {"is_scale_quant": True}],
            Scheme("e2m1", (1, 16), FP8_SCALES, global_scale=True),
        ),
    ],
    ids=lambda value: "" if isinstance(value, Scheme) else str(value),
)
def test_quark_describes_weights_by_their_dtype_and_scales(weight, scheme):
    assert METHODS["quark"].schemes(quark(weight)) == [scheme]
    assert METHODS["quark"].schemes(quark(None, a__b=weight)) == [scheme._replace(modules=modules_of(["a*.b"]))]


def test_quark_describes_layers_by_name():
    mxfp4 = PER_GROUP | {"scale_format": "e8m0"}
    dynamic, values = PER_TENSOR | {"is_dynamic": True}, {"dtype": "bfloat16", "qscheme": None}
    schemes = METHODS["quark"].schemes(quark(mxfp4, a=PER_TENSOR, b=mxfp4, c=None, d=dynamic, e=PER_TENSOR, f=values))
    fp4, fp8 = Scheme("e2m1", (1, 32), EXPONENT_SCALES), Scheme("e4m3", TENSOR, FLOAT_SCALES)
    assert schemes == [fp4, fp8._replace(modules=modules_of("ae")), fp4._replace(modules=modules_of("b"))]
    assert METHODS["quark"].schemes(quark(None)) == []
    assert METHODS["quark"].schemes({"layer_type_quant_config": {"Linear": {"weight": PER_TENSOR}}}) == [fp8]


@pytest.mark.parametrize(
    ("weight", "named"),
    [
        (PER_TENSOR | {"dtype": "uint2"}, "quark's uint2"),
        (PER_TENSOR | {"dtype": "int8", "symmetric": False}, "quark's asymmetric int8 per_tensor"),
        (PER_GROUP | {"dtype": "int8", "symmetric": True}, "quark's symmetric int8 per_group"),
        (PER_GROUP | {"dtype": "fp6_e3m2"}, "quark's fp6_e3m2"),
        (PER_GROUP | {"dtype": "mx"}, "quark's mx"),
        (PER_GROUP | {"scale_format": "e5m3"}, "quark's scales of e5m3"),
        (PER_TENSOR | {"qscheme": "per_channel", "ch_axis": 1}, "per_channel with ch_axis 1"),
        (PER_GROUP | {"ch_axis": 0}, "per_group with ch_axis 0"),
        (PER_TENSOR | {"qscheme": None}, "quark's None"),
        ([PER_TENSOR, PER_GROUP | {"dtype": "int4"}], "quark's fp8_e4m3 and int4 in sequence"),
        ([PER_GROUP, PER_TENSOR | {"is_scale_quant": False}], "quark's fp4 and fp8_e4m3 in sequence"),
        ([PER_GROUP, PER_TENSOR, PER_TENSOR], "fp4 and fp8_e4m3 and fp8_e4m3 in sequence"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_weights_of_quark_that_are_not_decoded_are_named(weight, named):
    for config in (quark(weight), quark(None, a=weight)):
        with pytest.raises(UnsupportedScheme, match=named):
            METHODS["quark"].schemes(config)


def test_weights_that_quark_exports_as_values_are_named():
    with pytest.raises(UnsupportedScheme, match="weight_format 'fake_quantized'"):
        METHODS["quark"].schemes(quark(PER_TENSOR) | {"export": {"weight_format": "fake_quantized"}})


@pytest.mark.parametrize(
    "weight",
    [
        {"dtype": "fp8_e4m3", "qscheme": "per_block", "block_size": [128]},
        {"dtype": "fp8_e4m3", "qscheme": "per_block", "block_size": None},
        PER_GROUP | {"group_size": 0},
        "fp8",
        [],
        {"qscheme": "per_tensor"},
    ],
    ids=str,
)
def test_malformed_description_of_quark_is_an_error_that_the_reader_of_configs_expects(weight):
    with pytest.raises((TypeError, ValueError, KeyError, AttributeError)):
        METHODS["quark"].schemes(quark(weight or [[]]))
