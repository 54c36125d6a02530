"""Tests of plans: their reports, and what they prove, by execution one element at a time."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given

from automodel_conv.errors import CoverageError
from automodel_conv.planning.boxes import Box
from automodel_conv.planning.copies import StridedCopy, Target, group_pieces
from automodel_conv.planning.plan import CopyPlan
from tests.planning import oracles
from tests.planning.oracles import addressed, execute
from tests.planning.plans import CHUNK, SEEDS, experts_plan, plan_of, random_plan, table, targets_of, transposing_plan

SUMMARY = """\
 targets  sources        GB  execution      rule
       1        4     0.000  read           e.*.gate + e.*.up -> gate_up: merge, join
       1        1     0.000  read           (name only)
       2        5     0.000  reads 0.000 GB, 0 targets by transformers' own code"""

EXPLANATION = """\
gate_up  BF16 [2, 6, 4]  96 bytes  (read)
  rule: e.*.gate + e.*.up -> gate_up: merge, join
  e.0.gate BF16 [3, 4][0 + 12x1] -> [0 + 12x1]
  e.0.up BF16 [3, 4][0 + 12x1] -> [12 + 12x1]
  e.1.gate BF16 [3, 4][0 + 12x1] -> [24 + 12x1]
  e.1.up BF16 [3, 4][0 + 12x1] -> [36 + 12x1]"""

EXPLAINED_SWAP = """\
w13  BF16 [2, 4, 6]  96 bytes  (strided)
  rule: gate_up -> w13: alternate, swap
  gate_up BF16 [2, 6, 4][0 + 2x24 4x1 3x4 2x12] -> [0 + 2x24 4x6 3x2 2x1]"""


def test_summary_matches_the_expected_text():
    assert experts_plan().summary() == SUMMARY


def test_explain_names_every_source_and_its_region():
    assert experts_plan().explain("gate_up") == EXPLANATION
    assert transposing_plan().explain("w13") == EXPLAINED_SWAP


def test_explain_of_an_unknown_target_suggests_names():
    plan = plan_of(table(a=(2,)), targets_of(table(a=(2,)), [["a"]], [], ["layers.0.w"]))
    with pytest.raises(KeyError, match=r"layers\.0\.w"):
        plan.explain("layers.9.w")


def test_ways_of_execution_are_distinguished():
    assert experts_plan().execution_of(experts_plan().target("gate_up")) == "read"
    cast = experts_plan("F32")
    assert cast.execution_of(cast.target("gate_up")) == "cast"
    swap = transposing_plan()
    assert swap.execution_of(swap.target("w13")) == "strided"
    both = swap.target("w13")._replace(dtype="F32")
    assert swap.execution_of(both) == "strided, cast"


def test_bytes_are_counted_once_and_in_their_own_dtype():
    plan = experts_plan("F32")
    assert plan.bytes_read == 4 * 3 * 4 * 2 + 4 * 2
    assert plan.bytes_written == 2 * 6 * 4 * 4 + 4 * 2
    sources = table(qkv=(6, 2), unused=(100,))
    split = plan_of(sources, targets_of(sources, [["qkv"]], [CHUNK], ["q", "k", "v"]))
    assert split.bytes_read == split.bytes_written == 24
    assert split.used_sources == {0}


def test_replaced_targets_leave_the_first_plan_unchanged():
    plan = experts_plan()
    fewer = replace(plan, targets=plan.targets[1:])
    assert plan.target("gate_up").name == "gate_up"
    assert plan.target("norm").name == fewer.target("norm").name == "norm"
    with pytest.raises(KeyError):
        fewer.target("gate_up")


@given(SEEDS)
def test_any_change_of_a_valid_set_of_pieces_is_caught(seed):
    rng, plan = random_plan(seed)
    target = plan.targets[0]
    pieces = [piece for copy in target.copies for piece in copy.pieces()]
    at = rng.randrange(len(pieces))
    piece = pieces[at]
    kind = rng.choice(("dropped", "doubled", "shifted", "narrowed", "widened", "moved in the source"))
    if kind == "dropped":
        pieces.pop(at)
    elif kind == "doubled":
        pieces.append(piece)
    elif kind == "shifted":
        pieces[at] = piece._replace(target_offset=piece.target_offset + rng.choice((-1, 1, 2)))
    elif kind == "moved in the source":
        pieces[at] = piece._replace(source_offset=piece.source_offset + rng.choice((-1, 1)))
    else:
        if not piece.box.shape:
            return
        dim = rng.randrange(len(piece.box.shape))
        shape = list(piece.box.shape)
        shape[dim] += -1 if kind == "narrowed" else 1
        pieces[at] = piece._replace(box=piece.box._replace(shape=tuple(shape)))
    spoiled = replace(plan, targets=(target._replace(copies=group_pieces(pieces)),))
    if kind == "moved in the source" and len(target.copies[0].box.shape) and _still_inside(spoiled):
        return
    with pytest.raises(CoverageError, match="result"):
        spoiled.validate()


def _still_inside(plan):
    target = plan.targets[0]
    for copy in target.copies:
        for piece in copy.pieces():
            shape = plan.sources.shapes[target.sources[piece.source]]
            reads = [source for source, _ in oracles.pairs(piece)]
            if min(reads) < 0 or max(reads) >= torch.Size(shape).numel():
                return False
    return True


def whole(copy_fields):
    box = {"shape": (4,), "source_strides": (1,), "target_strides": (1,)}
    columns = {"ordinals": (0,), "source_offsets": (0,), "target_offsets": (0,)}
    all_fields = box | columns | copy_fields
    return StridedCopy(Box(*(all_fields[name] for name in box)), *(all_fields[name] for name in columns))


@pytest.mark.parametrize(
    "fields",
    [
        {"ordinals": (1,)},
        {"ordinals": (-1,)},
        {"source_strides": (-1,)},
        {"source_strides": (-1,), "source_offsets": (3,)},
        {"source_strides": (2,)},
        {"shape": (2, 2), "source_strides": (3, -1), "target_strides": (2, 1)},
        {"source_offsets": (1,)},
        {"target_strides": (0,)},
        {"target_strides": (-1,), "target_offsets": (3,)},
        {"shape": (5,)},
        {"shape": (3,)},
        {"ordinals": (0, 0), "source_offsets": (0, 0), "target_offsets": (0, 0)},
        {"ordinals": (), "source_offsets": (), "target_offsets": ()},
    ],
    ids=str,
)
def test_impossible_copies_are_no_plan(fields):
    target = Target("t", "BF16", (4,), -1, (0,), (whole(fields),))
    with pytest.raises(CoverageError, match=r"\bt\b"):
        CopyPlan(table(a=(4,), b=(4,)), (target,)).validate()


def test_two_targets_of_one_name_are_no_plan():
    sources = table(a=(2,), b=(2,))
    targets = [*targets_of(sources, [["a"]], [], ["x"]), *targets_of(sources, [["b"]], [], ["x"])]
    with pytest.raises(CoverageError, match="x"):
        CopyPlan(sources, tuple(targets)).validate()


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (0,), (3, 0)])
def test_small_tensors_pass_through_everything(shape):
    sources = table(a=shape)
    plan = plan_of(sources, targets_of(sources, [["a"]], [], ["b"]))
    expected = {"b": addressed(sources)["a"]}
    assert execute(plan, addressed(sources)) == expected
    back = plan.inverse()
    assert [(t.name, t.shape) for t in back.targets] == [("a", shape)]
    assert execute(plan.then(back), addressed(sources)) == addressed(sources)
    assert CopyPlan.from_json(plan.to_json()) == plan
