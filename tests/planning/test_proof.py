"""Tests of proofs of plans: copies with any fault are refused, by execution one element at a time."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given

from automodel_conv.errors import CoverageError
from automodel_conv.planning.boxes import Box
from automodel_conv.planning.copies import Fill, StridedCopy, Target, group_pieces, zero_rows
from automodel_conv.planning.plan import CopyPlan
from automodel_conv.planning.proof import prove
from tests.planning import oracles
from tests.planning.plans import SEEDS, padded_plan, random_plan, table, targets_of


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


def run(source, length, start, place):
    return StridedCopy(Box((length,), (1,), (1,)), (source,), (start,), (place,))


def proved(*copies, shape=(4,)):
    prove([Target("t", "BF16", shape, -1, (0, 1), copies)], table(a=(4,), b=(4,)))


def test_copies_that_write_each_element_once_are_proved():
    proved(run(0, 2, 1, 2), run(1, 2, 0, 0))
    proved(shape=(0, 4))


def test_element_that_is_written_twice_is_named_with_its_sources():
    with pytest.raises(CoverageError, match=r"element 1 of t would be written twice(.|\n)*\bb\b"):
        proved(run(0, 2, 0, 0), run(1, 3, 0, 1))


def test_number_of_written_elements_is_reported():
    with pytest.raises(CoverageError, match=r"partly unwritten(.|\n)*4 elements(.|\n)*3 elements from 2 sources"):
        proved(run(0, 1, 0, 0), run(1, 2, 0, 2))


def test_read_past_the_end_names_the_source():
    with pytest.raises(CoverageError, match=r"would read outside b(.|\n)*elements below 4(.|\n)*elements 3 to 4"):
        proved(run(0, 2, 0, 0), run(1, 2, 3, 2))


def test_targets_that_share_copies_are_still_checked_for_their_size():
    sources, copies = table(a=(4,)), (run(0, 4, 0, 0),)
    prove([Target(name, "BF16", (4,), -1, (0,), copies) for name in "st"], sources)
    with pytest.raises(CoverageError, match="t would be left partly unwritten"):
        prove([Target("s", "BF16", (4,), -1, (0,), copies), Target("t", "BF16", (5,), -1, (0,), copies)], sources)


@pytest.mark.parametrize("rows", [(2,), (-1,), (0, 7)])
def test_row_that_the_plan_does_not_have_is_refused(rows):
    with pytest.raises(CoverageError, match="t reads sources that the plan does not have"):
        prove([Target("t", "BF16", (4,), -1, rows, (run(0, 4, 0, 0),))], table(a=(4,), b=(4,)))


def test_element_may_be_read_several_times():
    proved(StridedCopy(Box((4,), (0,), (1,)), (1,), (3,), (0,)))


@pytest.mark.parametrize("rows", [0, 2, 4, 5])
def test_rows_of_zeros_are_exactly_those_that_no_copy_fills(rows):
    plan = padded_plan(2, 5)
    with pytest.raises(CoverageError, match="padded"):
        replace(plan, targets=(plan.targets[0]._replace(fills=zero_rows(plan.targets[0].shape, rows)),)).validate()


@pytest.mark.parametrize(
    ("fill", "text"),
    [
        (Fill(1, (2,), (3,), 1), "element 1 of t would be written twice\n.*a and the constant 1"),
        (Fill(1, (2,), (1,), 5), "cannot be proved"),
        (Fill(1, (2,), (0,), 4), "cannot be proved"),
        (Fill(1, (1,), (1,), 4), "left partly unwritten"),
        (Fill(1, (3,), (1,), 4), "cannot be proved"),
    ],
)
def test_constants_are_written_once_and_inside_their_target(fill, text):
    target = Target("t", "BF16", (6,), -1, (0,), (run(0, 4, 0, 0),), fills=(fill,))
    with pytest.raises(CoverageError, match=text):
        prove([target], table(a=(4,)))
    prove([target._replace(fills=(Fill(1, (2,), (1,), 4),))], table(a=(4,)))


def test_copy_into_rows_of_zeros_is_caught():
    plan = padded_plan(2, 5)
    late = plan.targets[0].copies[0]._replace(target_offsets=(8,))
    with pytest.raises(CoverageError, match="padded"):
        replace(plan, targets=(plan.targets[0]._replace(copies=(late,)),)).validate()
