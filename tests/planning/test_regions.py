"""A rank's part of a plan: equal to the part of the whole result, for every operation, placement and uneven size."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from math import prod
from types import SimpleNamespace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.distributed.tensor import Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from automodel_conv.dtypes import nbytes
from automodel_conv.errors import CoverageError, UnsupportedError
from automodel_conv.planning.boxes import Box, NotAffine, Piece, chain, contiguous_strides, find_overlap
from automodel_conv.planning.copies import Fallback, SourceTable, Target
from automodel_conv.planning.lowering import copies_of, lower
from automodel_conv.planning.operations import Context, Operation
from automodel_conv.planning.plan import CopyPlan, plan_of_parts
from automodel_conv.planning.regions import Part, Region, box, whole
from automodel_conv.planning.sharding import placed, region_of
from automodel_conv.planning.values import LoweringError, leaf
from tests.planning import oracles
from tests.planning.oracles import flat
from tests.planning.test_lowering import CASES, HEADS

SEEDS = st.integers(0, 2**32)


# --- placements -------------------------------------------------------------------------------------------------------


def random_mesh(rng, most=4):
    return tuple(rng.randint(1, most) for _ in range(rng.randint(1, 3)))


def random_placements(rng, shape, mesh):
    """Any placements, several of one dimension among them."""
    dims = range(len(shape))
    kinds = [
        Replicate,
        lambda: Shard(rng.choice(dims)),
        lambda: Shard(rng.choice(dims)),
        lambda: _StridedShard(rng.choice(dims), split_factor=rng.randint(1, 4)),
    ]
    return [rng.choice(kinds)() if shape else Replicate() for _ in mesh]


def coordinates(mesh):
    return itertools.product(*map(range, mesh))


def torch_part(tensor, mesh, coordinate, placements):
    """What torch gives the rank: each mesh dimension splits what the one before has left, FSDP2 what others have."""
    splits = [split for split in zip(placements, mesh, coordinate, strict=True) if not split[0].is_replicate()]
    data_parallel = []
    while splits:
        placement, size, at = splits.pop(0)
        others = prod(other for later, other, _ in splits if later.dim == placement.dim)
        if 1 < getattr(placement, "split_factor", 1) == others:
            data_parallel.append((placement.dim, size, at))
        else:
            tensor = placement._split_tensor(tensor, size, with_padding=False, contiguous=True)[0][at]
    for dim, size, at in reversed(data_parallel):
        parts = tensor.chunk(size, dim)
        tensor = parts[at] if at < len(parts) else tensor.narrow(dim, 0, 0)
    return tensor


def held(region, tensor):
    """The part of a tensor that a region says, element by element."""
    elements = tensor.reshape(-1).tolist()
    made = oracles.written(region.pieces())
    assert sorted(made) == list(range(prod(region.local_shape)))
    return [elements[element] for _, (_, element) in sorted(made.items())]


def numbered(shape):
    return torch.arange(prod(shape)).reshape(shape)


@settings(max_examples=200)
@given(SEEDS)
def test_a_placed_region_is_what_torch_splits_off(seed):
    rng = random.Random(seed)
    shape = tuple(rng.choice((0, 1, 2, 3, 4, 5, 6, 7, 9, 12)) for _ in range(rng.randint(0, 3)))
    mesh = random_mesh(rng)
    placements = random_placements(rng, shape, mesh)
    for coordinate in coordinates(mesh):
        region = placed(shape, mesh, coordinate, placements)
        wanted = torch_part(numbered(shape), mesh, coordinate, placements)
        assert region.shape == shape
        assert region.local_shape == tuple(wanted.shape)
        assert held(region, numbered(shape)) == wanted.reshape(-1).tolist()
        assert region.is_whole == (tuple(wanted.shape) == shape)


@settings(max_examples=100)
@given(SEEDS)
def test_all_ranks_of_a_mesh_hold_every_element_as_often_as_it_has_replicas(seed):
    rng = random.Random(seed)
    shape = tuple(rng.randint(0, 9) for _ in range(rng.randint(1, 3)))
    mesh = random_mesh(rng)
    placements = random_placements(rng, shape, mesh)
    seen = Counter()
    for coordinate in coordinates(mesh):
        seen.update(held(placed(shape, mesh, coordinate, placements), numbered(shape)))
    replicas = prod(size for size, placement in zip(mesh, placements, strict=True) if placement.is_replicate())
    assert seen == dict.fromkeys(range(prod(shape)), replicas)


def test_more_ranks_than_indices_leave_the_last_with_nothing():
    regions = [placed((3, 5), (4,), (at,), [Shard(0)]) for at in range(4)]
    assert [region.local_shape for region in regions] == [(1, 5), (1, 5), (1, 5), (0, 5)]
    assert regions[3].pieces() == []


def test_data_parallel_shards_of_tensor_parallel_shards_alternate():
    """FSDP2 over tensor parallelism: rows 0..7 over tp=2 first, each half over dp=2, dp the outer mesh dimension."""
    placements = [_StridedShard(0, split_factor=2), Shard(0)]
    runs = {at: placed((8,), (2, 2), at, placements).runs for at in coordinates((2, 2))}
    assert runs == {(0, 0): (((0, 2),),), (0, 1): (((4, 2),),), (1, 0): (((2, 2),),), (1, 1): (((6, 2),),)}


def test_data_parallel_shards_divide_what_tensor_parallelism_has_left_however_uneven():
    """7 rows over tp=2 are 4 and 3, and these over dp=3 are 2, 2, 0 and 1, 1, 1."""
    placements = [_StridedShard(0, split_factor=2), Shard(0)]
    runs = {at: placed((7,), (3, 2), at, placements).runs for at in coordinates((3, 2))}
    assert runs == {
        (0, 0): (((0, 2),),),
        (1, 0): (((2, 2),),),
        (2, 0): ((),),
        (0, 1): (((4, 1),),),
        (1, 1): (((5, 1),),),
        (2, 1): (((6, 1),),),
    }


def test_data_parallel_shards_divide_packed_shards():
    """Gate and up in one: tp=2 takes rows 0, 1, 4, 5 and 2, 3, 6, 7; dp=2 halves of these."""
    placements = [_StridedShard(0, split_factor=2), _StridedShard(0, split_factor=2)]
    runs = {at: placed((8,), (2, 2), at, placements).runs for at in coordinates((2, 2))}
    assert runs == {(0, 0): (((0, 2),),), (1, 0): (((4, 2),),), (0, 1): (((2, 2),),), (1, 1): (((6, 2),),)}


def test_a_part_of_another_shape_than_its_placements_say_is_refused():
    class Distributed:
        shape, placements = torch.Size([4]), (Shard(0),)
        device_mesh = SimpleNamespace(shape=(2,), get_coordinate=lambda: [0])

        def to_local(self):
            return torch.empty(3)

    with pytest.raises(UnsupportedError, match="does not hold the part"):
        region_of(Distributed())


@pytest.mark.parametrize("shape", [(), (3,), (0, 2), (4, 2)])
def test_a_rank_outside_of_the_mesh_holds_nothing(shape):
    mesh = SimpleNamespace(get_coordinate=lambda: None)
    region = region_of(SimpleNamespace(shape=torch.Size(shape), placements=[Replicate()], device_mesh=mesh))
    assert region.shape == shape
    assert 0 in region.local_shape
    assert region.pieces() == []


def test_partial_sums_are_no_part_of_a_tensor():
    with pytest.raises(UnsupportedError, match="partial sums"):
        placed((4, 4), (2, 2), (0, 1), [Shard(0), Partial()])


def test_a_plain_tensor_is_held_whole():
    assert region_of(torch.empty(2, 3)) == whole((2, 3))
    assert region_of(torch.empty(())).is_whole
    assert region_of(torch.empty(0, 3)).is_whole


# --- boxes ------------------------------------------------------------------------------------------------------------


def random_box(rng, shape):
    offsets = [rng.randint(0, size) for size in shape]
    return offsets, [rng.randint(0, size - offset) for size, offset in zip(shape, offsets, strict=True)]


def narrowed(tensor, offsets, lengths):
    for dim, (offset, length) in enumerate(zip(offsets, lengths, strict=True)):
        tensor = tensor.narrow(dim, offset, length)
    return tensor


@given(SEEDS)
def test_a_box_is_what_narrow_cuts_out(seed):
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
def test_a_box_outside_its_tensor_is_refused(offsets, lengths):
    with pytest.raises(CoverageError, match="leaves its tensor"):
        box((2, 3), offsets, lengths)


# --- plans ------------------------------------------------------------------------------------------------------------


def plan_of_case(operations, inputs, context):
    """A plan of a chain of operations on cells, and the elements of its sources."""
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
        Target(name, "I64", tuple(value.shape), -1, tuple(range(len(elements))), copies_of(value))
        for name, value in values.items()
    ]
    plan = CopyPlan(sources, tuple(targets))
    plan.validate()
    return plan, elements


def results(plan, elements):
    made = oracles.execute(plan, elements)
    return {t.name: torch.tensor(made[t.name], dtype=torch.int64).reshape(t.shape) for t in plan.targets}


def reads(plan):
    """(source, element) -> how often a plan reads it."""
    seen = Counter()
    for target in plan.targets:
        for copy in target.copies:
            for piece in copy.pieces():
                seen.update((target.sources[piece.source], element) for element, _ in oracles.pairs(piece))
    return seen


def check_parts(rng, plan, elements):
    """Random parts of all targets, of a rank and boxes, against the parts of the results."""
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
        else:  # no region: whole
            wanted[name] = tensor
    part = plan.shard(regions)
    part.validate()
    assert [target.name for target in part.targets] == [target.name for target in plan.targets]
    found = results(part, elements)
    for name, tensor in wanted.items():
        assert found[name].shape == tensor.shape
        assert torch.equal(found[name], tensor), (name, regions.get(name))
    once, of_whole = reads(part), reads(plan)
    assert sum(once.values()) == sum(tensor.numel() for tensor in wanted.values())
    assert all(count <= of_whole[place] for place, count in once.items())
    if max(of_whole.values(), default=1) == 1:
        assert part.bytes_read == part.bytes_written == sum(nbytes("I64", t.numel()) for t in wanted.values())


@pytest.mark.parametrize("name", CASES)
@settings(max_examples=40)
@given(seed=SEEDS)
def test_a_part_of_every_operation_is_the_part_of_its_result(name, seed):
    rng = random.Random(seed)
    case = CASES[name](rng)
    context = Context(tuple(case.sources), tuple(case.targets), case.shapes)
    plan, elements = plan_of_case([Operation(name, tuple(sorted(case.options.items())))], case.inputs, context)
    check_parts(rng, plan, elements)


def random_chain(rng):
    """Experts merged, joined and permuted in random ways; or queries and keys cut apart and permuted."""
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
    return operations, inputs, ("made",)


def _lowerable(inputs):
    numbers = itertools.count()
    leaves = {name: [leaf(next(numbers), t.shape) for t in tensors] for name, tensors in inputs.items()}
    return leaves, Context(tuple(inputs), ("made",), ())


@settings(max_examples=150)
@given(SEEDS)
def test_a_part_of_a_chain_of_operations_is_the_part_of_its_result(seed):
    rng = random.Random(seed)
    operations, inputs, outputs = random_chain(rng)
    plan, elements = plan_of_case(operations, inputs, Context(tuple(inputs), outputs, ()))
    check_parts(rng, plan, elements)
    check_parts(rng, plan.inverse(), {name: t.reshape(-1).tolist() for name, t in results(plan, elements).items()})


def moe_plan(count=4, rows=6, columns=4, *more, dtype="BF16", source="BF16"):
    """One grouped tensor ``[E, 2 * rows, columns]`` of gates and ups."""
    names = [f"{e}.{projection}" for projection in ("gate", "up") for e in range(count)]
    sources = SourceTable(names, [source] * len(names), [(rows, columns)] * len(names))
    ordinals = itertools.count()
    leaves = {p: [leaf(next(ordinals), (rows, columns)) for _ in range(count)] for p in ("gate", "up")}
    operations = [Operation("MergeModulelist", (("dim", 0),)), Operation("Concatenate", (("dim", 1),)), *more]
    value = lower(operations, leaves, Context(("gate", "up"), ("made",), ()))["made"]
    target = Target("made", dtype, tuple(value.shape), -1, tuple(range(len(names))), copies_of(value))
    return CopyPlan(sources, (target,))


def test_a_rank_of_experts_reads_its_own_experts_only():
    plan = moe_plan()
    for at in range(3):  # 4 experts over 3 ranks: 2, 2, 0
        part = plan.shard({"made": placed((4, 12, 4), (3,), (at,), [Shard(0)])})
        mine = range(2 * at, min(2 * at + 2, 4))
        names = {part.sources.names[row] for target in part.targets for row in target.sources}
        assert names == {f"{e}.{p}" for e in mine for p in ("gate", "up")}
        assert part.bytes_read == part.bytes_written == len(mine) * 12 * 4 * 2


@pytest.mark.parametrize("source", ["BF16", "F32", "F64"])
def test_bytes_of_a_part_are_counted_in_the_dtypes_they_have(source):
    part = moe_plan(source=source).shard({"made": box((4, 12, 4), [1, 5, 1], [2, 3, 2])})
    assert part.bytes_read == nbytes(source, 2 * 3 * 2)
    assert part.bytes_written == nbytes("BF16", 2 * 3 * 2)


def test_copies_of_a_part_stay_few():
    """A part of many experts is as small a plan as the whole."""
    plan = moe_plan(64, 8, 6)
    part = plan.shard({"made": placed((64, 16, 6), (2, 2), (1, 0), [Shard(0), Shard(2)])})
    assert len(part.targets[0].copies) <= 2
    assert len(part.targets[0].sources) == 64


def test_a_plan_without_regions_is_left_as_it_is():
    plan = moe_plan()
    assert plan.shard({}) is plan
    assert plan.shard({"another": whole((3,))}) is plan


def test_what_a_plan_leaves_out_is_still_told_by_its_parts():
    plan = moe_plan()
    plan = CopyPlan(plan.sources, plan.targets, (), ("lost",), ("extra",), (("odd", (1,), (2,)),))
    part = plan.shard({"made": box((4, 12, 4), [0, 0, 0], [1, 12, 4])})
    assert (part.missing, part.unexpected, part.mismatched) == (plan.missing, plan.unexpected, plan.mismatched)


def test_a_region_of_another_shape_is_refused():
    with pytest.raises(CoverageError, match="made has another shape"):
        moe_plan().shard({"made": whole((4, 4, 12))})


def test_what_transformers_own_code_makes_has_no_parts():
    plan = moe_plan()
    fallback = Fallback("a test", lambda tensors: {})
    target = plan.targets[0]._replace(copies=(), fallback=fallback)
    plan = CopyPlan(plan.sources, (target,))
    with pytest.raises(UnsupportedError, match="made by upstream's own code"):
        plan.shard({"made": box((4, 12, 4), [0, 0, 0], [1, 12, 4])})


@pytest.mark.parametrize("region", [None, whole((4, 12, 4)), placed((4, 12, 4), (2,), (1,), [Replicate()])])
def test_what_transformers_own_code_makes_may_be_whole_beside_parts_of_others(region):
    plan = moe_plan()
    [made] = plan.targets
    code = made._replace(name="code", copies=(), fallback=Fallback("a test", lambda tensors: {}))
    plan = CopyPlan(plan.sources, (made, code))
    regions = {"made": box((4, 12, 4), [0, 0, 0], [1, 12, 4])} | ({} if region is None else {"code": region})
    part = plan.shard(regions)
    assert part.target("code") == code
    assert part.target("made").shape == (1, 12, 4)


# --- parts under names of their own -----------------------------------------------------------------------------------


def test_parts_of_one_target_are_tensors_of_their_own():
    plan = moe_plan(2, 3, 2)
    regions = [box((2, 6, 2), [0, 0, 0], [1, 6, 2]), box((2, 6, 2), [0, 2, 1], [2, 3, 1]), whole((2, 6, 2))]
    parts = [Part("made", f"part {number}", region) for number, region in enumerate(regions)]
    made = plan_of_parts(plan, parts)
    elements = {name: [(name, i) for i in range(6)] for name in plan.sources.names}
    of_whole = oracles.execute(plan, elements)["made"]
    found = oracles.execute(made, elements)
    for part in parts:
        places = held(part.region, numbered((2, 6, 2)))
        assert found[part.name] == [of_whole[place] for place in places]


def test_a_part_may_have_a_dtype_of_its_own_but_is_cast_once():
    region = box((4, 12, 4), [0, 0, 0], [2, 12, 4])
    made = plan_of_parts(moe_plan(), [Part("made", "wide", region, "F32"), Part("made", "plain", region)])
    assert [target.dtype for target in made.targets] == ["F32", "BF16"]
    assert plan_of_parts(moe_plan(dtype="F32"), [Part("made", "p", region)]).targets[0].dtype == "F32"
    with pytest.raises(UnsupportedError, match="cast twice"):
        plan_of_parts(moe_plan(dtype="F32"), [Part("made", "back", region, "F64")])


# --- strides that do not divide each other ----------------------------------------------------------------------------


def walk(source, shape, read, written):
    """A piece that reads and writes by these strides, from these offsets on."""
    return Piece(source, Box(shape, read[0], written[0]), read[1], written[1])


def combs(numel, step, reading):
    """Copies of a tensor of ``numel`` elements that take every ``step``-th: written there, or read from there."""
    pieces, start = [], 0
    for first in range(min(step, numel)):
        count = len(range(first, numel, step))
        there, here = ((step,), first), ((1,), start if reading else 0)
        pieces.append(walk(0 if reading else first, (count,), *((there, here) if reading else (here, there))))
        start += count
    return pieces


def random_walks(rng, numel, reading):
    """Copies of up to three dimensions within a tensor, written once; what they leave out nobody writes."""
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
    """Target element -> (source, element): by way of the middle tensor, element by element."""
    middle = oracles.written(first)
    made = {}
    for piece in second:
        for read, write in oracles.pairs(piece):
            assert write not in made
            if read in middle:
                made[write] = middle[read]
    return made


@settings(max_examples=200)
@given(st.integers(1, 70), st.integers(1, 9), st.integers(1, 9))
@example(30, 2, 3)
@example(12, 4, 6)
@example(7, 2, 3)
def test_combs_of_any_two_steps_chain(numel, write_step, read_step):
    first, second = combs(numel, write_step, False), combs(numel, read_step, True)
    found = oracles.written(chain(first, second, numel))
    assert found == composed(first, second)
    assert len(found) == numel


@settings(max_examples=300)
@given(SEEDS)
def test_walks_with_any_strides_chain_as_elements_do_or_are_refused(seed):
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
def test_walks_with_any_strides_meet_where_elements_do_or_are_refused(seed):
    rng = random.Random(seed)
    numel = rng.randint(2, 60)
    pieces = [*random_walks(rng, numel, False), *random_walks(rng, numel, False)]
    pieces = [piece._replace(source=number) for number, piece in enumerate(pieces)]
    try:
        found = find_overlap(pieces, numel)
    except NotAffine:
        return
    twice = oracles.twice_written(pieces)
    assert (found is None) == (not twice)
    if found is not None:
        assert {*found.sources} <= {*twice[found.element]}


def test_half_of_an_interleaved_dimension_is_no_more_pieces_than_it_has_steps():
    interleave = Operation("Interleave", (("dim", 1), ("inverse", True)))
    plan = moe_plan(2, 9, 4, interleave, Operation("Transpose", (("dim0", 1), ("dim1", 2))))
    assert plan.targets[0].shape == (2, 4, 18)
    part = plan.shard({"made": placed((2, 4, 18), (2,), (0,), [Shard(2)])})
    part.validate()
    assert len([1 for copy in part.targets[0].copies for _ in copy.pieces()]) <= 2 * 9


def test_long_walks_that_do_not_divide_each_other_are_refused():
    numel = 6 * 5000
    with pytest.raises(NotAffine, match="do not divide each other"):
        chain(combs(numel, 2, False), combs(numel, 3, True), numel)


def test_a_region_is_a_value():
    assert box((4, 4), [0, 0], [4, 4]) == whole((4, 4)) == Region((4, 4), (((0, 4),), ((0, 4),)))
    assert hash(whole((4, 4))) == hash(box((4, 4), [0, 0], [4, 4]))
