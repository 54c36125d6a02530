"""Tests of rectangles of codes that are decoded straight to a target, against the elements that the move copies."""

from itertools import product
from math import prod

import numpy as np
import pytest

from automodel_conv.planning.boxes import Box
from automodel_conv.planning.copies import Decode
from automodel_conv.schedule.code_rectangles import find_rectangles
from automodel_conv.schedule.coded_source import CodedSource
from automodel_conv.schedule.jobs import Move
from tests.schedule.coded import VIEWS, File, pairs, taken

SHAPES = [(1, 4, 4), (2, 6, 8), (3, 5, 6), (2, 1, 2), (1, 1, 4)]
STRAIGHT = set(VIEWS) - {"every other column", "an odd column", "halves of columns separately"}


def source_of(shape, block=(2, 2), bits=8):
    file = File()
    stored = np.zeros((*shape[:-1], shape[-1] * bits // 8), np.uint8)
    file.add("w", "F8_E4M3" if bits == 8 else "U8", stored)
    return CodedSource(0, Decode("e4m3" if bits == 8 else "e2m1", shape[-2:], block, 1), file, "F32")


def elements(rectangles, columns):
    """Return the source and target elements of everything that rectangles write."""
    return [
        (
            one.element + row * one.row_step * columns + column,
            one.target_offset + row * one.target_strides[0] + column * one.target_strides[1],
        )
        for one in rectangles
        for row in range(one.shape[0])
        for column in range(one.shape[1])
    ]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("view", VIEWS)
def test_rectangles_write_the_elements_of_the_move(view, shape):
    view_taken = taken(view, prod(shape), shape)
    if view_taken is None:
        return
    box, start = view_taken[0].box, view_taken[0].source_offset
    for bits, block in product((8, 4), [(1, 2), (2, 2), (3, 4), (128, 128)]):
        source = source_of(shape, block, bits)
        rectangles = find_rectangles(Move(3, "F32", box, start, 100), source)
        if rectangles is None:
            continue
        assert sorted(elements(rectangles, shape[-1])) == sorted(pairs(box, start, 100))
        for one in rectangles:
            assert one.target == 3
            row = one.element // shape[-1] % source.matrix_rows
            assert row + (one.shape[0] - 1) * one.row_step < source.matrix_rows
            assert one.element % shape[-1] + one.shape[1] <= shape[-1]


@pytest.mark.parametrize("view", sorted(STRAIGHT))
def test_most_views_of_whole_bytes_need_no_window(view):
    (piece, _), source = taken(view, 96, (2, 6, 8)), source_of((2, 6, 8), (1, 2))
    assert find_rectangles(Move(0, "F32", piece.box, piece.source_offset, 0), source) is not None


def test_columns_with_gaps_need_a_window():
    box = Box((4, 4), (8, 2), (4, 1))
    assert find_rectangles(Move(0, "F32", box, 0, 0), source_of((1, 4, 8))) is None


@pytest.mark.parametrize(("start", "width"), [(1, 4), (3, 4), (0, 3), (3, 1)])
def test_halves_of_bytes_need_a_window(start, width):
    move = Move(0, "F32", Box((4, width), (8, 1), (width, 1)), start, 0)
    assert find_rectangles(move, source_of((1, 4, 8), bits=4)) is None
    assert find_rectangles(move, source_of((1, 4, 8), bits=8)) is not None


@pytest.mark.parametrize(
    ("step", "block_rows", "straight"),
    [(2, 4, True), (4, 2, True), (3, 2, False), (2, 3, False), (6, 4, False), (3, 12, True)],
)
def test_rows_with_gaps_must_agree_with_blocks(step, block_rows, straight):
    move = Move(0, "F32", Box((12 // step, 4), (4 * step, 1), (4, 1)), 0, 0)
    rectangles = find_rectangles(move, source_of((1, 12, 4), (block_rows, 4)))
    assert (rectangles is not None) is straight


@pytest.mark.parametrize(("matrices", "straight"), [(1024, True), (1025, False)])
def test_too_many_rectangles_need_a_window(matrices, straight):
    move = Move(0, "F32", Box((matrices, 2, 2), (6, 2, 1), (4, 2, 1)), 0, 0)
    assert (find_rectangles(move, source_of((matrices, 3, 2), (2, 2))) is not None) is straight
