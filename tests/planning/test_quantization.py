"""Tests of recognizing quantized tensors, and of every way in which their parts can be wrong."""

import pytest

from automodel_conv.errors import QuantizationError, UnsupportedError
from automodel_conv.planning.copies import Decode, SourceTable
from automodel_conv.planning.quantization import quantized_table

FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}


def table(**tensors):
    """Return a table of dtypes and shapes by name, with two underscores for a dot."""
    names = [name.replace("__", ".") for name in tensors]
    dtypes, shapes = zip(*tensors.values(), strict=True)
    return SourceTable(names, dtypes, shapes)


def compressed(stored="pack-quantized", **weights):
    group = {"targets": ["Linear"], "weights": weights}
    return {"quant_method": "compressed-tensors", "format": stored, "config_groups": {"group_0": group}}


def blocks(*sizes):
    """Return a config of compressed-tensors' FP8 with a group for each block size."""
    scheme = {"num_bits": 8, "type": "float", "strategy": "block"}
    groups = {str(size): {"targets": ["Linear"], "weights": scheme | {"block_structure": list(size)}} for size in sizes}
    return {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": groups}


INT4 = compressed(num_bits=4, type="int", strategy="group", group_size=32)


def test_codes_represent_the_weight_and_scales_are_hidden():
    table_read = quantized_table(
        table(
            a__weight=("F8_E4M3", (576, 200)),
            a__weight_scale_inv=("F32", (5, 2)),
            a__activation_scale=("F32", ()),
            norm=("BF16", (200,)),
        ),
        FP8,
    )
    assert table_read.decodes == {0: Decode("e4m3", (576, 200), (128, 128), 1)}
    assert table_read.hidden == {1, 2}
    assert (table_read.names[0], table_read.dtypes[0], table_read.shapes[0]) == ("a.weight", "BF16", (576, 200))
    assert table_read.nbytes(0) == 576 * 200


def test_packed_codes_get_the_name_and_shape_of_the_weight():
    table_read = quantized_table(
        table(
            a__weight_packed=("I32", (64, 16)),
            a__weight_scale=("F16", (64, 4)),
            a__weight_shape=("I64", (2,)),
        ),
        INT4,
    )
    assert table_read.decodes == {0: Decode("int4", (64, 128), (1, 32), 1, divides=True)}
    assert (table_read.names[0], table_read.dtypes[0], table_read.shapes[0]) == ("a.weight", "F16", (64, 128))
    assert table_read.nbytes(0) == 64 * 64
    assert table_read.hidden == {1, 2}


def test_experts_of_another_format_in_an_fp8_checkpoint():
    table_read = quantized_table(
        table(
            dense__weight=("F8_E4M3", (128, 256)),
            dense__scale=("F8_E8M0", (1, 2)),
            expert__weight=("I8", (64, 64)),
            expert__scale=("F8_E8M0", (64, 4)),
        ),
        FP8,
    )
    assert {decode.format for decode in table_read.decodes.values()} == {"e4m3", "e2m1"}
    assert table_read.shapes[2] == (64, 128)


def test_groups_of_a_config_are_distinguished_by_their_tensors():
    config = blocks((100, 128), (128, 128))
    config["config_groups"] |= {
        "packed": {"format": "pack-quantized", "weights": INT4["config_groups"]["group_0"]["weights"]},
        "with zeros": {
            "format": "pack-quantized",
            "weights": INT4["config_groups"]["group_0"]["weights"] | {"symmetric": False},
        },
    }
    table_read = quantized_table(
        table(
            a__weight=("F8_E4M3", (256, 128)),
            a__weight_scale=("F32", (2, 1)),
            b__weight=("F8_E4M3", (90, 128)),  # smaller than a block of either
            b__weight_scale=("F32", (1, 1)),
            c__weight_packed=("I32", (64, 16)),
            c__weight_scale=("F16", (64, 4)),
            d__weight_packed=("I32", (64, 16)),
            d__weight_scale=("F16", (64, 4)),
            d__weight_zero_point=("I32", (8, 4)),
        ),
        config,
    )
    assert [decode.block for decode in table_read.decodes.values()] == [(128, 128), (100, 128), (1, 32), (1, 32)]
    assert [decode.zero_points for decode in table_read.decodes.values()] == [None, None, None, 8]


@pytest.mark.parametrize(
    ("scale", "block"),
    [((2, 2), (128, 128)), ((), (256, 200)), ((1,), (256, 200)), ((256, 1), (1, 200)), ((256,), (1, 200))],
    ids=str,
)
def test_scales_determine_the_block_if_the_config_does_not(scale, block):
    table_read = quantized_table(
        table(a__weight=("F8_E4M3", (256, 200)), a__weight_scale=("F32", scale)), {"quant_method": "fp8"}
    )
    assert table_read.decodes[0].block == block


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (3,), (3, 1), (3, 1, 1)], ids=str)
def test_stack_has_one_global_scale_or_one_for_each_matrix(shape):
    parts = {
        "experts__down_proj": ("U8", (3, 8, 16)),
        "experts__down_proj_weight_scale": ("F8_E4M3", (3, 8, 2)),
        "experts__down_proj_weight_scale_2": ("F32", shape),
        "experts__down_proj_input_scale": ("F32", (3,)),
    }
    table_read = quantized_table(table(**parts), {"quant_method": "modelopt", "quant_algo": "NVFP4"})
    assert table_read.decodes == {0: Decode("e2m1", (8, 32), (1, 16), 1, global_scale=2)}
    assert table_read.hidden == {1, 2, 3}
    assert table_read.shapes[0] == (3, 8, 32)


