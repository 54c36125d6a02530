"""Tests of codes and scales recognized by their names and dtypes, for any method."""

import pytest

from automodel_conv.planning.code_names import (
    CodeNames,
    has_codes,
    names_of_codes,
    packed_dtypes,
    parts_of_codes,
    scales_of_codes,
)
from automodel_conv.planning.copies import SourceTable
from tests.planning.test_quantization import table


def test_codes_with_scales_are_recognized_without_a_config():
    assert has_codes(table(a__weight=("F8_E4M3", (8, 8)), a__weight_scale_inv=("F32", (1, 1)))) == "a.weight"
    assert has_codes(table(a__weight=("F8_E4M3", (8, 8)))) is None
    assert has_codes(table(a__weight_scale_inv=("F32", (1, 1)), a__weight=("BF16", (8, 8)))) is None


def test_tensor_has_codes_only_if_the_scale_is_one_of_its_own_method():
    blocks = table(a_blocks=("U8", (2, 4, 3, 16)), a_scales=("U8", (2, 4, 3)))
    assert has_codes(blocks) == "a_blocks"
    assert has_codes(table(a_blocks=("U8", (2, 4, 3, 16)), a_scale=("U8", (2, 4, 3)))) is None
    assert has_codes(table(a_blocks=("I8", (2, 4, 3, 16)), a_scales=("U8", (2, 4, 3)))) is None


@pytest.mark.parametrize(
    ("codes", "scales", "others"),
    [
        ("m.weight", {"m.weight_scale_inv", "m.weight_scale", "m.scale", "m.qscale_weight"}, {"m_scale"}),
        ("m.weight_packed", {"m.weight_scale"}, {"m.weight"}),
        ("m_blocks", {"m_scales"}, {"m.scales"}),
        ("m.gate_up_proj", {"m.gate_up_proj_scale_inv"}, {"m.scale"}),
    ],
)
def test_codes_may_have_the_scale_names_of_every_method(codes, scales, others):
    names = set(CodeNames.of_all_methods().scale_names(codes))
    assert names >= scales
    assert names.isdisjoint(others)


@pytest.mark.parametrize(
    ("name", "dtype", "needed"),
    [
        ("m.weight", "F8_E4M3", True),
        ("m.gate_up_proj", "F8_E5M2", True),
        ("m.weight", "F4", True),
        ("m.weight", "I8", True),
        ("m.bias", "I8", False),
        ("m.weight", "I32", False),
        ("m.weight", "BF16", False),
        ("m.weight_scale", "F8_E4M3", False),
        ("m.weight", "F8_E8M0", False),
    ],
)
def test_weights_of_a_narrow_dtype_need_a_scale(name, dtype, needed):
    assert CodeNames.of_all_methods().needs_scale(name, dtype) is needed


def test_dtypes_that_pack_several_codes_are_listed():
    assert packed_dtypes() == {"I8", "U8", "I32", "F4"}


def test_shards_with_one_scale_are_codes_and_it_is_their_part():
    names = ["ngram_embedding.shard_0.weight", "ngram_embedding.shard_1.weight", "ngram_embedding.weight_scale"]
    table = SourceTable(names, ["F8_E4M3", "F8_E4M3", "BF16"], [(2, 2), (2, 2), ()])
    assert names_of_codes(table) == tuple(names[:2])
    assert parts_of_codes(table) == {names[2]}
    assert names[2] in CodeNames.of_all_methods().scale_names(names[0])


def test_scales_are_found_by_the_name_of_their_codes():
    names = ["a.weight", "a.weight_scale_inv", "b.weight", "c.qweight", "c.scales", "c.g_idx"]
    table = SourceTable(names, ["F8_E4M3", "F32", "F8_E4M3", "I32", "F16", "I32"], [(1, 8)] * 6)
    assert scales_of_codes(table) == {"a.weight": "a.weight_scale_inv", "c.qweight": "c.scales"}


def test_input_scale_is_not_the_scale_of_codes():
    names = ["a.input_scale", "a.weight", "a.weight_scale"]
    table = SourceTable(names, ["F32", "F8_E4M3", "F32"], [(), (2, 2), ()])
    assert scales_of_codes(table) == {"a.weight": "a.weight_scale"}


def test_scale_of_a_shard_is_that_of_all_shards():
    names = ["ngram_embedding.shard_0.weight", "ngram_embedding.shard_0.input_scale", "ngram_embedding.weight_scale"]
    table = SourceTable(names, ["F8_E4M3", "F32", "BF16"], [(2, 2), (), ()])
    assert scales_of_codes(table) == {names[0]: names[2]}
