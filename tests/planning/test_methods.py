"""Tests of the data of each quantization method: consistent with itself, and with the decoder."""

import pytest

from automodel_conv.kernels.code_tables import CODE_VALUES, bits_of
from automodel_conv.planning.copies import CODE_BITS
from automodel_conv.planning.methods.method import Packing, part_name, weight_name
from automodel_conv.planning.methods.table import METHODS


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
    [("a.weight", "_scale", "a.weight_scale"), ("a.weight", ".scale", "a.scale"), ("a.bias", "", "a.bias")],
)
def test_part_is_named_after_its_weight(weight, suffix, part):
    assert part_name(weight, suffix) == part
    assert weight_name(part, suffix) == weight
    assert part_name("a.bias", ".scale") is None