@pytest.mark.parametrize("shape", [(3,), (3, 1), (3, 1, 1)], ids=str)
def test_stack_has_one_scale_for_each_matrix(shape):
    parts = {"experts__down_proj": ("F8_E4M3", (3, 8, 16)), "experts__down_proj_weight_scale": ("F32", shape)}
    table_read = quantized_table(table(**parts), {"quant_method": "modelopt", "quant_algo": "FP8"})
    assert table_read.decodes == {0: Decode("e4m3", (8, 16), (8, 16), 1)}


CODES = {"a__weight": ("F8_E4M3", (256, 256))}
SCALED = CODES | {"a__weight_scale_inv": ("F32", (2, 2))}
PACKED = {"a__weight_packed": ("I32", (64, 16)), "a__weight_scale": ("BF16", (64, 4))}
NVFP4 = compressed("nvfp4-pack-quantized", num_bits=4, type="float", strategy="tensor_group", group_size=16)
WITH_ZERO_POINTS = compressed(num_bits=4, type="int", strategy="group", group_size=32, symmetric=False)


@pytest.mark.parametrize(
    ("config", "tensors", "message"),
    [
        (FP8, CODES, "a.weight has no scale: no tensor is named a.weight_scale_inv or"),
        (FP8, CODES | {"a__weight_scale_inv": ("F32", (2, 3))}, "expected [2, 2], found [2, 3]"),
        (FP8, CODES | {"a__weight_scale_inv": ("I32", (2, 2))}, "a.weight_scale_inv is I32"),
        (FP8, {"a__weight": ("BF16", (8, 8))}, "no tensor has codes"),
        (
            FP8,
            {"a__weight": ("BF16", (8, 8)), "a__weight_scale_inv": ("F32", (1, 1))},
            "a.weight_scale_inv is the scale of a.weight, which is BF16",
        ),
        (FP8 | {"weight_block_size": None}, CODES | {"a__weight_scale_inv": ("F32", (2, 2))}, "found [2, 2]"),
        ({"quant_method": "mxfp4"}, {"a_blocks": ("U8", (2, 8, 3, 16))}, "a_blocks has no scale"),
        (
            {"quant_method": "mxfp4"},
            {"a_blocks": ("U8", (2, 8, 3, 12)), "a_scales": ("U8", (2, 8, 3))},
            "not [..., rows, groups, 16]",
        ),
        (
            {"quant_method": "mxfp4"},
            {"a_blocks": ("U8", (2, 8, 3, 16)), "a_scales": ("U8", (2, 8, 4))},
            "expected [2, 8, 3], found [2, 8, 4]",
        ),
        (INT4, PACKED | {"a__weight_scale": ("BF16", (64, 8))}, "found [64, 8]"),
        (INT4, CODES | {"a__weight_scale": ("BF16", (2, 2))}, "e4m3 codes, which the config does not describe"),
        (
            INT4,
            PACKED | {"a__weight_zero_point": ("I32", (8, 4))},
            "a.weight_zero_point: the config has no zero points",
        ),
        (WITH_ZERO_POINTS, PACKED, "a.weight has no zero points"),
        (WITH_ZERO_POINTS, PACKED | {"a__weight_zero_point": ("I32", (64, 4))}, "expected I32 [8, 4]"),
        (
            NVFP4,
            {"a__weight_packed": ("U8", (8, 32)), "a__weight_scale": ("F8_E4M3", (8, 4))},
            "no global scale: no tensor is named a.weight_global_scale",
        ),
        (
            NVFP4,
            {
                "a__weight_packed": ("U8", (8, 32)),
                "a__weight_scale": ("U8", (8, 4)),
                "a__weight_global_scale": ("F32", (1,)),
            },
            "a.weight_scale is U8; these e2m1 codes have scales of F8_E4M3",
        ),
        (
            {"quant_method": "modelopt", "quant_algo": "NVFP4"},
            {"a__weight": ("U8", (8, 32)), "a__weight_scale": ("U8", (8, 4)), "a__weight_scale_2": ("F32", ())},
            "a.weight_scale is U8; these e2m1 codes have scales of F8_E4M3",
        ),
        (
            {"quant_method": "modelopt", "quant_algo": "NVFP4"},
            {
                "a": ("U8", (3, 8, 16)),
                "a_weight_scale": ("F8_E4M3", (3, 8, 2)),
                "a_weight_scale_2": ("F32", (8,)),
            },
            "a_weight_scale_2: expected one F32 or F32 [3], found F32 [8]",
        ),
        (
            {"quant_method": "modelopt", "quant_algo": "NVFP4"},
            {
                "a": ("U8", (3, 8, 16)),
                "a_weight_scale": ("F8_E4M3", (3, 8, 2)),
                "a_weight_scale_2": ("F32", ()),
                "a_scale_2": ("F32", ()),
            },
            "a has 2 scales: a_scale_2, a_weight_scale_2",
        ),
        (
            {"quant_method": "modelopt", "quant_algo": "NVFP4"},
            {"a__weight": ("U8", (8, 16)), "a__weight_scale": ("F8_E4M3", (8, 2)), "a__weight_scale_2": ("F32", (8,))},
            "a.weight_scale_2: expected one F32, found F32 [8]",
        ),
        (
            compressed("float-quantized", num_bits=8, type="float", strategy="tensor"),
            CODES | {"a__weight_scale": ("F32", (1,)), "a__weight_global_scale": ("F32", (1,))},
            "a.weight_global_scale: the config has no global scale",
        ),
        (
            FP8,
            CODES | {"a__weight_scale_inv": ("F32", (2, 2)), "a__weight_scale": ("F32", (2, 2))},
            "a.weight has 2 scales: a.weight_scale_inv, a.weight_scale",
        ),
        (
            FP8,
            SCALED | {"b__weight_scale_inv": ("F32", (2, 2))},
            "b.weight_scale_inv is a scale without codes: no tensor is named b.weight",
        ),
        (
            INT4,
            PACKED | {"b__weight_scale": ("BF16", (64, 4))},
            "b.weight_scale is a scale without codes: no tensor is named b.weight or b.weight_packed",
        ),
        (
            INT4,
            PACKED | {"b__weight_packed": ("I64", (64, 16)), "b__weight_scale": ("BF16", (64, 4))},
            "b.weight_scale is the scale of b.weight_packed, which is I64, not codes",
        ),
        (
            INT4,
            PACKED | {"a__weight": ("BF16", (64, 128))},
            "a.weight is stored in addition to its codes, a.weight_packed",
        ),
        (INT4, PACKED | {"a__weight_g_idx": ("I32", (128,))}, "groups by activation order: a.weight_g_idx"),
        (
            INT4,
            {"a__weight_packed": ("I32", (64, 13)), "a__weight_scale": ("BF16", (64, 4))},
            "a.weight_packed has 104 columns, which are not whole groups of 32: no tensor a.weight_shape states how",
        ),
        (FP8, SCALED | {"b__weight": ("I8", (64, 64))}, "b.weight has no scale: no tensor is named b.weight_scale_inv"),
        (FP8, SCALED | {"b__weight": ("F8_E4M3FNUZ", (8, 8))}, "b.weight is F8_E4M3FNUZ, and nothing describes how"),
        (FP8, {"a__bias": ("F8_E4M3", (2, 2)), "a__scale": ("F32", (1, 1))}, "a.bias has no scale"),
        (
            {"quant_method": "mxfp4"},
            {"a_blocks": ("U8", (2, 8, 3, 16)), "a_scales": ("U8", (2, 8, 3))} | SCALED,
            "a.weight is F8_E4M3, and nothing describes how to decode it",
        ),
        (
            blocks((100, 128), (128, 128)),
            {"a__weight": ("F8_E4M3", (150, 128)), "a__weight_scale": ("F32", (2, 1))},
            "fits several blocks: [100, 128] and [128, 128]",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_parts_that_do_not_fit_are_named(config, tensors, message):
    with pytest.raises(QuantizationError) as caught:
        quantized_table(table(**tensors), config)
    assert message in str(caught.value)


def test_module_of_a_weight_decides_between_schemes_that_fit_its_parts():
    layers = {"a": {"quant_algo": "FP8_PB_WO", "group_size": 100}, "b": {"quant_algo": "FP8_PB_WO", "group_size": 128}}
    config = {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "quantized_layers": layers}

    def parts(*names):
        codes = {f"{name}__weight": ("F8_E4M3", (150, 100)) for name in names}
        return table(**codes, **{f"{name}__weight_scale": ("F32", (2, 1)) for name in names})

    decodes = quantized_table(parts("a", "b"), config).decodes
    assert [decode.block for decode in decodes.values()] == [(100, 100), (128, 128)]
    with pytest.raises(QuantizationError, match=r"c.weight_scale of c.weight \[150, 100\] fits several blocks"):
        quantized_table(parts("a", "b", "c"), config)


def test_all_problems_are_reported_at_once():
    tensors = {f"a{n}__weight": ("F8_E4M3", (256, 256)) for n in range(7)}
    with pytest.raises(QuantizationError, match="7 problems") as caught:
        quantized_table(table(**tensors), FP8)
    assert "a0.weight has no scale" in str(caught.value)
    assert "; the same for a1.weight, a2.weight and 4 more\n" in str(caught.value)


def test_thousands_of_equal_problems_do_not_hide_another():
    tensors = {f"a{n}__weight": ("F8_E4M3", (256, 256)) for n in range(3000)}
    tensors["z__weight"], tensors["z__weight_scale_inv"] = ("F8_E4M3", (256, 256)), ("F32", (2, 3))
    with pytest.raises(QuantizationError, match="3001 problems") as caught:
        quantized_table(table(**tensors), FP8)
    assert "a2.weight and 2997 more\n" in str(caught.value)
    assert "z.weight_scale_inv of z.weight [256, 256]: expected [2, 2], found [2, 3]" in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"quant_method": "hqq"}, "'hqq'"),
        ({}, "None"),
        ({"quant_method": ["fp8"]}, "fp8"),
        ({"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"}, "W4A8_AWQ"),
        (compressed("marlin-24", num_bits=4, type="int", strategy="channel"), "marlin-24"),
        (compressed(num_bits=3, type="int", strategy="channel"), "3-bit"),
        (compressed(num_bits=4, type="int", strategy="group", group_size=32, actorder="group"), "activation order"),
        (compressed(num_bits=4, type="int", strategy="token"), "token"),
        (compressed(num_bits=4, type="int", strategy="group", group_size=32, actorder="dynamic"), "activation order"),
        (
            compressed("float-quantized", num_bits=8, type="float", strategy="channel", symmetric=False),
            "zero points of e4m3",
        ),
        (compressed("int-quantized", num_bits=4, type="int", strategy="channel"), "int-quantized with 4-bit int"),
        (compressed("pack-quantized", num_bits=8, type="int", strategy="channel"), "pack-quantized with 8-bit int"),
        (compressed("mxfp6-pack-quantized", num_bits=6, type="float", strategy="group"), "mxfp6-pack-quantized"),
        (
            compressed("int-quantized", num_bits=8, type="int", strategy="channel", symmetric=False),
            "zero points of int8",
        ),
        (INT4 | {"transform_config": {"config_groups": {"R1": {"type": "hadamard"}}}}, "transforms"),
        (INT4 | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse-24-bitmask"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_schemes_that_are_not_decoded_are_named(config, named):
    with pytest.raises(UnsupportedError) as caught:
        quantized_table(table(**CODES), config)
    assert named in str(caught.value)


@pytest.mark.parametrize(
    "config",
    [
        {"quant_method": "compressed-tensors", "config_groups": [1]},
        {"quant_method": "compressed-tensors", "config_groups": {"a": {"weights": "int4"}}},
        compressed(num_bits=4, type="int", strategy="group"),
        compressed("float-quantized", num_bits=8, type="float", strategy="block", block_structure=[1, 2, 3]),
        FP8 | {"weight_block_size": "large"},
        FP8 | {"weight_block_size": [0, 128]},
        FP8 | {"weight_block_size": [128.7, 128]},
        FP8 | {"weight_block_size": [10**30, 128]},
        compressed(num_bits=4, type="int", strategy="group", group_size=0),
        compressed(num_bits=4, type="int", strategy="group", group_size=-1),
        compressed(num_bits=4, type="int", strategy="group", group_size=float("inf")),
        {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": [16]},
    ],
    ids=str,
)
def test_malformed_config_is_one_error(config):
    with pytest.raises(QuantizationError, match="malformed"):
        quantized_table(table(**CODES), config)


def test_shards_without_scales_share_that_of_the_weight():
    names = ["ngram_embedding.shard_0.weight", "ngram_embedding.shard_1.weight", "ngram_embedding.weight_scale"]
    config = {"quant_method": "fp8", "weight_block_size": [2, 2]}
    for shape in ((), (1,), (1, 1)):
        table = SourceTable(names, ["F8_E4M3", "F8_E4M3", "BF16"], [(4, 6), (5, 6), shape])
        decoded = quantized_table(table, config)
        assert decoded.decodes == {
            0: Decode("e4m3", (4, 6), (4, 6), 2),
            1: Decode("e4m3", (5, 6), (5, 6), 2),
        }
        assert decoded.hidden == {2}
        assert decoded.dtypes[:2] == ["BF16", "BF16"]


def test_shards_may_have_scales_of_their_own():
    names = ["ngram_embedding.shard_0.weight", "ngram_embedding.shard_0.weight_scale"]
    config = {"quant_method": "fp8", "weight_block_size": [1, 6]}
    decoded = quantized_table(SourceTable(names, ["F8_E4M3", "F32"], [(4, 6), (4, 1)]), config)
    assert decoded.decodes == {0: Decode("e4m3", (4, 6), (1, 6), 1)}
    with_both = SourceTable([*names, "ngram_embedding.weight_scale"], ["F8_E4M3", "F32", "F32"], [(4, 6), (4, 1), ()])
    with pytest.raises(QuantizationError, match=r"ngram_embedding\.weight_scale is a scale without codes"):
        quantized_table(with_both, config)


@pytest.mark.parametrize(
    "name", ["embedding.shard_0.weight", "x.ngram_embedding.part_0.weight", "ngram_embedding.bias"]
)
def test_other_weights_share_no_scale(name):
    whole = name.split(".shard")[0].split(".part")[0]
    table = SourceTable([name, f"{whole}.weight_scale"], ["F8_E4M3", "F32"], [(4, 6), ()])
    with pytest.raises(QuantizationError, match="has no scale"):
        quantized_table(table, {"quant_method": "fp8", "weight_block_size": [2, 2]})
