"""Tests of adding an operation: with one function and its entry of ``OPERATIONS``, rules, plans and loads support it.

The toy is an operation that transformers does not have: it rolls the rows of a matrix by a number in the model's
config.
"""

import pytest
import torch
from safetensors.torch import save_file

pytest.importorskip("transformers", reason="the rules are objects of its classes")

from transformers import core_model_loading as upstream

import automodel_conv as amc
from automodel_conv.errors import NameProblems
from automodel_conv.planning.operations import OPERATIONS, OperationSpec
from automodel_conv.planning.values import concatenate, narrow

SOURCE = """
class RollRows(ConversionOps):
    def __init__(self, by):
        self.by = by

    def convert(self, input_dict, source_patterns, target_patterns, **_):
        ((_, tensors),) = input_dict.items()
        tensor = tensors[0] if isinstance(tensors, list) else tensors
        return {target_patterns[0]: torch.roll(tensor, self.by, 0)}

    @property
    def reverse_op(self):
        return RollRows(-self.by)
"""
# As if the installed release had it: only operations of transformers are trusted to do what their name implies.
LATER = {**vars(upstream)}
exec(compile(SOURCE, upstream.__file__, "exec"), LATER)
RollRows = LATER["RollRows"]


def roll_rows(inputs, context, by):
    """Everything that has to be written for the operation."""
    (values,) = inputs.values()
    value = values[0] if isinstance(values, list) else values
    rows = value.shape[0]
    start = -by % rows if rows else 0
    parts = narrow(value, 0, start, rows - start), narrow(value, 0, 0, start)
    return {context.target_patterns[0]: concatenate(parts, 0)}


@pytest.fixture
def known(monkeypatch):
    monkeypatch.setitem(OPERATIONS, "RollRows", OperationSpec(roll_rows, ("by",)))


def rules(by):
    return [upstream.WeightConverter("stored", "rolled", operations=[RollRows(by)])]


@pytest.fixture
def published(tmp_path):
    shapes = [(5, 3), (1, 4), (4, 4), (6, 1), (2, 0)]
    tensors = {
        f"stored.{n}.weight": torch.arange(rows * columns, dtype=torch.float32).reshape(rows, columns)
        for n, (rows, columns) in enumerate(shapes)
    }
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path, tensors


def rolled(tensors, by):
    return {
        name.replace("stored", "rolled"): torch.tensor(
            [tensor[(r - by) % len(tensor)].tolist() for r in range(len(tensor))]
        ).reshape(tensor.shape)
        for name, tensor in tensors.items()
    }


@pytest.mark.parametrize("by", [0, 1, -2, 7])
def test_it_is_planned_as_copies_and_equals_transformers(known, published, by):
    directory, tensors = published
    plan = amc.compile_plan(directory, rules=rules(by))
    assert plan.fallbacks == ()
    actual = amc.load_state_dict(directory, rules=rules(by))
    expected = rolled(tensors, by)
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name
        stored = {"s": [tensors[name.replace("rolled", "stored")]]}
        assert torch.equal(actual[name], RollRows(by).convert(stored, ["s"], ["t"])["t"]), name


def test_it_goes_back_by_its_own_reverse(known, published, tmp_path):
    directory, tensors = published
    actual = amc.load_state_dict(directory, rules=rules(2))
    back = amc.revert_state_dict(actual, rules=rules(2))
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(back[name], tensor), name


def test_without_its_entry_only_transformers_can_run_it(published):
    directory, _ = published
    with pytest.raises(NameProblems, match="RollRows is not a stock operation"):
        amc.compile_plan(directory, rules=rules(1))
