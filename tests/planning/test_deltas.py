"""Tests of deltas: their places after a plan and their rectangles, against every element by itself."""

import itertools
from math import prod

import pytest
from hypothesis import given, settings

from automodel_conv.errors import UnsupportedError
from automodel_conv.planning.boxes import Box, Piece
from automodel_conv.planning.copies import Fallback, Target
from automodel_conv.planning.deltas import Block, Delta, blocks_of, chained, through
from automodel_conv.planning.regions import box
from tests.planning.plans import CHUNK, SEEDS, experts_plan, plan_of, random_plan, table, targets_of


def matrix(rows, columns, count=1):
    return Delta("m", 0, (count, rows, columns), 0, 1, rank=1)


def elements_of_pieces(pieces, deltas):
    """Return the delta, matrix, row and column of each element of a tensor, by a walk over all elements of pieces."""
    places = {}
    for piece in pieces:
        _, rows, columns = deltas[piece.source].shape
        for index in itertools.product(*map(range, piece.box.shape)):
            steps = list(zip(index, piece.box.source_strides, piece.box.target_strides, strict=True))
            read = piece.source_offset + sum(i * source for i, source, _ in steps)
            write = piece.target_offset + sum(i * target for i, _, target in steps)
            assert write not in places
            places[write] = (piece.source, read // (rows * columns), read // columns % rows, read % columns)
    return places


def elements_of_blocks(blocks):
    places = {}
    for block in blocks:
        for i, j in itertools.product(range(block.rows), range(block.columns)):
            write = block.offset + i * block.row_stride + j * block.column_stride
            assert write not in places
            row, column = block.row + i * block.row_step, block.column + j * block.column_step
            places[write] = (block.delta, block.matrix, row, column)
    return places


def placed_on_all(plan):
    """Return a delta for each matrix of a plan's sources, and pieces that place it there, stored plainly."""
    deltas = [matrix(*shape) for shape in plan.sources.shapes if len(shape) == 2]
    rows = [row for row, shape in enumerate(plan.sources.shapes) if len(shape) == 2]
    placed = {row: [deltas[i].onto(0, plan.sources.shapes[row][1], 1)._replace(source=i)] for i, row in enumerate(rows)}
    return deltas, placed


def expected_places(plan, target, placed, deltas):
    """Return the places of deltas in a target by a walk over all elements of the plan's copies."""
    found = {}
    for copy in target.copies:
        for piece in copy.pieces():
            row = target.sources[piece.source]
            before = elements_of_pieces(placed.get(row, ()), deltas)
            for index in itertools.product(*map(range, piece.box.shape)):
                steps = list(zip(index, piece.box.source_strides, piece.box.target_strides, strict=True))
                read = piece.source_offset + sum(i * source for i, source, _ in steps)
                write = piece.target_offset + sum(i * step for i, _, step in steps)
                if read in before:
                    found[write] = before[read]
    return found


def test_delta_is_placed_by_the_strides_of_its_tensor():
    delta = matrix(2, 3, count=2)
    assert delta.numel == 12
    plain = elements_of_pieces([delta.onto(0, 3, 1, 6)], [delta])
    assert plain == {6 * e + 3 * i + j: (0, e, i, j) for e in range(2) for i in range(2) for j in range(3)}
    transposed = elements_of_pieces([delta.onto(5, 1, 2, 6)], [delta])
    assert transposed == {5 + 6 * e + i + 2 * j: (0, e, i, j) for e in range(2) for i in range(2) for j in range(3)}


@given(SEEDS)
@settings(max_examples=60, deadline=None)
def test_deltas_have_their_places_after_any_plan(seed):
    _, plan = random_plan(seed)
    deltas, placed = placed_on_all(plan)
    [(name, pieces)] = through(plan, placed).items()
    expected = expected_places(plan, plan.target(name), placed, deltas)
    assert len(expected) == prod(plan.target(name).shape)
    assert elements_of_pieces(pieces, deltas) == expected
    assert elements_of_blocks(blocks_of(pieces, deltas)) == expected


@given(SEEDS)
@settings(max_examples=60, deadline=None)
def test_deltas_have_their_places_in_a_part_of_the_plan(seed):
    rng, plan = random_plan(seed)
    shape = plan.target("result").shape
    bounds = [sorted((rng.randint(0, size), rng.randint(0, size))) for size in shape]
    offsets, lengths = [low for low, _ in bounds], [high - low for low, high in bounds]
    part = plan.shard({"result": box(shape, offsets, lengths)})
    deltas, placed = placed_on_all(plan)
    pieces = through(part, placed).get("result", [])
    target = part.target("result")
    expected = expected_places(part, target, placed, deltas)
    assert len(expected) == prod(target.shape)
    assert elements_of_blocks(blocks_of(pieces, deltas)) == expected


def test_stack_has_a_block_for_each_of_its_matrices():
    delta = matrix(2, 3, count=4)
    blocks = blocks_of([delta.onto(0, 1, 2, 6)], [delta])
    assert blocks == [Block(0, e, 0, 1, 2, 0, 1, 3, 6 * e, 1, 2) for e in range(4)]


def test_targets_without_deltas_are_left_out():
    plan = experts_plan()
    delta = matrix(3, 4)
    assert list(through(plan, {0: [delta.onto(0, 4, 1)]})) == ["gate_up"]
    assert through(plan, {}) == {}


def test_target_with_other_elements_of_the_same_source_is_left_out():
    sources = table(fused=(4, 2))
    plan = plan_of(sources, targets_of(sources, [["fused"]], [CHUNK], ["low", "high"]))
    upper = matrix(2, 2)
    assert through(plan, {0: [upper.onto(4, 2, 1)]}) == {"high": [Piece(0, Box((4,), (1,), (1,)), 0, 0)]}


def test_target_that_upstream_code_computes_is_refused():
    sources = table(w=(2, 3))
    target = Target("w", "BF16", (2, 3), -1, (0,), (), fallback=Fallback("no copy", dict))
    plan = plan_of(sources, [target])
    with pytest.raises(
        UnsupportedError, match=r"w is computed by transformers' own code(.|\n)*merge the adapter with PEFT"
    ):
        through(plan, {0: [matrix(2, 3).onto(0, 3, 1)]})


def test_rows_and_columns_of_a_transposed_block_are_exchanged():
    block = Block(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10)
    assert block.transposed() == Block(0, 1, 5, 6, 7, 2, 3, 4, 8, 10, 9)
    assert block.transposed().transposed() == block
    assert block.transposed().stop == block.stop == 8 + 3 * 9 + 6 * 10 + 1
    assert (block.row_slice, block.column_slice) == (slice(2, 12, 3), slice(5, 42, 6))
    assert len(range(100)[block.row_slice]) == 4
    assert len(range(100)[block.column_slice]) == 7


def test_rows_that_are_cut_are_refused():
    delta = matrix(4, 6)
    runs = Piece(0, Box((3, 8), (8, 1), (8, 1)), 0, 0)
    with pytest.raises(UnsupportedError, match="cut into parts of rows"):
        blocks_of([runs], [delta])


def test_places_that_have_no_strides_are_refused_by_the_name_of_the_tensor():
    first = [Piece(0, Box((2, 3), (3, 1), (3, 1)), 0, 0)]
    assert chained([], Piece(0, Box((6,), (1,), (1,)), 0, 0), 6, "w") == []
    flipped = Piece(0, Box((4,), (-1,), (1,)), 3, 0)
    with pytest.raises(UnsupportedError, match="no regular places in w"):
        chained(first, flipped, 6, "w")
