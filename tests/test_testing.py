"""Tests of the helpers for tests: each fails when it should."""

from __future__ import annotations

import pytest
import torch

from automodel_conv.dtypes import BITS, torch_dtype
from automodel_conv.testing import (
    POISON,
    address_valued,
    assert_bytes_equal,
    assert_written,
    guarded,
    poisoned,
)

DTYPES = [dtype for code in BITS if (dtype := torch_dtype(code)) is not None]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equal_tensors_of_every_dtype_pass_and_one_changed_byte_fails(dtype):
    tensor = address_valued((3, 4), dtype, 1)
    changed = tensor.clone()
    changed.view(torch.uint8).reshape(-1)[5 * dtype.itemsize] ^= 1
    assert_bytes_equal(tensor, tensor.clone())
    with pytest.raises(AssertionError, match=r"1 of 12 elements differ; first at \[1, 1\]"):
        assert_bytes_equal(changed, tensor)


def test_difference_shows_both_values_and_the_count():
    expected = torch.zeros(2, 3)
    actual = expected.clone()
    actual[1, 0], actual[1, 2] = 1.5, 2.0
    with pytest.raises(AssertionError) as error:
        assert_bytes_equal(actual, expected)
    text = str(error.value)
    assert "2 of 6" in text
    assert "[1, 0]: 1.5 (0x3fc00000), expected 0.0 (0x00000000)" in text


@pytest.mark.parametrize(
    ("actual", "expected", "text"),
    [
        (torch.ones(2, 3), torch.ones(3, 2), r"shape \[2, 3\], expected \[3, 2\]"),
        (torch.ones(1, 3), torch.ones(3), "shape"),
        (torch.ones(2, 1), torch.ones(2, 2), "shape"),
        (torch.ones(0, 3), torch.ones(3, 0), "shape"),
        (torch.ones(2, dtype=torch.int16), torch.ones(2, dtype=torch.uint16), "dtype"),
        (torch.tensor(0.0), torch.tensor(-0.0), r"first at \[\]"),
        (torch.ones(2, 2).mul(float("nan")), torch.ones(2, 2), "4 of 4"),
    ],
)
def test_differences_that_value_comparison_misses_fail(actual, expected, text):
    with pytest.raises(AssertionError, match=text):
        assert_bytes_equal(actual, expected)


def test_same_nan_is_equal_and_another_nan_is_not():
    quiet = torch.tensor([0x7FC00000, 0x7FC00001], dtype=torch.int32).view(torch.float32)
    assert_bytes_equal(quiet, quiet.clone())
    with pytest.raises(AssertionError, match="nan"):
        assert_bytes_equal(quiet[:1], quiet[1:])


def test_strides_count_only_when_asked():
    tensor = torch.arange(6).reshape(2, 3)
    other = tensor.t().contiguous().t()
    assert_bytes_equal(other, tensor)
    with pytest.raises(AssertionError, match="strides"):
        assert_bytes_equal(other, tensor, strides=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_poison_fills_every_byte_and_leftovers_are_found(dtype):
    tensor = poisoned((2, 3), dtype)
    assert (tensor.shape, tensor.dtype) == ((2, 3), dtype)
    raw = tensor.view(torch.uint8).reshape(6, -1)
    assert bool((raw == POISON).all())
    raw[:] = 0
    assert_written(tensor)
    raw[4] = POISON
    with pytest.raises(AssertionError, match=r"1 of 6 elements were never written, first \[1, 1\]"):
        assert_written(tensor)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("strides", [None, (7, 2)])
def test_writing_inside_a_guarded_tensor_is_fine(dtype, strides):
    tensor, check = guarded((2, 3), dtype, strides=strides)
    tensor.copy_(address_valued((2, 3), dtype))
    assert_written(tensor)
    check()


@pytest.mark.parametrize("offset", [-1, 6, -200, 200])
def test_writing_around_a_guarded_tensor_is_found(offset):
    tensor, check = guarded((2, 3), torch.uint8)
    tensor.as_strided((1,), (1,), tensor.storage_offset() + offset).fill_(0)
    with pytest.raises(AssertionError, match=f"1 guard bytes .* first at byte {offset} "):
        check()


def test_writing_between_strided_elements_is_found():
    tensor, check = guarded((2, 3), torch.int16, strides=(8, 2))
    assert tensor.stride() == (8, 2)
    tensor.fill_(0)
    check()
    tensor.as_strided((1,), (1,), tensor.storage_offset() + 1).fill_(0)
    with pytest.raises(AssertionError, match=r"2 guard bytes .* first at byte 2 "):
        check()


def test_guarded_tensors_may_be_empty_or_scalars():
    for shape in [(), (0,), (2, 0, 3)]:
        tensor, check = guarded(shape, torch.float32)
        assert tensor.shape == shape
        check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_each_element_holds_its_own_address(dtype):
    tensor = address_valued((2, 5), dtype, start=300)
    assert (tensor.shape, tensor.dtype, tensor.is_contiguous()) == ((2, 5), dtype, True)
    raw = tensor.view(torch.uint8).reshape(10, -1).tolist()
    bits = 1 if dtype == torch.bool else 8 * dtype.itemsize
    for i, element in enumerate(raw):
        assert int.from_bytes(bytes(element), "little") == (300 + i) % 2**bits


def test_swapped_elements_of_address_valued_tensors_are_seen():
    tensor = address_valued((100,), torch.bfloat16)
    swapped = tensor.clone()
    swapped[7], swapped[8] = tensor[8], tensor[7]
    with pytest.raises(AssertionError, match=r"2 of 100 elements differ; first at \[7\]"):
        assert_bytes_equal(swapped, tensor)
