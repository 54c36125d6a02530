"""Tests of the arithmetic of strided copies in a page, against loops over all elements."""

from __future__ import annotations

import itertools
import random

import pytest

from tests.pictures.explaining import explanations
from tests.planning.plans import (
    ALTERNATE,
    JOIN,
    MERGE,
    SWAP,
    experts_plan,
    plan_of,
    table,
    targets_of,
    transposing_plan,
)

STEPS = """
(cases) => cases.map(([shape, strides, most]) =>
  Array.from({ length: most }, (_, distance) => stepsTo(distance, walkOf(shape, strides))))
"""


def random_walk(rng):
    """Return a shape with strides in any order, which may overlap, repeat and be zero."""
    shape = [rng.randint(1, 4) for _ in range(rng.randint(0, 4))]
    return shape, [rng.randint(0, 9) for _ in shape]


def test_steps_to_a_distance_are_found_wherever_there_are_some(show):
    rng = random.Random(0)
    cases = [([2, 3], [3, 2]), *(random_walk(rng) for _ in range(300))]
    found = show(experts_plan()).evaluate(STEPS, [[*case, 80] for case in cases])
    for (shape, strides), answers in zip(cases, found, strict=True):
        reached = {
            sum(step * stride for step, stride in zip(steps, strides, strict=True))
            for steps in itertools.product(*map(range, shape))
        }
        for distance, steps in enumerate(answers):
            assert (steps is not None) == (distance in reached), (shape, strides, distance)
            if steps is not None:
                assert all(0 <= step < size for step, size in zip(steps, shape, strict=True))
                assert sum(step * stride for step, stride in zip(steps, strides, strict=True)) == distance


@pytest.mark.parametrize(
    ("element", "text"),
    [(0, "e.0.gate[0, 0] → w13[0, 0, 0]"), (1, "e.0.up[0, 0] → w13[0, 0, 1]"), (2, "e.0.gate[1, 0] → w13[0, 0, 2 * 1]"),
     (5, "e.0.up[2, 0] → w13[0, 0, 1 + 2 * 2]"), (33, "e.1.up[1, 1] → w13[1, 1, 1 + 2 * 1]")],
)  # fmt: skip
def test_elements_of_sources_that_alternate_are_counted_in_steps(show, element, text):
    """Rows of gate and up alternate in the last dimension of ``[2, 4, 6]``."""
    sources = table(**{f"e__{i}__{w}": (3, 4) for i in range(2) for w in ("gate", "up")})
    groups = [[f"e.{i}.{w}" for i in range(2)] for w in ("gate", "up")]
    plan = plan_of(sources, targets_of(sources, groups, [MERGE, JOIN, ALTERNATE, SWAP], ["w13"]))
    assert explanations(show(plan), "w13", [element])[0][0] == text


def test_elements_of_one_source_that_fills_all_are_not_counted_in_steps(show):
    assert explanations(show(transposing_plan()), "w13", [5])[0][0] == "gate_up[0, 5, 0] → w13[0, 0, 5]"


def test_elements_of_a_region_are_counted_from_its_start(show):
    (text, _, _), (first, _, _) = explanations(show(experts_plan()), "gate_up", [24 + 4 * 4 + 3, 24 + 3 * 4])
    assert text == "e.1.up[1, 3] → gate_up[1, 3 + 1, 3]"
    assert first == "e.1.up[0, 0] → gate_up[1, 3, 0]"
