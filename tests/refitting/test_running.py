"""Tests of the execution of a refit within one process: buckets, strides, casts, and the states of tensors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from automodel_conv.errors import UnsupportedError
from automodel_conv.planning.boxes import Box, Piece, contiguous_strides, run_of
from automodel_conv.planning.copies import Fill, Target
from automodel_conv.refitting.messages import Message, Run
from automodel_conv.refitting.running import OwnCopy, Prepared, Progress, Work
from automodel_conv.testing import assert_bytes_equal, guarded

CPU = torch.device("cpu")


def message(*runs, rank=1):
    return Message(rank, 0, sum(run.nbytes for run in runs), tuple(runs))


def run_of_rows(name, numel, offset=0, dtype="F32"):
    return Run(name, dtype, (numel,), (1,), offset)


def test_own_copies_cast_follow_strides_and_come_before_repeats_and_constants():
    source = torch.arange(12.0).reshape(3, 4).t()
    target = guarded((4, 3), torch.bfloat16, strides=(5, 1))
    again = guarded((12,), torch.bfloat16)
    piece = Piece(0, Box((4, 3), (3, 1), (3, 1)).canonical(), 0, 0)
    ones = Target("ones", "F32", (2, 2), -1, (), (), fills=(Fill(1.0, (2,), (2,), 1),))
    constant = torch.zeros(2, 2)
    work = Work(
        [],
        [],
        (OwnCopy("s", "t", piece),),
        (OwnCopy("t", "again", Piece(0, run_of(12), 0, 0)),),
        (ones,),
    )
    filled = {"t": target.tensor, "again": again.tensor, "ones": constant}
    progress = Progress()
    Prepared(work, {"s": source}, filled, CPU).run(None, progress)
    assert_bytes_equal(target.tensor, source.bfloat16())
    assert_bytes_equal(again.tensor, source.reshape(-1).bfloat16())
    assert constant.tolist() == [[0, 1], [0, 1]]
    target.check()
    again.check()
    assert progress == Progress(True, 0, True)


def test_refit_sees_the_values_that_the_tensors_have_when_it_runs():
    source, target = torch.zeros(4), torch.zeros(4)
    prepared = Prepared(
        Work([], [], (OwnCopy("s", "t", Piece(0, run_of(4), 0, 0)),)), {"s": source}, {"t": target}, CPU
    )
    for step in range(3):
        source.fill_(step)
        prepared.run(None, Progress())
        assert target.tolist() == [step] * 4


def test_strides_that_copies_cannot_follow_are_refused():
    source = torch.arange(15_000.0).reshape(2, 7500).t()  # steps of 3 elements do not follow rows of 2
    piece = Piece(0, Box((5000,), (3,), (1,)), 0, 0)
    with pytest.raises(UnsupportedError, match=r"cannot follow the strides of a tensor") as error:
        Prepared(Work([], [], (OwnCopy("s", "t", piece),)), {"s": source}, {"t": torch.zeros(5000)}, CPU)
    error.match(r"shape \[7500, 2\], strides \[1, 7500\]")
    error.match("make it contiguous")


@given(st.permutations(range(3)), st.permutations(range(3)))
def test_dimensions_of_both_tensors_may_be_in_any_order(of_source, of_target):
    shape = (2, 3, 4)
    values = torch.arange(24.0).reshape(shape)
    source = values.permute(of_source).contiguous().permute([of_source.index(dim) for dim in range(3)])
    target = torch.zeros([shape[dim] for dim in of_target]).permute([of_target.index(dim) for dim in range(3)])
    assert target.shape == shape
    piece = Piece(0, Box(shape, contiguous_strides(shape), contiguous_strides(shape)).canonical(), 0, 0)
    Prepared(Work([], [], (OwnCopy("s", "t", piece),)), {"s": source}, {"t": target}, CPU).run(None, Progress())
    assert_bytes_equal(target, values)


def work_of_three_rounds():
    receives = [
        [message(run_of_rows("first", 4), run_of_rows("long", 4))],
        [message(run_of_rows("long", 4, 4)), message(run_of_rows("second", 1), rank=2)],
        [message(run_of_rows("long", 4, 8))],
    ]
    return Work([[], [], []], receives, (OwnCopy("s", "own", Piece(0, run_of(1), 0, 0)),))


NAMES = ["first", "second", "long", "own", "empty"]


@pytest.mark.parametrize(
    ("progress", "new", "old", "broken"),
    [
        (Progress(), [], NAMES, []),
        (Progress(True, 0), ["empty"], ["second", "own"], ["first", "long"]),
        (Progress(True, 1), ["first", "empty"], ["own"], ["second", "long"]),
        (Progress(True, 2), ["first", "second", "empty"], ["own"], ["long"]),
        (Progress(True, 3), ["first", "second", "long", "empty"], [], ["own"]),
        (Progress(True, 3, True), NAMES, [], []),
    ],
    ids=["before", "first round", "second round", "third round", "own copies", "done"],
)
def test_states_follow_the_rounds(progress, new, old, broken):
    assert work_of_three_rounds().states(NAMES, progress, False) == (
        [name for name in NAMES if name in new],
        [name for name in NAMES if name in old],
        [name for name in NAMES if name in broken],
    )


def test_nothing_that_may_have_wrong_bytes_is_new():
    states = work_of_three_rounds().states(NAMES, Progress(True, 1), True)
    assert states == ([], ["own"], ["first", "second", "long", "empty"])
    assert work_of_three_rounds().states(NAMES, Progress(), True) == ([], NAMES, [])


def test_tensor_that_a_former_refit_wrote_in_part_is_not_old():
    work = work_of_three_rounds()
    assert work.states(NAMES, Progress(), False, ["long"]) == ([], ["first", "second", "own", "empty"], ["long"])
    new, old, broken = work.states(NAMES, Progress(True, 1), False, ["own", "first"])
    assert (new, old, broken) == (["first", "empty"], [], ["second", "long", "own"])


def test_copies_that_are_only_queued_make_nothing_new():
    states = work_of_three_rounds().states(NAMES, Progress(True, 2, is_queued=True), False)
    assert states == (["empty"], ["own"], ["first", "second", "long"])
    assert work_of_three_rounds().states(NAMES, Progress(True, 3, True, is_queued=True), False) == (NAMES, [], [])


def test_copy_that_fails_is_the_error_of_the_refit_and_later_ones_are_not_made():
    shared = torch.zeros(1, 4).expand(2, 4)  # torch refuses to write to it
    last = torch.zeros(4)
    work = Work(
        [],
        [],
        (OwnCopy("s", "shared", Piece(0, run_of(8), 0, 0)),),
        (OwnCopy("shared", "last", Piece(0, run_of(4), 0, 0)),),
    )
    progress = Progress()
    prepared = Prepared(work, {"s": torch.ones(8)}, {"shared": shared, "last": last}, CPU)
    with pytest.raises(RuntimeError, match="refers to a single memory location"):
        prepared.run(None, progress)
    assert (progress.has_begun, progress.is_done, progress.sent_wrong) == (True, False, False)
    assert last.tolist() == [0] * 4


def test_costs_are_those_of_the_messages():
    work = work_of_three_rounds()
    assert (work.bytes_sent, work.bytes_received, work.message_count) == (0, 4 * (4 + 4 + 4 + 1 + 4), 4)
    assert work.buffer_bytes == 2 * 32
    assert Work([[message(run_of_rows("a", 5))]], [[]]).buffer_bytes == 32  # one round needs one bucket
