"""Tests of a rank's part of a plan: it equals the part of the whole result, for every operation and placement."""

from __future__ import annotations

import itertools
import random
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from torch.distributed.tensor import Replicate, Shard

from automodel_conv.dtypes import nbytes
from automodel_conv.errors import CoverageError, UnsupportedError
from automodel_conv.planning.copies import Fallback, SourceTable, Target, zero_rows
from automodel_conv.planning.lowering import copies_of, lower
from automodel_conv.planning.operations import Context, Operation
from automodel_conv.planning.plan import CopyPlan, plan_of_parts
from automodel_conv.planning.regions import Part, Region, box, whole
from automodel_conv.planning.sharding import placed
from automodel_conv.planning.values import LoweringError, leaf
from tests.planning import oracles
from tests.planning.operation_cases import CASES, HEADS
from tests.planning.oracles import flat
from tests.planning.parts import SEEDS, held, moe_plan, numbered, random_mesh, random_placements, torch_part


def random_box(rng, shape):
    offsets = [rng.randint(0, size) for size in shape]
    return offsets, [rng.randint(0, size - offset) for size, offset in zip(shape, offsets, strict=True)]


def narrowed(tensor, offsets, lengths):
    for dim, (offset, length) in enumerate(zip(offsets, lengths, strict=True)):
        tensor = tensor.narrow(dim, offset, length)
    return tensor


@given(SEEDS)
def test_box_equals_narrow(seed):
    rng = random.Random(seed)
    shape = tuple(rng.randint(0, 6) for _ in range(rng.randint(0, 4)))
    offsets, lengths = random_box(rng, shape)
    region = box(shape, offsets, lengths)
    wanted = narrowed(numbered(shape), offsets, lengths)
    assert region.local_shape == tuple(wanted.shape)
    assert held(region, numbered(shape)) == wanted.reshape(-1).tolist()


@pytest.mark.parametrize(
    ("offsets", "lengths"),
    [([0, 1], [2, 3]), ([-1, 0], [1, 1]), ([3, 0], [0, 1]), ([0, 0], [1, -1]), ([0], [2]), ([0, 0, 0], [1, 1, 1])],
)
def test_box_outside_its_tensor_is_refused(offsets, lengths):
    with pytest.raises(CoverageError, match="leaves its tensor"):
        box((2, 3), offsets, lengths)


def plan_of_case(operations, inputs, context):
    """Return a plan of a chain of operations on cells, and the elements of its sources."""
    leaves, elements, shapes = {}, {}, []
    for pattern, tensors in inputs.items():
        leaves[pattern] = []
        for tensor in tensors:
            leaves[pattern].append(leaf(len(elements), tensor.shape))
            shapes.append(tuple(tensor.shape))
            elements[f"source {len(elements)}"] = flat(tensor)
    values = lower(operations, leaves, context)
    sources = SourceTable(list(elements), ["I64"] * len(elements), shapes)
    targets = [
        Target(
            name,
            "I64",
            value.shape,
            -1,
            tuple(range(len(elements))),
            copies_of(value),
            fills=zero_rows(value.shape, value.zero_rows),
        )
        for name, value in values.items()
    ]
    plan = CopyPlan(sources, tuple(targets))
    plan.validate()
    return plan, elements


def results(plan, elements):
    flat = oracles.execute(plan, elements)
    return {t.name: torch.tensor(flat[t.name], dtype=torch.int64).reshape(t.shape) for t in plan.targets}


def reads(plan):
    """Return (source, element) -> how often a plan reads it."""
    seen = Counter()
    for target in plan.targets:
        for copy in target.copies:
            for piece in copy.pieces():
                seen.update((target.sources[piece.source], element) for element, _ in oracles.pairs(piece))
    return seen


def check_parts(rng, plan, elements):
    """Compare random parts of all targets, for a rank and for boxes, with the parts of the results."""
    wholes = results(plan, elements)
    mesh = random_mesh(rng, 3)
    coordinate = tuple(rng.randrange(size) for size in mesh)
    regions, wanted = {}, {}
    for name, tensor in wholes.items():
        shape = tuple(tensor.shape)
        if rng.random() < 0.2:
            offsets, lengths = random_box(rng, shape)
            regions[name], wanted[name] = box(shape, offsets, lengths), narrowed(tensor, offsets, lengths)
        elif rng.random() < 0.9:
            placements = random_placements(rng, shape, mesh)
            regions[name] = placed(shape, mesh, coordinate, placements)
            wanted[name] = torch_part(tensor, mesh, coordinate, placements)
        else:  # without a region: whole
            wanted[name] = tensor
    part = plan.shard(regions)
    part.validate()
    assert [target.name for target in part.targets] == [target.name for target in plan.targets]
    actual = results(part, elements)
    for name, tensor in wanted.items():
        assert actual[name].shape == tensor.shape
        assert torch.equal(actual[name], tensor), (name, regions.get(name))
    once, of_whole = reads(part), reads(plan)
    copied = sum(target.copied_numel for target in part.targets)
    assert sum(once.values()) == copied
    assert all(count <= of_whole[place] for place, count in once.items())
    if max(of_whole.values(), default=1) == 1:
        assert part.bytes_read == nbytes("I64", copied)
        assert part.bytes_written == sum(nbytes("I64", t.numel()) for t in wanted.values())


