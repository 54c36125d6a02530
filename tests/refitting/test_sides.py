"""Tests of the tensors of both modules of a rank: changes after the plan are named."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from automodel_conv.errors import UnsupportedError
from automodel_conv.refitting.sides import RankTensors, Sides, refuse_changes
from tests.refitting.support import zeros

SHAPES = {"a": (2, 3), "b": (4,)}


def sides(trainer=None, engine=None):
    names = tuple(SHAPES)
    return Sides(
        trainer,
        engine,
        None,
        names if trainer is not None else (),
        names if engine is not None else (),
        ("b",) * bool(engine),
    )


def test_tensors_are_those_that_the_modules_have_now():
    trainer, engine = zeros(SHAPES), zeros(SHAPES)
    both = sides(trainer, engine)
    first = both.tensors()
    assert first.sent.keys() == {"a", "b"}
    assert first.filled.keys() == {"b"}
    assert first.places == both.tensors().places
    trainer.a.data = torch.zeros(2, 3)
    again = both.tensors()
    assert again.sent["a"].data_ptr() == trainer.a.data_ptr()
    assert again.places != first.places
    refuse_changes(first.specs, again)


def test_strides_are_part_of_a_place():
    trainer = zeros({"a": (3, 3), "b": (4,)})
    before = sides(trainer).tensors().places
    trainer.a.data = trainer.a.data.t()
    assert sides(trainer).tensors().places != before


@pytest.mark.parametrize("side", ["trainer", "engine"])
def test_tensor_that_is_gone_or_new_is_named(side):
    made = zeros(SHAPES)
    both = sides(**{side: made})
    made.c = nn.Parameter(torch.zeros(1))
    del made.b
    with pytest.raises(UnsupportedError, match=r"(?s)have changed since.*b is gone.*c is new.*construct a new Refit"):
        both.tensors()


@pytest.mark.parametrize(
    ("now", "text"),
    [
        (torch.zeros(3, 2), r"a: torch.float32 \[3, 2\] on cpu instead of torch.float32 \[2, 3\] on cpu"),
        (torch.zeros(2, 3).double(), r"a: torch.float64 \[2, 3\] on cpu instead of torch.float32 \[2, 3\] on cpu"),
    ],
)
def test_other_shape_or_dtype_is_named(now, text):
    planned = RankTensors({"a": torch.zeros(2, 3)}, {"a": torch.zeros(1)}).specs
    with pytest.raises(UnsupportedError, match=text):
        refuse_changes(planned, RankTensors({"a": now}, {"a": torch.zeros(1)}))
    refuse_changes(planned, RankTensors({"a": torch.ones(3, 2).t()}, {"a": torch.ones(1)}))


def test_rank_without_modules_has_nothing():
    assert Sides(None, None, None, (), (), ()).tensors() == RankTensors({}, {})
