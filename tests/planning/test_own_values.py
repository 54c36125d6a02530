"""Tests of values that loading code makes itself: indices on the device of the weights choose what they choose."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from automodel_conv.loading_code.dry_run import traced
from automodel_conv.planning.copies import SourceTable
from automodel_conv.planning.own_values import keeping_values
from tests.planning.element_maps import origins

SHAPE = (3, 4, 2)


def trace_of(convert):
    """Return the trace of a function of one tensor; it may not need the values of this tensor."""

    def read(rows):
        assert not rows, "values are read"
        return []

    return traced(
        lambda tensors: {"result": convert(tensors["a"])}, SourceTable(["a"], ["I64"], [SHAPE]), None, "dict", read
    )


def put(a, index):
    result = torch.empty_like(a)
    result[index] = a
    return result


CHOICES = {
    "list": lambda a: a[:, [3, 0]],
    "first list": lambda a: a[[2, 0]],
    "list of one": lambda a: a[[1]],
    "empty list": lambda a: a[:, []],
    "negative numbers": lambda a: a[:, [-1, 0, -2]],
    "tuple of a dimension": lambda a: a[:, (3, 0)],
    "numbers of dimensions": lambda a: a[(2, 3)],
    "mask": lambda a: a[[True, False, True]],
    "array": lambda a: a[:, np.array([1, 3])],
    "mask in an array": lambda a: a[:, np.array([True, False, False, True])],
    "after an ellipsis": lambda a: a[..., [1, 0]],
    "put": lambda a: put(a, (slice(None), [2, 0, 3, 1])),
    "put by a tuple": lambda a: put(a, [2, 0, 1]),
    "tensor": lambda a: a[torch.tensor([2, 0], device=a.device)],
    "array as a tensor": lambda a: a[torch.as_tensor(np.array([2, 0]), device=a.device)],
    "range": lambda a: a[torch.arange(2, device=a.device)],
    "computed range": lambda a: a[2 - torch.arange(3, device=a.device).flip(0) * 2 % 3],
    "new tensor": lambda a: a[a.new_tensor([2, 0])],
    "new tensor there": lambda a: a[a.new_tensor([2, 0], device=a.device)],
    "moved": lambda a: a[torch.tensor([2, 0]).to(a.device)],
    "moved and cast": lambda a: a[torch.tensor([2, 0], dtype=torch.int32).to(device=a.device, dtype=torch.int64)],
    "moved to another": lambda a: a[torch.tensor([2, 0], dtype=torch.int32).to(a)],
    "argsort": lambda a: a[:, torch.argsort(torch.tensor([2, 0, 3, 1], device=a.device))],
    "index_select": lambda a: a.index_select(1, torch.tensor([3, 0], device=a.device)),
    "itself": lambda a: torch.as_tensor(a, device=a.device).to(a.device).to(a),
}


@pytest.mark.parametrize("choice", CHOICES.values(), ids=CHOICES.keys())
def test_choice_of_elements_is_a_copy(choice):
    trace = trace_of(choice)
    assert (trace.computed, trace.values_read) == ({}, frozenset())
    expected = choice(torch.arange(24).view(SHAPE))
    target = trace.plan.target("result")
    assert target.shape == expected.shape
    assert origins(target)["element"].tolist() == expected.flatten().tolist()


@pytest.mark.parametrize(
    "compute",
    [lambda a: a[[0, 2], [3, 1]], lambda a: torch.tensor([1.5, 2.5], device=a.device)[a % 2]],
    ids=["two dimensions", "table"],
)
def test_other_choices_are_computed_without_values(compute):
    trace = trace_of(compute)
    assert trace.computed["result"].rows == {0}
    assert trace.changes.made["result"].shape == compute(torch.arange(24).view(SHAPE)).shape


def test_constant_on_the_device_of_the_weights_stays_a_constant():
    plan = trace_of(lambda a: torch.full((2,), 3, device=a.device)).plan
    assert [fill.value for fill in plan.target("result").fills] == [3]


def test_functions_of_tensors_with_data_keep_their_arguments():
    tensor = torch.tensor([1])
    for func, args in [(torch.Tensor.__getitem__, (tensor, [0])), (torch.zeros, (3,)), (torch.Tensor.add, (tensor, 1))]:
        assert keeping_values(func, args, {}, lambda tensor: True) == (args, {})