@pytest.mark.parametrize("name", CASES)
@settings(max_examples=40)
@given(seed=SEEDS)
def test_part_of_every_operation_is_the_part_of_its_result(name, seed):
    rng = random.Random(seed)
    case = CASES[name](rng)
    context = Context(tuple(case.sources), tuple(case.targets), case.shapes)
    plan, elements = plan_of_case([Operation(name, tuple(sorted(case.options.items())))], case.inputs, context)
    check_parts(rng, plan, elements)


def random_chain(rng):
    """Draw experts merged, joined and permuted, or queries and keys split and permuted."""
    if rng.random() < 0.3:
        inputs = {"qk": [oracles.cells((2 * HEADS * 2 * rng.randint(1, 3), rng.randint(1, 5)))]}
        options = (
            ("heads", HEADS),
            ("inverse", rng.random() < 0.5),
            ("permute_layer_names", rng.choice((None, ("q",)))),
        )
        return [Operation("Chunk", (("dim", 0),)), Operation("PermuteForRope", options)], inputs, ("q", "k")
    count, rows, columns = rng.randint(1, 4), rng.randint(1, 6), rng.randint(1, 8)
    start, inputs = 0, {}
    for name in ("gate", "up"):
        inputs[name] = [oracles.cells((rows, columns), start + e * rows * columns) for e in range(count)]
        start += count * rows * columns
    operations = [Operation("MergeModulelist", (("dim", 0),)), Operation("Concatenate", (("dim", rng.choice((1, 2))),))]
    for _ in range(rng.randint(0, 3)):
        dim = rng.choice((1, 2))
        more = rng.choice(
            [
                Operation("Transpose", (("dim0", 1), ("dim1", 2))),
                Operation("Transpose", (("dim0", 0), ("dim1", dim))),
                Operation("Interleave", (("dim", dim), ("inverse", rng.random() < 0.5))),
            ]
        )
        try:
            lower([*operations, more], *_lowerable(inputs))
        except LoweringError:
            continue  # an odd number cannot be interleaved
        operations.append(more)
    return operations, inputs, ("grouped",)


def _lowerable(inputs):
    numbers = itertools.count()
    leaves = {name: [leaf(next(numbers), t.shape) for t in tensors] for name, tensors in inputs.items()}
    return leaves, Context(tuple(inputs), ("grouped",), ())


@settings(max_examples=150)
@given(SEEDS)
def test_part_of_a_chain_of_operations_is_the_part_of_its_result(seed):
    rng = random.Random(seed)
    operations, inputs, outputs = random_chain(rng)
    plan, elements = plan_of_case(operations, inputs, Context(tuple(inputs), outputs, ()))
    check_parts(rng, plan, elements)
    check_parts(rng, plan.inverse(), {name: t.reshape(-1).tolist() for name, t in results(plan, elements).items()})


def test_rank_of_experts_reads_its_own_experts_only():
    plan = moe_plan()
    for at in range(3):  # 4 experts over 3 ranks: 2, 2, 0
        part = plan.shard({"grouped": placed((4, 12, 4), (3,), (at,), [Shard(0)])})
        mine = range(2 * at, min(2 * at + 2, 4))
        names = {part.sources.names[row] for target in part.targets for row in target.sources}
        assert names == {f"{e}.{p}" for e in mine for p in ("gate", "up")}
        assert part.bytes_read == part.bytes_written == len(mine) * 12 * 4 * 2


@pytest.mark.parametrize("source", ["BF16", "F32", "F64"])
def test_bytes_of_a_part_are_counted_in_the_dtypes_they_have(source):
    part = moe_plan(source=source).shard({"grouped": box((4, 12, 4), [1, 5, 1], [2, 3, 2])})
    assert part.bytes_read == nbytes(source, 2 * 3 * 2)
    assert part.bytes_written == nbytes("BF16", 2 * 3 * 2)


