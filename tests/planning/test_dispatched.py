"""Tests of dispatched operations: what they write to, return and need is known without running them."""

from __future__ import annotations

import pytest
import torch

from automodel_conv.planning.dispatched import (
    elementwise,
    is_composite,
    mutated_by,
    needs_values,
    on_meta,
    returned_by,
    tensors_in,
)

aten = torch.ops.aten


def test_tensors_are_found_in_arguments():
    first, second = torch.zeros(1), torch.zeros(2)
    assert tensors_in((([first], 3), {"out": second, "dim": None})) == [first, second]


def test_arguments_that_are_written_to_are_known():
    first, second = torch.zeros(1), torch.zeros(1)
    assert mutated_by(torch.ops.aten.add_.Tensor, (first, second), {}) == [first]
    assert mutated_by(torch.ops.aten.add.out, (first, first), {"out": second}) == [second]
    assert mutated_by(torch.ops.aten.add.Tensor, (first, second), {}) == []


def test_operation_returns_what_it_writes_to():
    first, second = torch.zeros(1), torch.zeros(1)
    assert returned_by(aten.add_.Tensor, [first]) is first
    assert returned_by(aten._foreach_copy_.default, [first, second]) is None
    assert returned_by(aten.sort.values, [first, second]) == (first, second)


@pytest.mark.parametrize(
    ("func", "args", "needed"),
    [
        (aten.index.Tensor, (torch.zeros(3), [torch.tensor([True, False, True])]), True),
        (aten.index.Tensor, (torch.zeros(3), [None, torch.tensor([0])]), False),
        (aten.nonzero.default, (torch.zeros(3),), True),
        (aten._local_scalar_dense.default, (torch.zeros(1),), True),
        (aten.add.Tensor, (torch.zeros(1), torch.zeros(1)), False),
    ],
)
def test_operations_whose_shapes_or_numbers_are_values_need_them(func, args, needed):
    assert needs_values(func, args) == needed


def test_operations_are_composite_in_inference_mode_only():
    assert not is_composite(aten.reshape.default)
    with torch.inference_mode():
        assert is_composite(aten.reshape.default)
        assert not is_composite(aten.copy_.default)


def test_tensor_without_data_has_the_same_form():
    tensor = torch.zeros(4, 3, dtype=torch.float16).t()
    made = on_meta(tensor)
    assert (made.device.type, made.shape, made.dtype, made.stride()) == ("meta", (3, 4), torch.float16, (1, 3))
    assert on_meta(made) is made


def test_result_of_an_elementwise_operation_has_its_form():
    half, wide = torch.empty(3, 1, dtype=torch.float16, device="meta"), torch.empty(4, device="meta")
    made = elementwise(aten.add.Tensor, (half, wide), {})
    assert (made.device.type, made.shape, made.dtype) == ("meta", (3, 4), torch.float32)
    assert elementwise(aten.add.Tensor, (half.expand(3, 4), wide), {}) is None
    assert elementwise(aten.cat.default, ([half, half],), {}) is None
