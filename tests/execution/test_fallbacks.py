"""Tests of targets that transformers' own code computes: one call for all of them, and invalid results."""

import pytest
import torch

from automodel_conv.errors import ConversionError
from automodel_conv.execution.fallbacks import FallbackCall, fallback_calls, run_fallback
from automodel_conv.planning.copies import Fallback, SourceTable, Target
from automodel_conv.planning.plan import CopyPlan

SOURCES = SourceTable(["a", "b"], ["F32", "F32"], [(2,), (2,)])


def made_by(fallback, name, *rows, dtype="F32", shape=(2,)):
    return Target(name, dtype, shape, -1, rows, (), fallback)


def run(convert, buffers, *targets):
    fallback = Fallback("a test", convert)
    targets = [target._replace(fallback=fallback) for target in targets] or [made_by(fallback, "t", 0)]
    run_fallback(FallbackCall(fallback, (0,), tuple(targets)), {0: torch.arange(2.0)}, buffers)


def test_targets_of_one_fallback_are_one_call_with_each_source_once():
    first, second = Fallback("a", dict), Fallback("b", dict)
    plan = CopyPlan(
        SOURCES,
        (
            made_by(first, "x", 1, 0),
            made_by(None, "copied", 0),
            made_by(second, "y", 0),
            made_by(first, "z", 0, 1),
        ),
    )
    calls = fallback_calls(plan)
    assert [(call.rows, [t.name for t in call.targets]) for call in calls] == [((1, 0), ["x", "z"]), ((0,), ["y"])]
    assert calls[0].fallback is first


def test_results_are_copied_and_cast_to_floating_targets_without_a_graph():
    buffers = {"t": torch.zeros(2), "narrow": torch.zeros(2, dtype=torch.bfloat16, requires_grad=True)}
    targets = made_by(None, "t", 0), made_by(None, "narrow", 0, dtype="BF16")
    run(lambda sources: {"t": sources[0] + 1, "narrow": sources[0] + 2, "more": 3}, buffers, *targets)
    assert buffers["t"].tolist() == [1, 2]
    assert buffers["narrow"].tolist() == [2, 3]
    assert buffers["narrow"].grad_fn is None


@pytest.mark.parametrize(
    ("result", "words"),
    [
        ({}, "did not return t"),
        ({"t": [1, 2]}, "did not return t"),
        ({"t": torch.ones(3)}, r"returned t with a wrong.*F32 \[2\].*F32 \[3\]"),
        ({"t": torch.ones(2, dtype=torch.int32)}, r"returned t with a wrong.*I32"),
    ],
    ids=["nothing", "no tensor", "shape", "dtype"],
)
def test_anything_else_is_an_error_that_names_the_target(result, words):
    buffers = {"t": torch.zeros(2)}
    with pytest.raises(ConversionError, match=f"(?s){words}"):
        run(lambda sources: result, buffers)
    assert buffers["t"].tolist() == [0, 0]


def test_error_of_its_code_names_all_targets_and_is_the_cause():
    def fail(sources):
        raise KeyError("odd")

    with pytest.raises(ConversionError, match=r"(?s)failed on t, u.*KeyError\('odd'\)") as caught:
        run(fail, {"t": torch.zeros(2)}, made_by(None, "t", 0), made_by(None, "u", 0))
    assert isinstance(caught.value.__cause__, KeyError)
