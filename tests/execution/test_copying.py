"""Tests of batches of copies between tensors in memory: one call per geometry, each copy to its own place."""

import pytest
import torch

from automodel_conv.execution import copying
from automodel_conv.execution.copying import copy_equal
from automodel_conv.planning.boxes import Box, run_of
from automodel_conv.schedule.jobs import Copies

TRANSPOSED = Box((3, 2), (1, 3), (2, 1))  # the source is [2, 3]


@pytest.fixture
def calls(monkeypatch):
    """Record the number of copies in each call."""
    seen, stock = [], copying.strided_copy_torch
    monkeypatch.setattr(copying, "strided_copy_torch", lambda dst, src: (seen.append(len(dst)), stock(dst, src)))
    return seen


def test_each_copy_goes_to_its_own_place_and_nothing_else_is_written(calls):
    source, target = torch.arange(24.0), torch.full((30,), -1.0)
    copy_equal([(Copies(0, "F32", TRANSPOSED, [0, 12], [20, 4]), source, target)])
    wanted = torch.full((30,), -1.0)
    wanted[20:26] = torch.arange(0.0, 6.0).reshape(2, 3).t().reshape(-1)
    wanted[4:10] = torch.arange(12.0, 18.0).reshape(2, 3).t().reshape(-1)
    assert torch.equal(target, wanted)
    assert calls == [2]


def test_offsets_count_from_the_first_element_of_a_view():
    source, target = torch.arange(10.0)[4:], torch.zeros(10)[5:]
    copy_equal([(Copies(0, "F32", run_of(2), [1], [3]), source, target)])
    assert target.tolist() == [0, 0, 0, 5, 6]


def test_equal_geometry_of_several_tensors_is_one_call_and_other_dtypes_are_another(calls):
    a, b, out, narrow = torch.arange(4.0), torch.arange(4.0) + 10, torch.zeros(4), torch.zeros(4, dtype=torch.bfloat16)
    copy_equal(
        [
            (Copies(0, "F32", run_of(2), [0], [2]), a, out),
            (Copies(1, "F32", run_of(2), [2], [1]), b, narrow),
            (Copies(0, "F32", run_of(2), [1], [0]), b, out),
            (Copies(1, "F32", run_of(1), [3], [3]), a, narrow),
        ]
    )
    assert out.tolist() == [11, 12, 0, 1]
    assert narrow.tolist() == [0, 12, 13, 3]
    assert sorted(calls) == [1, 1, 2]


def test_nothing_to_copy_makes_no_call(calls):
    copy_equal([])
    copy_equal([(Copies(0, "F32", run_of(2), [], []), torch.ones(2), torch.zeros(2))])
    assert sum(calls) == 0
