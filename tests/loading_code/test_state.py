"""Tests of digests of state: what code can see of objects counts, and nothing else."""

from __future__ import annotations

import functools
import re
import subprocess
import sys
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from automodel_conv.loading_code.state import state_digest, state_lines


class Kind(Enum):
    ONE = 1
    TWO = 2


@dataclass
class Settings:
    rank: int = 0


class Slotted:
    __slots__ = ("rank",)

    def __init__(self, rank):
        self.rank = rank

    def method(self):
        return self.rank


def closure(value):
    return lambda tensor, default=1: (tensor, value, default)


def module(**attributes):
    made = nn.Linear(2, 3)
    made.__dict__.update(attributes)
    return made


def with_attribute(value):
    made = module()
    made.weight.loader = value
    return made


def cyclic(value):
    made = {"value": value}
    made["self"] = made
    return made


DIFFERENT = [
    (0, 1),
    (0, False),
    (1, 1.0),
    ("1", 1),
    (None, 0),
    ([1, 2], [2, 1]),
    ([1], (1,)),
    ([[1], [2]], [[1, 2]]),
    ([], {}),
    ({"a": 1}, {"a": 2}),
    ({"a": 1}, {"b": 1}),
    ({1, 2}, {1, 3}),
    (torch.float16, torch.bfloat16),
    (torch.device("cpu"), torch.device("meta")),
    (Kind.ONE, Kind.TWO),
    ({Kind.ONE}, {Kind.TWO}),
    ({(1, 2)}, {(1, 3)}),
    (re.compile("a"), re.compile("b")),
    (re.compile("a"), re.compile("a", re.IGNORECASE)),
    ({re.compile("a"): 1}, {re.compile("b"): 1}),
    (range(3), range(4)),
    (slice(0, 3), slice(0, 4)),
    (Path("a"), Path("b")),
    (np.array([1, 2]), np.array([1, 3])),
    (np.array([1, 2]), np.array([1, 2], dtype=np.int32)),
    (np.float32(1), np.float32(2)),
    (Settings(0), Settings(1)),
    (Settings(0), SimpleNamespace(rank=0)),
    (Slotted(0), Slotted(1)),
    (Slotted(0).method, Slotted(1).method),
    (Slotted, Settings),
    (closure(1), closure(2)),
    (functools.partial(closure, 1), functools.partial(closure, 2)),
    (functools.partial(closure, value=1), functools.partial(closure, value=2)),
    (print, len),
    (cyclic(1), cyclic(2)),
    (torch.tensor([1, 2]), torch.tensor([1, 3])),
    (torch.tensor([1, 2]), torch.tensor([1.0, 2.0])),
    (torch.tensor([0.0]), torch.tensor([-0.0])),
    (torch.tensor([1, 2]), torch.tensor([[1, 2]])),
    (torch.zeros(2, device="meta"), torch.zeros(2)),
    (module(tp_rank=0), module(tp_rank=1)),
    (module(expert_map=torch.tensor([0, -1])), module(expert_map=torch.tensor([-1, 0]))),
    (module(settings={"a": [Settings(0)]}), module(settings={"a": [Settings(1)]})),
    (with_attribute(1), with_attribute(2)),
    (with_attribute(Slotted(0).method), with_attribute(Slotted(1).method)),
]


@pytest.mark.parametrize(("one", "other"), DIFFERENT)
def test_digest_differs(one, other):
    assert state_digest([one]) == state_digest([one])
    assert state_digest([one]) != state_digest([other])
    assert state_digest([SimpleNamespace(deep=[one])]) != state_digest([SimpleNamespace(deep=[other])])


@pytest.mark.parametrize(
    "make",
    [
        lambda: {"c", "a", "b"},
        lambda: module(),
        lambda: torch.empty(0),
        lambda: torch.ones(2, 3).t(),
        lambda: torch.ones(2, dtype=torch.float8_e4m3fn),
        lambda: cyclic(1),
        lambda: closure(Settings()),
        lambda: object(),
        lambda: torch.Generator(),
        lambda: iter([]),
        lambda: sys,
    ],
)
def test_objects_that_are_alike_have_one_digest(make):
    assert state_digest([make()]) == state_digest([make()])


def test_elements_of_parameters_and_buffers_do_not_count():
    one, other = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
    nn.init.ones_(other.bias)
    other.running_mean.fill_(5)
    assert state_digest([one]) == state_digest([other])
    other.plain = torch.ones(2)
    assert state_digest([one]) != state_digest([other])


def test_skipped_attributes_do_not_count():
    one, other = module(id=1, rank=0), module(id=2, rank=0)
    assert state_digest([one]) != state_digest([other])
    assert state_digest([one], skipped=["id"]) == state_digest([other], skipped=["id"])


def test_an_object_that_is_there_twice_is_not_two():
    one = Settings()
    assert state_digest([[one, one]]) != state_digest([[Settings(), Settings()]])


def test_deep_objects_are_described():
    deep: list = []
    for _ in range(20_000):
        deep = [deep]
    assert len(list(state_lines([deep]))) == 20_002


def named(names):
    return {"names": set(names), "map": torch.tensor([1]), "function": closure(Settings())}


def test_digest_is_the_same_in_another_process():
    code = "from tests.loading_code.test_state import *; print(state_digest([named('dcba')]))"
    found = subprocess.check_output([sys.executable, "-c", code], text=True)
    assert found.strip() == state_digest([named("abcd")])
