"""Tests of chains of pieces with strides that do not divide each other."""

from __future__ import annotations

import random
from math import prod

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.distributed.tensor import Shard

from automodel_conv.planning.boxes import Box, NotAffine, Piece, chain, contiguous_strides, find_overlap
from automodel_conv.planning.operations import Operation
from automodel_conv.planning.sharding import placed
from tests.planning import oracles
from tests.planning.parts import SEEDS, coordinates, moe_plan


def walk(source, shape, read, written):
    """Return a piece that reads and writes with these strides, from these offsets on."""
    return Piece(source, Box(shape, read[0], written[0]), read[1], written[1])


def combs(numel, step, reading):
    """Return copies of every ``step``-th of ``numel`` elements: spread out on writing, or gathered on reading."""
    pieces, start = [], 0
    for first in range(min(step, numel)):
        count = len(range(first, numel, step))
        there, here = ((step,), first), ((1,), start if reading else 0)
        pieces.append(walk(0 if reading else first, (count,), *((there, here) if reading else (here, there))))
        start += count
    return pieces


def random_walks(rng, numel, reading):
    """Draw copies of up to three dimensions in a tensor, written at most once, with some elements left unwritten."""
    free, pieces, start = set(range(numel)), [], 0
    for source in range(rng.randint(1, 4)):
        strides = sorted(rng.sample(range(1, max(2, numel // 2)), k=min(rng.randint(1, 3), max(1, numel // 2 - 1))))
        shape = tuple(rng.randint(1, 4) for _ in strides)
        offset = rng.randrange(numel)
        reach = [offset + sum(i * s for i, s in zip(c, strides, strict=True)) for c in coordinates(shape)]
        if len(set(reach)) < len(reach) or not set(reach) <= free:
            continue
        if not reading:
            free -= set(reach)
        here, there = (contiguous_strides(shape), start if reading else 0), (tuple(strides), offset)
        pieces.append(walk(0 if reading else source, shape, *((there, here) if reading else (here, there))))
        start += prod(shape)
    return pieces


def composed(first, second):
    """Return target element -> (source, element), by way of the middle tensor, element by element."""
    middle = oracles.written(first)
    result = {}
    for piece in second:
        for read, write in oracles.pairs(piece):
            assert write not in result
            if read in middle:
                result[write] = middle[read]
    return result


@settings(max_examples=200)
@given(st.integers(1, 70), st.integers(1, 9), st.integers(1, 9))
@example(30, 2, 3)
@example(12, 4, 6)
@example(7, 2, 3)
def test_combs_of_any_two_steps_chain(numel, write_step, read_step):
    first, second = combs(numel, write_step, False), combs(numel, read_step, True)
    elements = oracles.written(chain(first, second, numel))
    assert elements == composed(first, second)
    assert len(elements) == numel


@settings(max_examples=300)
@given(SEEDS)
def test_walks_with_any_strides_chain_like_elements_or_are_refused(seed):
    rng = random.Random(seed)
    numel = rng.randint(2, 60)
    first = random_walks(rng, numel, False) if rng.random() < 0.6 else combs(numel, rng.randint(1, 6), False)
    second = random_walks(rng, numel, True) if rng.random() < 0.6 else combs(numel, rng.randint(1, 6), True)
    try:
        chained = chain(first, second, numel)
    except NotAffine:
        return
    assert oracles.written(chained) == composed(first, second)


@settings(max_examples=300)
@given(SEEDS)
def test_walks_with_any_strides_overlap_like_elements_or_are_refused(seed):
    rng = random.Random(seed)
    numel = rng.randint(2, 60)
    pieces = [*random_walks(rng, numel, False), *random_walks(rng, numel, False)]
    pieces = [piece._replace(source=number) for number, piece in enumerate(pieces)]
    try:
        overlap = find_overlap(pieces, numel)
    except NotAffine:
        return
    twice = oracles.twice_written(pieces)
    assert (overlap is None) == (not twice)
    if overlap is not None:
        assert {*overlap.sources} <= {*twice[overlap.element]}


def test_half_of_an_interleaved_dimension_has_at_most_one_piece_per_step():
    interleave = Operation("Interleave", (("dim", 1), ("inverse", True)))
    plan = moe_plan(2, 9, 4, interleave, Operation("Transpose", (("dim0", 1), ("dim1", 2))))
    assert plan.targets[0].shape == (2, 4, 18)
    part = plan.shard({"grouped": placed((2, 4, 18), (2,), (0,), [Shard(2)])})
    part.validate()
    assert len([1 for copy in part.targets[0].copies for _ in copy.pieces()]) <= 2 * 9


def test_long_walks_that_do_not_divide_each_other_are_refused():
    numel = 6 * 5000
    with pytest.raises(NotAffine, match="do not divide each other"):
        chain(combs(numel, 2, False), combs(numel, 3, True), numel)
