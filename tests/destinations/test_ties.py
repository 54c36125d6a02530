"""Tests of names that share a tensor: tied after a load, and compared byte by byte if both were loaded."""

import pytest
import torch

from automodel_conv.destinations.ties import in_order, same_bytes, unequal_ties, with_tied


def tensors(**values):
    return {name: torch.tensor(value) for name, value in values.items()}


def test_names_of_a_group_share_the_first_tensor_that_was_loaded():
    loaded = tensors(b=[1.0], other=[2.0])
    tied = with_tied(loaded, [("a", "b", "c")], [])
    assert tied.keys() == {"a", "b", "c", "other"}
    assert tied["a"] is tied["b"] is tied["c"] is loaded["b"]
    assert tied["other"] is loaded["other"]
    assert loaded.keys() == {"b", "other"}


def test_group_without_loaded_names_is_left_out():
    assert with_tied({}, [("a", "b"), ()], []) == {}


def test_different_values_are_named_with_the_first_of_their_group():
    loaded = tensors(a=[1.0, 2.0], b=[1.0, 2.0], c=[1.0, 3.0], d=[4.0])
    assert unequal_ties(loaded, [("a", "b", "c", "absent"), ("d",), ("gone", "d")]) == {("c", "a")}


def test_name_that_is_unequal_keeps_its_own_tensor():
    loaded = tensors(a=[1.0], b=[2.0], c=[1.0])
    tied = with_tied(loaded, [("a", "b", "c")], {("b", "a")})
    assert tied["b"] is loaded["b"]
    assert tied["c"] is loaded["a"]


def test_tensors_are_in_the_order_of_the_model_and_others_follow():
    ordered = in_order(tensors(x=1, c=2, a=3, y=4), ["a", "b", "c"])
    assert list(ordered) == ["a", "c", "x", "y"]
    assert ordered["a"] == 3


NAN, OTHER_NAN = (torch.tensor([bits], dtype=torch.int32).view(torch.float32) for bits in (0x7FC00000, 0x7FC00001))


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        (torch.ones(2, 3), torch.ones(3, 2).t(), True),
        (torch.ones(2, 3), torch.ones(3, 2), False),
        (torch.ones(2), torch.ones(2, dtype=torch.float64), False),
        (torch.zeros(1), -torch.zeros(1), False),
        (NAN, NAN.clone(), True),
        (NAN, OTHER_NAN, False),
        (torch.empty(0, 3), torch.empty(0, 3), True),
        (torch.tensor(1.0), torch.tensor(1.0), True),
        (torch.tensor([1, 2]), torch.tensor([1, 3]), False),
    ],
    ids=["strides", "shape", "dtype", "negative zero", "NaN", "two NaNs", "empty", "scalars", "values"],
)
def test_tensors_are_the_same_if_shape_dtype_and_bytes_are(a, b, same):
    assert same_bytes(a, b) == same_bytes(b, a) == same
    assert same_bytes(a, a)
