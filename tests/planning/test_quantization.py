"""What is recognized as quantized, and every way in which parts of it can be wrong."""

import pytest

from automodel_conv.errors import QuantizationError, UnsupportedError
from automodel_conv.planning.copies import Decode, SourceTable
from automodel_conv.planning.quantization import has_codes, quantized_table

FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}


def table(**tensors):
    """Dtypes and shapes by name; two underscores stand for a dot."""
    names = [name.replace("__", ".") for name in tensors]
    dtypes, shapes = zip(*tensors.values(), strict=True)
    return SourceTable(names, dtypes, shapes)


def compressed(stored="pack-quantized", **weights):
    group = {"targets": ["Linear"], "weights": weights}
    return {"quant_method": "compressed-tensors", "format": stored, "config_groups": {"group_0": group}}


INT4 = compressed(num_bits=4, type="int", strategy="group", group_size=32)


def test_codes_stand_for_the_weight_and_scales_are_hidden():
    found = quantized_table(
        table(
            a__weight=("F8_E4M3", (576, 200)),
            a__weight_scale_inv=("F32", (5, 2)),
            a__activation_scale=("F32", ()),
            norm=("BF16", (200,)),
        ),
        FP8,
    )
    assert found.decodes == {0: Decode("e4m3", (576, 200), (128, 128), 1)}
    assert found.hidden == {1, 2}
    assert (found.names[0], found.dtypes[0], found.shapes[0]) == ("a.weight", "BF16", (576, 200))
    assert found.nbytes(0) == 576 * 200


def test_packed_codes_take_the_name_and_shape_of_the_weight():
    found = quantized_table(
        table(
            a__weight_packed=("I32", (64, 16)),
            a__weight_scale=("F16", (64, 4)),
            a__weight_shape=("I64", (2,)),
        ),
        INT4,
    )
    assert found.decodes == {0: Decode("int4", (64, 128), (1, 32), 1, divides=True)}
    assert (found.names[0], found.dtypes[0], found.shapes[0]) == ("a.weight", "F16", (64, 128))
    assert found.nbytes(0) == 64 * 64
    assert found.hidden == {1, 2}


def test_experts_of_another_format_in_an_fp8_checkpoint():
    found = quantized_table(
        table(
            dense__weight=("F8_E4M3", (128, 256)),
            dense__scale=("F8_E8M0", (1, 2)),
            expert__weight=("I8", (64, 64)),
            expert__scale=("F8_E8M0", (64, 4)),
        ),
        FP8,
    )
    assert {decode.format for decode in found.decodes.values()} == {"e4m3", "e2m1"}
    assert found.shapes[2] == (64, 128)


def test_codes_with_scales_are_seen_without_a_config():
    assert has_codes(table(a__weight=("F8_E4M3", (8, 8)), a__weight_scale_inv=("F32", (1, 1)))) == "a.weight"
    assert has_codes(table(a__weight=("F8_E4M3", (8, 8)))) is None
    assert has_codes(table(a__weight_scale_inv=("F32", (1, 1)), a__weight=("BF16", (8, 8)))) is None


CODES = {"a__weight": ("F8_E4M3", (256, 256))}
PACKED = {"a__weight_packed": ("I32", (64, 16)), "a__weight_scale": ("BF16", (64, 4))}
NVFP4 = compressed("nvfp4-pack-quantized", num_bits=4, type="float", strategy="tensor_group", group_size=16)
WITH_ZERO_POINTS = compressed(num_bits=4, type="int", strategy="group", group_size=32, symmetric=False)


@pytest.mark.parametrize(
    ("config", "tensors", "told"),
    [
        (FP8, CODES, "a.weight has no scale: nothing is called a.weight_scale_inv or"),
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
        (INT4, CODES | {"a__weight_scale": ("BF16", (2, 2))}, "e4m3 codes, of which the config does not speak"),
        (INT4, PACKED | {"a__weight_zero_point": ("I32", (8, 4))}, "the config says there are none"),
        (WITH_ZERO_POINTS, PACKED, "a.weight has no zero points"),
        (WITH_ZERO_POINTS, PACKED | {"a__weight_zero_point": ("I32", (64, 4))}, "expected I32 [8, 4]"),
        (
            NVFP4,
            {"a__weight_packed": ("U8", (8, 32)), "a__weight_scale": ("F8_E4M3", (8, 4))},
            "no scale of the whole tensor: nothing is called a.weight_global_scale",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_parts_that_do_not_fit_are_named(config, tensors, told):
    with pytest.raises(QuantizationError) as caught:
        quantized_table(table(**tensors), config)
    assert told in str(caught.value)


def test_all_that_is_wrong_is_told_at_once():
    tensors = {f"a{n}__weight": ("F8_E4M3", (256, 256)) for n in range(7)}
    with pytest.raises(QuantizationError, match="7 problems") as caught:
        quantized_table(table(**tensors), FP8)
    assert all(f"a{n}.weight has no scale" in str(caught.value) for n in range(7))


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"quant_method": "gptq"}, "'gptq'"),
        ({}, "None"),
        ({"quant_method": ["fp8"]}, "fp8"),
        ({"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"}, "W4A8_AWQ"),
        (compressed("marlin-24", num_bits=4, type="int", strategy="channel"), "marlin-24"),
        (compressed(num_bits=3, type="int", strategy="channel"), "3-bit"),
        (compressed(num_bits=4, type="int", strategy="group", group_size=32, actorder="group"), "activation order"),
        (compressed(num_bits=4, type="int", strategy="token"), "token"),
        (FP8 | {"weight_block_size": [0, 128]}, "without elements"),
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
        {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": [16]},
    ],
    ids=str,
)
def test_a_malformed_config_is_one_error(config):
    with pytest.raises(QuantizationError, match="malformed"):
        quantized_table(table(**CODES), config)
