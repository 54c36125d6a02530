"""Tests of calls of loading code: what it is called with, and what it may return."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from automodel_conv import UnsupportedError
from automodel_conv.loading_code.calling import call, returned

GIVEN = {"a": torch.zeros(2), "b": torch.ones(3)}


def test_pairs_are_an_iterator():
    def load(pairs):
        return next(pairs), list(pairs)

    first, rest = call(load, GIVEN.items(), "pairs")
    assert first[0] == "a"
    assert [name for name, _ in rest] == ["b"]


def test_dict_belongs_to_the_code():
    def load(given):
        return given.pop("a"), list(given)

    assert call(load, GIVEN.items(), "dict") == (GIVEN["a"], ["b"])
    assert list(GIVEN) == ["a", "b"]


def test_generators_run_to_their_end():
    def load(pairs):
        for name, _ in pairs:
            seen.append(name)
            yield name

    seen = []
    assert call(load, GIVEN.items(), "pairs") == seen == ["a", "b"]


@pytest.mark.parametrize("result", [GIVEN, list(GIVEN.items()), iter(GIVEN.items()), tuple(GIVEN.items())])
def test_dicts_and_pairs_of_tensors_are_results(result):
    assert returned(result) == GIVEN


@pytest.mark.parametrize(
    ("result", "found"),
    [
        (None, "None"),
        ({}, "dict"),
        ([], "list"),
        ({"a": 1}, "dict"),
        ({1: torch.zeros(2)}, "dict"),
        ({"a", "b"}, "set"),
        (torch.zeros(2, 2), "Tensor"),
        (3, "int"),
        (nn.Linear(2, 2), "Linear"),
    ],
)
def test_other_results_are_refused(result, found):
    with pytest.raises(UnsupportedError, match="must return its tensors") as error:
        returned(result)
    assert found in str(error.value)
    assert "targets=" in str(error.value)
