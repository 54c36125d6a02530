"""Tests of casts: casts between values are allowed, casts of codes are refused with advice."""

import itertools

import pytest

from automodel_conv.errors import UnsupportedError
from automodel_conv.planning.casts import check_cast

FLOATS = ["F64", "F32", "F16", "BF16"]
CODES = ["F8_E4M3", "F8_E5M2", "F8_E8M0", "F4"]
INTEGERS = ["BOOL", "I8", "U8", "I16", "I32", "I64"]


def refusal(stored, wanted):
    with pytest.raises(UnsupportedError, match=r"a\.weight cannot be cast for b\.weight") as caught:
        check_cast("a.weight", stored, "b.weight", wanted)
    return str(caught.value)


@pytest.mark.parametrize("dtypes", [FLOATS, INTEGERS], ids=["floats", "integers"])
def test_floats_become_floats_and_integers_become_integers(dtypes):
    for stored, wanted in itertools.product(dtypes, dtypes):
        check_cast("a.weight", stored, "b.weight", wanted)


@pytest.mark.parametrize("stored", ["BOOL", "I16", "I32", "I64"])
def test_integers_that_cannot_be_codes_become_floats(stored):
    check_cast("a.weight", stored, "b.weight", "BF16")


@pytest.mark.parametrize("dtype", [*CODES, "I8", "U8"])
def test_codes_keep_their_dtype(dtype):
    check_cast("a.weight", dtype, "b.weight", dtype)


@pytest.mark.parametrize("stored", [*CODES, "I8", "U8"])
def test_codes_do_not_become_floats_without_their_scales(stored):
    text = refusal(stored, "BF16")
    assert "holds codes" in text
    assert "dequantize=True" in text


@pytest.mark.parametrize("wanted", CODES)
def test_floats_do_not_become_codes(wanted):
    text = refusal("BF16", wanted)
    assert "holds codes" in text
    assert "dequantize=False" in text


@pytest.mark.parametrize(("stored", "wanted"), [("F8_E4M3", "F8_E5M2"), ("U8", "F8_E4M3"), ("F4", "U8")])
def test_codes_do_not_become_other_codes(stored, wanted):
    assert "never cast" in refusal(stored, wanted)


def test_floats_do_not_become_integers_and_no_codes_are_suspected():
    text = refusal("F32", "I32")
    assert "expected: I32" in text
    assert "found:    F32" in text
    assert "codes" not in text
