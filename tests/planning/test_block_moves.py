"""Tests of moves of blocks: none is taken for one that a loop over all elements finds to break a block."""

from collections import defaultdict
from itertools import product

import pytest

from automodel_conv.planning import values
from automodel_conv.planning.block_moves import has_same_blocks
from automodel_conv.planning.copies import Decode, SourceTable, Target
from automodel_conv.planning.lowering import copies_of
from automodel_conv.planning.plan import CopyPlan
from automodel_conv.planning.values import leaf
from tests.planning.oracles import addressed, execute


def rolled(value, rows):
    """Move the first rows behind the others."""
    parts = (values.narrow(value, 0, rows, value.shape[0] - rows), values.narrow(value, 0, 0, rows))
    return values.concatenate(parts, 0)


def stacked_halves(value):
    return values.reshape(value, (2, value.shape[0] // 2, value.shape[1]))


MOVES = {
    "none": lambda value: value,
    "transposed": lambda value: values.transpose(value, 0, 1),
    "rolled by 2": lambda value: rolled(value, 2),
    "rolled by 1": lambda value: rolled(value, 1),
    "stacked halves": stacked_halves,
    "alternating halves": lambda value: values.reshape(
        values.permute(stacked_halves(value), (1, 0, 2)), (value.shape[0], value.shape[1])
    ),
    "reversed": lambda value: values.concatenate(
        [values.narrow(value, 0, row, 1) for row in reversed(range(value.shape[0]))], 0
    ),
}


def block_of(element, matrix, block):
    """Return the block of an element in a stack of matrices."""
    row, column = divmod(element, matrix[1])
    stack, row = divmod(row, matrix[0])
    return stack, row // block[0], column // block[1]


def blocks_stay(moved, source, target):
    """Return whether every block of the source is one of the target."""
    new_blocks = defaultdict(set)
    for new, (_, old) in enumerate(moved):
        new_blocks[block_of(old, source.matrix, source.block)].add(block_of(new, target.matrix, target.block))
    found = [block for blocks in new_blocks.values() for block in blocks]
    return len(found) == len(new_blocks) == len(set(found))


@pytest.mark.parametrize("shape", [(4, 6), (8, 4), (4, 4), (6, 3)], ids=str)
@pytest.mark.parametrize("block", [(2, 2), (2, 1), (1, 2), (4, 3), (1, 1)], ids=str)
@pytest.mark.parametrize(("name", "move"), MOVES.items(), ids=MOVES)
def test_blocks_are_the_same_only_if_a_loop_over_elements_finds_them(name, move, block, shape):
    value = move(leaf(0, shape))
    target = Target("new", "F8_E4M3", value.shape, 0, (0,), copies_of(value))
    plan = CopyPlan(SourceTable(["old"], ["F8_E4M3"], [shape]), (target,), ("a rule",))
    moved = execute(plan, addressed(plan.sources))["new"]
    source = Decode("e4m3", shape, block, 1)
    found = []
    for new_block in {block, block[::-1]}:
        decode = Decode("e4m3", value.shape[-2:], new_block, 1)
        found.append(has_same_blocks(source, decode, target.copies, 0))
        # Other moves may be refused too: of rows to another place in their block, and of blocks that are cut off.
        assert not found[-1] or blocks_stay(moved, source, decode)
    if name in ("none", "transposed"):
        assert any(found)
    if name == "rolled by 2" and block[0] <= 2:
        assert any(found)
    if name in ("rolled by 1", "alternating halves", "reversed") and block[0] > 1:
        assert not any(found)


def test_only_the_copies_of_a_source_count():
    sources = [leaf(0, (4, 4)), leaf(1, (4, 4))]
    value = values.concatenate([sources[0], rolled(sources[1], 1)], 0)
    source, target = Decode("e4m3", (4, 4), (2, 2), 2), Decode("e4m3", (8, 4), (2, 2), 2)
    assert [has_same_blocks(source, target, copies_of(value), ordinal) for ordinal in range(2)] == [True, False]


@pytest.mark.parametrize("block", [*product((1, 2), repeat=2)], ids=str)
def test_other_sizes_of_blocks_are_not_the_same(block):
    source, target = Decode("e4m3", (4, 4), block, 1), Decode("e4m3", (4, 4), (4, 4), 1)
    assert not has_same_blocks(source, target, copies_of(leaf(0, (4, 4))), 0)
