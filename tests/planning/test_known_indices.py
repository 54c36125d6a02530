"""Tests of known indices: the views that they become have the elements that torch takes by these indices."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from automodel_conv.planning.known_indices import known_indices, runs_of, without_known_masks

ROWS = torch.arange(24).reshape(6, 4)


def has_data(tensor):
    return not tensor.is_meta


@given(st.lists(st.integers(0, 5)))
def test_runs_have_the_elements_of_the_indices_in_order(indices):
    runs = runs_of(indices)
    expected = ROWS[torch.tensor(indices, dtype=torch.long)]
    assert torch.equal(torch.cat([torch.empty(0, 4, dtype=torch.long), *(run.of(ROWS, 0) for run in runs)]), expected)
    starts = [0, *(run.start + run.count for run in runs)]
    assert starts == [*(run.start for run in runs), len(indices)]


@pytest.mark.parametrize(
    ("indices", "count"), [([], 0), ([3], 1), ([1, 2, 3], 1), ([0, 2, 4], 1), ([0, 1, 4, 5], 2), ([2, 1, 0], 3)]
)
def test_runs_are_few(indices, count):
    assert len(runs_of(indices)) == count


@pytest.mark.parametrize(
    ("index", "taken"),
    [
        (torch.tensor([3, -1]), [3, 5]),
        (torch.tensor([[0, 1], [2, 3]]), [0, 1, 2, 3]),
        (torch.tensor(2), [2]),
        (torch.tensor([True, False, False, True, False, False]), [0, 3]),
        (torch.tensor([0, 1, 0, 0, 0, 1], dtype=torch.uint8), [1, 5]),
    ],
)
def test_numbers_and_masks_are_known(index, taken):
    known = known_indices(ROWS, [index], has_data)
    assert known.dim == 0
    assert torch.cat([run.of(ROWS, 0) for run in known.runs])[:, 0].tolist() == [4 * row for row in taken]
    assert known.shape == (index.shape if index.dtype == torch.long else (2,))


@pytest.mark.parametrize(
    "indices",
    [
        [torch.tensor([0]), torch.tensor([0])],
        [torch.zeros(6, 4, dtype=torch.bool)],
        [torch.empty(2, dtype=torch.long, device="meta")],
        [torch.tensor([0.0])],
        [None, None],
    ],
    ids=["two dimensions", "mask of two dimensions", "no values", "floats", "none"],
)
def test_other_indices_are_not_known(indices):
    assert known_indices(ROWS, indices, has_data) is None


def test_many_scattered_indices_are_not_known():
    index = torch.arange(12000).reshape(-1, 3).flip(1).flatten()
    assert known_indices(torch.zeros(12000), [index], has_data) is None


@pytest.mark.parametrize("index", [[6], [-7], [0, 6], [-7, 0]])
def test_index_out_of_bounds_is_the_error_of_torch(index):
    with pytest.raises(IndexError) as expected:
        ROWS[torch.tensor(index)]
    with pytest.raises(IndexError) as error:
        known_indices(ROWS, [torch.tensor(index)], has_data)
    assert str(error.value) == str(expected.value)


def test_masks_with_values_become_numbers():
    mask = torch.tensor([[True, False], [True, True]])
    rows, columns, rest = without_known_masks([mask, None], has_data)
    assert (rows.tolist(), columns.tolist(), rest) == ([0, 1, 1], [0, 0, 1], None)


def test_other_indices_stay_as_they_are():
    indices = [torch.tensor([1]), None, torch.empty(2, dtype=torch.bool, device="meta")]
    kept = without_known_masks(indices, has_data)
    assert all(one is other for one, other in zip(kept, indices, strict=True))


@pytest.mark.parametrize("length", [0, 2, 7])
def test_mask_of_another_length_is_an_error_as_in_torch(length):
    mask = torch.zeros(length, dtype=torch.bool)
    for take in (lambda: ROWS[mask], lambda: known_indices(ROWS, [mask], has_data)):
        with pytest.raises(IndexError):
            take()
