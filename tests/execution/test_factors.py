"""Tests of reading and keeping the matrices of adapters."""

import itertools
import random

import pytest
import torch

from automodel_conv.execution import factors as factors_module
from automodel_conv.execution.factors import Factors, most_at_once
from automodel_conv.planning.deltas import Delta
from tests.execution.held import Held


def test_factors_are_read_once_while_they_fit(monkeypatch):
    held = Held(*(torch.ones(1, 1000) for _ in range(3)), *(torch.ones(1, 1) for _ in range(3)))
    deltas = [Delta(str(i), 0, (1, 1, 1000), i, 3 + i, 1) for i in range(3)]
    factors = Factors([held], deltas)
    for number in (0, 1, 2, 0):
        factors.of(number)
    assert held.reads == [[0, 3], [1, 4], [2, 5]]
    monkeypatch.setattr(factors_module, "KEPT_BYTES", 9000)
    factors = Factors([held], deltas)
    held.reads.clear()
    for number in (0, 1, 0, 2, 0, 1):  # the one that was not used longest makes room
        factors.of(number)
    assert held.reads == [[0, 3], [1, 4], [2, 5], [1, 4]]
    monkeypatch.setattr(factors_module, "KEPT_BYTES", 10)
    assert factors.of(2)[0].shape == (1, 1, 1000)  # larger than the limit, and returned all the same


def test_factors_that_are_needed_in_turns_are_read_once(monkeypatch):
    monkeypatch.setattr(factors_module, "KEPT_BYTES", 10)
    held = Held(*(torch.ones(1, 1000) for _ in range(3)), *(torch.ones(1, 1) for _ in range(3)))
    deltas = [Delta(str(i), 0, (1, 1, 1000), i, 3 + i, 1) for i in range(3)]
    uses = [[0, 1], [1], [0], [2], [2]]
    factors = Factors([held], deltas, uses)
    for numbers in uses:
        for number in numbers:
            factors.of(number)
    assert held.reads == [[0, 3], [1, 4], [2, 5]]
    assert factors.kept_bytes == 10 + 2 * 4004  # 0 and 1 together, without 2


def test_most_bytes_at_once_count_from_first_to_last_near_use():
    sizes = [1, 10, 100, 1000]
    assert most_at_once([[0], [1], [0, 2], [3]], sizes.__getitem__) == 1000
    assert most_at_once([[0], [1], [0, 2], [3, 1]], sizes.__getitem__) == 1010
    assert most_at_once([[0, 1, 2], [3]], sizes.__getitem__) == 1000
    assert most_at_once([], sizes.__getitem__) == 0
    between = [[1]] * factors_module._NEAR
    assert most_at_once([[0], *between[1:], [0]], sizes.__getitem__) == 11
    assert most_at_once([[0], *between, [0]], sizes.__getitem__) == 10


def test_factors_state_dtypes_and_shapes_of_the_file():
    held = Held(torch.ones(2, 3, dtype=torch.bfloat16), torch.ones(4, 2), torch.ones(5, 6, dtype=torch.float16))
    factors = Factors([held], [Delta("m", 0, (2, 4, 3), 0, 1, 1), Delta("w", 0, (1, 5, 6), 2, None)])
    assert (factors.dtypes(0), factors.dtypes(1)) == (("BF16", "F32"), ("F16", "F16"))
    assert (factors.stored_shape(0), factors.stored_shape(1)) == ((2, 3), (5, 6))
    assert [tensor.shape for tensor in factors.of(0)] == [(2, 1, 3), (2, 4, 1)]
    assert factors.of(1)[1] is None


@pytest.mark.parametrize("near", [0, 1, 2, 5])
def test_factors_are_kept_between_uses_that_are_near(monkeypatch, near):
    """Count the bytes of each step by itself: an item is there from one use to the next one, if that is near."""
    monkeypatch.setattr(factors_module, "_NEAR", near)
    rng = random.Random(near)
    for _ in range(50):
        uses = [rng.sample(range(5), rng.randint(0, 3)) for _ in range(rng.randint(1, 12))]
        needed = [0] * len(uses)
        for item in range(5):
            steps = [step for step, items in enumerate(uses) if item in items]
            there = set(steps)
            for before, after in itertools.pairwise(steps):
                there |= {*range(before, after)} if after - before <= near else set()
            for step in there:
                needed[step] += 10**item
        assert most_at_once(uses, lambda item: 10**item) == max(needed)
    assert most_at_once([], len) == 0


def test_factors_of_a_layer_are_kept_however_large_they_are(monkeypatch):
    monkeypatch.setattr(factors_module, "KEPT_BYTES", 0)
    held = Held(*(torch.ones(1, 1000) for _ in range(3)), *(torch.ones(1, 1) for _ in range(3)))
    deltas = [Delta(str(i), 0, (1, 1, 1000), i, 3 + i, 1) for i in range(3)]
    factors = Factors([held], deltas, [(0, 1), (0, 1), (2,)])
    for number in (0, 1, 0, 1, 2):
        factors.of(number)
    assert held.reads == [[0, 3], [1, 4], [2, 5]]
