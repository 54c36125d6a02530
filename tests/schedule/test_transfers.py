"""Tests of the moves of a refit, carried out one element at a time."""

from __future__ import annotations

import random
from collections import Counter
from math import prod

from hypothesis import given, settings

from automodel_conv.dtypes import itemsize
from automodel_conv.planning.boxes import Box, Piece, run_of
from automodel_conv.planning.copies import SourceTable, StridedCopy, Target
from automodel_conv.planning.plan import CopyPlan
from automodel_conv.schedule.transfers import Move, by_owner, message_of, transfers_of, units_of
from tests.planning.oracles import addressed, execute, pairs
from tests.planning.parts import SEEDS
from tests.planning.plans import random_plan


def moved(plan, moves, repeats=()):
    """Return all targets after moves and repeats, as flat lists of addresses."""
    sources = addressed(plan.sources)
    results = [[None] * prod(target.shape) for target in plan.targets]
    for move in moves:
        values = sources[plan.sources.names[move.part]]
        for read, write in pairs(move.piece):
            assert results[move.target][write] is None, "an element is moved twice"
            results[move.target][write] = values[read]
    for repeat in repeats:
        for read, write in pairs(repeat.piece):
            assert results[repeat.target][write] is None, "an element is repeated twice"
            assert results[repeat.first][read] is not None
            results[repeat.target][write] = results[repeat.first][read]
    return {target.name: result for target, result in zip(plan.targets, results, strict=True)}


def run_target(name, part, numel, dtype="F32", start=0):
    copy = StridedCopy(run_of(numel), (0,), (start,), (0,))
    return Target(name, dtype, (numel,), -1, (part,), (copy,))


@settings(max_examples=100)
@given(SEEDS)
def test_moves_fill_the_targets_of_any_plan(seed):
    _, plan = random_plan(seed)
    moves, repeats = transfers_of(plan)
    assert moved(plan, moves, repeats) == execute(plan, addressed(plan.sources))
    for move in moves:
        assert move.nbytes == move.piece.box.numel * itemsize(plan.targets[move.target].dtype)
        assert move.piece == move.piece.canonical()


def test_elements_that_several_targets_take_are_moved_once():
    table = SourceTable(["a"], ["F32"], [(12,)])
    transposed = StridedCopy(Box((4, 3), (1, 4), (3, 1)), (0,), (0,), (0,))
    targets = (
        run_target("whole", 0, 12),
        run_target("again", 0, 12),
        Target("turned", "F32", (4, 3), -1, (0,), (transposed,)),
        run_target("as bf16", 0, 12, "BF16"),
        run_target("half", 0, 6),
    )
    plan = CopyPlan(table, targets)
    moves, repeats = transfers_of(plan)
    assert [plan.targets[move.target].name for move in moves] == ["whole", "as bf16", "half"]
    assert {repeat.target for repeat in repeats} == {1, 2}
    assert moved(plan, moves, repeats) == execute(plan, addressed(table))


@settings(max_examples=100)
@given(SEEDS)
def test_units_are_bounded_and_move_the_same_elements(seed):
    rng, plan = random_plan(seed)
    most_bytes = rng.choice([4, 8, 16, 40, 1000])
    moves, repeats = transfers_of(plan)
    units = units_of(moves, most_bytes)
    assert all(0 < sum(move.nbytes for move in unit) <= most_bytes for unit in units)
    small = [move for unit in units for move in unit]
    assert moved(plan, small, repeats) == execute(plan, addressed(plan.sources))
    assert sorted(move.target for move in small) == [move.target for move in small]
    assert all(move.nbytes == move.piece.box.numel * move.itemsize for move in small)
    if most_bytes == 1000 and small:
        assert len(units) <= 1 + sum(move.nbytes for move in moves) // (most_bytes * 3 // 4)


def test_an_element_larger_than_a_unit_is_a_unit():
    move = Move(0, 0, Piece(0, run_of(3), 0, 0), 8, 24)
    assert [[m.nbytes for m in unit] for unit in units_of([move], 4)] == [[8], [8], [8]]


def test_parts_of_a_target_take_turns():
    moves = [Move(part, 0, Piece(0, run_of(8), 0, 8 * part), 1, 8) for part in range(3)]
    units = units_of(moves, 12)  # moves of three bytes
    assert [move.part for unit in units for move in unit] == [0, 1, 2] * 3


def test_moves_of_a_unit_go_to_the_owners_of_their_parts_in_order():
    unit = [Move(part, 0, Piece(0, run_of(1), 0, number), 1, 1) for number, part in enumerate([2, 0, 1, 0, 2])]
    owned = by_owner(unit, [7, 4, 7])
    assert {rank: [move.piece.target_offset for move in moves] for rank, moves in owned.items()} == {
        7: [0, 1, 3, 4],
        4: [2],
    }
    assert by_owner([], [7]) == {}


@given(SEEDS)
def test_moves_in_a_message_are_aligned_and_have_no_gaps(seed):
    rng = random.Random(seed)
    moves = []
    for _ in range(rng.randint(0, 8)):
        size, numel = rng.choice([1, 2, 4, 8]), rng.randint(1, 9)
        moves.append(Move(0, 0, Piece(0, run_of(numel), 0, 0), size, size * numel))
    placed, nbytes = message_of(moves)
    assert Counter(map(id, moves)) == Counter(id(each.move) for each in placed)
    at = 0
    for each in placed:
        assert each.offset_bytes == at
        assert at % each.move.itemsize == 0
        at += each.move.nbytes
    assert nbytes == at
