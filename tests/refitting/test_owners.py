"""Tests of the ranks that send parts: parts are cut where it pays, and ranks that hold the same share it."""

from __future__ import annotations

import random
from math import prod

import pytest
from hypothesis import given

from automodel_conv.planning.regions import Region, box, whole
from automodel_conv.planning.sharding import placed
from automodel_conv.refitting.owners import owned_parts
from tests.planning.parts import SEEDS, coordinates, held, numbered, random_mesh, random_placements


def random_holders(rng, shape):
    mesh = random_mesh(rng, 3)
    placements = random_placements(rng, shape, mesh)
    holders = {}
    for rank, at in enumerate(coordinates(mesh)):
        region = placed(shape, mesh, at, placements)
        if prod(region.local_shape):
            holders.setdefault(region, []).append(rank)
    return holders


@given(SEEDS)
def test_parts_are_adjacent_elements_of_what_their_holders_have_and_cover_it(seed):
    rng = random.Random(seed)
    shapes = [tuple(rng.randint(1, 6) for _ in range(rng.randint(0, 3))) for _ in range(3)]
    holders = [random_holders(rng, shape) for shape in shapes]
    sizes = [rng.choice([1, 2, 4]) for _ in shapes]
    least_bytes = rng.choice([1, 5, 1000])
    parts = owned_parts(holders, sizes, least_bytes)
    for source, (shape, of_source) in enumerate(zip(shapes, holders, strict=True)):
        for region, ranks in of_source.items():
            elements, covered = held(region, numbered(shape)), []
            own = [each for each in parts if each.part.source == source and each.holders == tuple(ranks)]
            for each in own:
                assert each.owner in each.holders
                values = held(each.part.region, numbered(shape))
                if values[0] in elements:
                    assert elements[each.start : each.start + len(values)] == values
                    covered += values
            assert sorted(covered) == sorted(elements)


@pytest.mark.parametrize(
    ("shape", "ranks", "least_bytes", "starts"),
    [
        ((6, 4), 3, 1, [0, 8, 16]),
        ((6, 4), 3, 24, [0, 8, 16]),
        ((6, 4), 3, 32, [0, 8, 16]),
        ((6, 4), 3, 33, [0, 12]),
        ((6, 4), 3, 49, [0]),
        ((1, 1, 5), 2, 1, [0, 2]),
        ((2, 9), 5, 1, [0, 9]),
        ((), 4, 1, [0]),
        ((1,), 4, 1, [0]),
        ((8,), 1, 1, [0]),
    ],
    ids=str,
)
def test_part_is_cut_into_as_many_as_hold_it_unless_these_are_too_small(shape, ranks, least_bytes, starts):
    parts = owned_parts([{whole(shape): [*range(ranks)]}], [4], least_bytes)
    assert [each.start for each in parts] == starts
    assert [each.owner for each in parts] == [*range(len(starts))]


def test_runs_of_a_region_are_cut_by_place_and_not_by_index():
    region = Region((9, 2), (((7, 2), (0, 2)), ((0, 2),)))
    parts = owned_parts([{region: [4, 5]}], [1], 1)
    assert [each.part.region.runs[0] for each in parts] == [((7, 2),), ((0, 2),)]
    assert [(each.start, each.owner) for each in parts] == [(0, 4), (4, 5)]


def test_small_parts_go_to_the_rank_with_least():
    holders = [{whole((size,)): [0, 1]} for size in (10, 1, 1, 8, 1)]
    parts = owned_parts(holders, [1] * 5, 1000)
    assert [each.owner for each in parts] == [0, 1, 1, 1, 0]


def test_parts_of_one_rank_have_its_owner_only():
    halves = {box((4, 2), (0, 0), (2, 2)): [3], box((4, 2), (2, 0), (2, 2)): [1]}
    parts = owned_parts([halves], [8], 1)
    assert [(each.holders, each.owner, each.start) for each in parts] == [((3,), 3, 0), ((1,), 1, 0)]


def test_nothing_has_no_parts():
    assert owned_parts([], [], 1) == []
    assert owned_parts([{}], [4], 1) == []