def test_copies_of_a_part_stay_few():
    """A part of many experts must be as small a plan as the whole."""
    plan = moe_plan(64, 8, 6)
    part = plan.shard({"grouped": placed((64, 16, 6), (2, 2), (1, 0), [Shard(0), Shard(2)])})
    assert len(part.targets[0].copies) <= 2
    assert len(part.targets[0].sources) == 64


def test_plan_without_regions_is_unchanged():
    plan = moe_plan()
    assert plan.shard({}) is plan
    assert plan.shard({"another": whole((3,))}) is plan


def test_parts_keep_the_sources_left_out_by_the_plan():
    plan = moe_plan()
    plan = CopyPlan(plan.sources, plan.targets, (), ("lost",), ("extra",), (("odd", (1,), (2,)),))
    part = plan.shard({"grouped": box((4, 12, 4), [0, 0, 0], [1, 12, 4])})
    assert (part.missing, part.unexpected, part.mismatched) == (plan.missing, plan.unexpected, plan.mismatched)


def test_region_of_another_shape_is_refused():
    with pytest.raises(CoverageError, match="grouped has another shape"):
        moe_plan().shard({"grouped": whole((4, 4, 12))})


def test_results_of_transformers_code_have_no_parts():
    plan = moe_plan()
    fallback = Fallback("a test", lambda tensors: {})
    target = plan.targets[0]._replace(copies=(), fallback=fallback)
    plan = CopyPlan(plan.sources, (target,))
    with pytest.raises(UnsupportedError, match="filled by transformers' own code"):
        plan.shard({"grouped": box((4, 12, 4), [0, 0, 0], [1, 12, 4])})


@pytest.mark.parametrize("region", [None, whole((4, 12, 4)), placed((4, 12, 4), (2,), (1,), [Replicate()])])
def test_results_of_transformers_code_may_be_whole_among_parts(region):
    plan = moe_plan()
    [grouped] = plan.targets
    code = grouped._replace(name="code", copies=(), fallback=Fallback("a test", lambda tensors: {}))
    plan = CopyPlan(plan.sources, (grouped, code))
    regions = {"grouped": box((4, 12, 4), [0, 0, 0], [1, 12, 4])} | ({} if region is None else {"code": region})
    part = plan.shard(regions)
    assert part.target("code") == code
    assert part.target("grouped").shape == (1, 12, 4)


def test_parts_of_one_target_are_tensors_of_their_own():
    plan = moe_plan(2, 3, 2)
    regions = [box((2, 6, 2), [0, 0, 0], [1, 6, 2]), box((2, 6, 2), [0, 2, 1], [2, 3, 1]), whole((2, 6, 2))]
    parts = [Part("grouped", f"part {number}", region) for number, region in enumerate(regions)]
    plan_of_all = plan_of_parts(plan, parts)
    elements = {name: [(name, i) for i in range(6)] for name in plan.sources.names}
    of_whole = oracles.execute(plan, elements)["grouped"]
    actual = oracles.execute(plan_of_all, elements)
    for part in parts:
        places = held(part.region, numbered((2, 6, 2)))
        assert actual[part.name] == [of_whole[place] for place in places]


def test_part_may_have_its_own_dtype_with_one_cast():
    region = box((4, 12, 4), [0, 0, 0], [2, 12, 4])
    plan_of_all = plan_of_parts(moe_plan(), [Part("grouped", "wide", region, "F32"), Part("grouped", "plain", region)])
    assert [target.dtype for target in plan_of_all.targets] == ["F32", "BF16"]
    assert plan_of_parts(moe_plan(dtype="F32"), [Part("grouped", "p", region)]).targets[0].dtype == "F32"
    with pytest.raises(UnsupportedError, match="cast twice"):
        plan_of_parts(moe_plan(dtype="F32"), [Part("grouped", "back", region, "F64")])


def test_region_is_a_value():
    assert box((4, 4), [0, 0], [4, 4]) == whole((4, 4)) == Region((4, 4), (((0, 4),), ((0, 4),)))
    assert hash(whole((4, 4))) == hash(box((4, 4), [0, 0], [4, 4]))


def test_all_indices_in_another_order_are_not_whole():
    rows = ((0, 3),)
    assert Region((3, 3), (rows, rows)).is_whole
    assert Region((0, 3), ((), rows)).is_whole
    assert not Region((3, 3), (((2, 1), (0, 2)), rows)).is_whole
    assert not Region((3, 3), (((0, 1), (0, 2)), rows)).is_whole
