"""Tests of plans that read parts of sources, executed one element at a time."""

from __future__ import annotations

import random
from math import prod

import pytest
from hypothesis import given, settings
from torch.distributed.tensor import Shard

from automodel_conv.errors import CoverageError
from automodel_conv.planning.copies import SourceTable
from automodel_conv.planning.parts_of_sources import SourcePart, copies_from_regions, plan_from_parts
from automodel_conv.planning.plan import CopyPlan
from automodel_conv.planning.regions import Region, box, whole
from automodel_conv.planning.sharding import placed
from tests.planning.oracles import addressed, execute
from tests.planning.parts import SEEDS, coordinates, held, moe_plan, numbered, random_mesh, random_placements
from tests.planning.plans import padded_plan, random_plan


def random_parts(rng, table):
    """Return parts of all sources, as ranks hold them by random placements, each different part once."""
    parts = []
    for row, shape in enumerate(table.shapes):
        mesh = random_mesh(rng, 3)
        placements = random_placements(rng, shape, mesh)
        regions = dict.fromkeys(placed(shape, mesh, at, placements) for at in coordinates(mesh))
        parts += [SourcePart(row, region) for region in regions if prod(region.local_shape)]
    rng.shuffle(parts)
    return parts


def from_parts(plan, parts):
    """Return the elements of each part by name, as addresses in the whole sources."""
    names = [f"part {number}" for number in range(len(parts))]
    elements = {}
    for name, part in zip(names, parts, strict=True):
        source = plan.sources.names[part.source]
        elements[name] = [
            (source, element) for element in held(part.region, numbered(plan.sources.shapes[part.source]))
        ]
    return names, elements


def executed(plan, parts):
    """Return the targets of the plan from parts, as addresses in the whole sources."""
    names, elements = from_parts(plan, parts)
    made = plan_from_parts(plan, parts)
    assert [*made.sources.shapes] == [part.region.local_shape for part in parts]
    table = SourceTable(names, made.sources.dtypes, made.sources.shapes)
    return made, execute(CopyPlan(table, made.targets), elements)


@settings(max_examples=80)
@given(SEEDS)
def test_targets_from_parts_are_those_from_whole_sources(seed):
    rng, plan = random_plan(seed)
    made, results = executed(plan, random_parts(rng, plan.sources))
    assert results == execute(plan, addressed(plan.sources))
    assert all(len(set(target.sources)) == len(target.sources) for target in made.targets)


@settings(max_examples=80)
@given(SEEDS)
def test_part_of_a_target_reads_only_parts_that_it_needs(seed):
    rng, plan = random_plan(seed)
    regions = {}
    for target in plan.targets:
        mesh = random_mesh(rng, 3)
        at = tuple(rng.randrange(size) for size in mesh)
        regions[target.name] = placed(target.shape, mesh, at, random_placements(rng, target.shape, mesh))
    part = plan.shard(regions)
    parts = random_parts(rng, plan.sources)
    made, results = executed(part, parts)
    assert results == execute(part, addressed(plan.sources))
    for target in made.targets:
        read = {target.sources[ordinal] for copy in target.copies for ordinal in copy.ordinals}
        assert read == set(target.sources)


def test_whole_sources_as_parts_leave_the_copies_as_they_are():
    plan = moe_plan()
    made = plan_from_parts(plan, [SourcePart(row, whole(shape)) for row, shape in enumerate(plan.sources.shapes)])
    assert made.targets == plan.targets
    [target] = plan.targets
    regions = [[whole(plan.sources.shapes[row])] for row in target.sources]
    assert copies_from_regions(target, regions) is target.copies


def test_rank_of_experts_reads_the_parts_of_its_experts_only():
    plan = moe_plan(4, 6, 4)
    halves = [box((6, 4), (start, 0), (3, 4)) for start in (0, 3)]
    parts = [SourcePart(row, half) for row in range(8) for half in halves]
    own = plan.shard({"grouped": placed((4, 12, 4), (2,), (1,), [Shard(0)])})
    made = plan_from_parts(own, parts)
    assert {parts[row].source for row in made.targets[0].sources} == {2, 3, 6, 7}
    assert len(made.targets[0].sources) == 8


def test_constants_and_dtypes_stay():
    plan = padded_plan()
    parts = [SourcePart(0, box((2, 4), (row, 0), (1, 4))) for row in (1, 0)]
    made, results = executed(plan, parts)
    assert results == execute(plan, addressed(plan.sources))
    assert made.targets[0].fills == plan.targets[0].fills


def test_element_that_no_part_has_is_an_error():
    plan = moe_plan()
    parts = [SourcePart(row, whole((6, 4))) for row in range(7)]
    with pytest.raises(CoverageError, match="grouped would be left partly unwritten"):
        plan_from_parts(plan, [*parts, SourcePart(7, box((6, 4), (0, 0), (6, 3)))])
    with pytest.raises(CoverageError, match="grouped would be left partly unwritten"):
        plan_from_parts(plan, parts)


def test_element_in_two_parts_is_an_error():
    plan = moe_plan()
    parts = [SourcePart(row, whole((6, 4))) for row in range(8)]
    with pytest.raises(CoverageError):
        plan_from_parts(plan, [*parts, SourcePart(7, box((6, 4), (0, 0), (1, 1)))])


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (0,), (0, 3), (4, 4)], ids=str)
def test_parts_of_any_size(shape):
    rng = random.Random(str(shape))
    table = SourceTable(["a"], ["F32"], [shape])
    identity = plan_from_parts(_identity(table), [SourcePart(0, whole(shape))])
    assert execute(identity, addressed(table)) == {"a": [("a", element) for element in range(prod(shape))]}
    _, results = executed(_identity(table), random_parts(rng, table) or [SourcePart(0, whole(shape))])
    assert results == {"a": [("a", element) for element in range(prod(shape))]}


def _identity(table):
    from tests.planning.plans import plan_of, targets_of

    return plan_of(table, targets_of(table, [[name] for name in table.names], [], list(table.names)))


def test_experts_in_turn_are_one_part_with_several_runs():
    plan = moe_plan(4, 2, 3)
    [target] = plan.targets
    whole_experts = CopyPlan(SourceTable(["e"], ["BF16"], [target.shape]), (_identity_of(target),))
    regions = [Region(target.shape, (((first, 1), (first + 2, 1)), ((0, 4),), ((0, 3),))) for first in (1, 0)]
    _, results = executed(whole_experts, [SourcePart(0, region) for region in regions])
    assert results == {"e": [("e", element) for element in range(prod(target.shape))]}


def _identity_of(target):
    table = SourceTable(["e"], ["BF16"], [target.shape])
    return _identity(table).targets[0]
