"""Tests of pieces that read origins: casts, and elements of other sizes."""

from __future__ import annotations

import pytest
import torch

from automodel_conv.planning.boxes import SPAN, Box, NotAffine, Piece, run_of
from automodel_conv.planning.loader_writes import View
from automodel_conv.planning.origin_space import OriginSpace, finer_walk
from automodel_conv.planning.origins import Number, Read, Unknown

BF16 = Read(2, torch.bfloat16, torch.bfloat16)
COMPUTED = Unknown("aten.add.Tensor", frozenset([5, 6]))


@pytest.fixture
def space():
    return OriginSpace()


def test_pieces_keep_their_origin_and_their_place_in_it(space):
    piece = Piece(0, run_of(4), 3, 8)
    moved = space.moved_from(piece, Read(0, torch.float32, torch.float32))
    other = space.moved_from(moved, BF16)
    assert (space.origin(moved).row, space.origin(other).row) == (0, 2)
    assert {one.source_offset % SPAN for one in (moved, other)} == {3}
    assert other.target_offset == 8


def test_equal_origins_have_one_number(space):
    piece = Piece(0, run_of(4), 0, 0)
    assert space.moved_from(piece, BF16) == space.moved_from(piece, Read(*BF16))


@pytest.mark.parametrize("origin", [Number(1.5, torch.float32), COMPUTED])
def test_origin_without_places_is_read_at_one(space, origin):
    view = View(1, torch.float32, 3, (2, 3), (6, 2))
    piece = space.uniform(view, origin)
    assert space.origin(piece) == origin
    assert (piece.target_offset, piece.box.source_strides, piece.box.numel) == (3, (0,) * len(piece.box.shape), 6)
    assert space.moved_from(Piece(0, Box((2, 3), (3, 1), (6, 2)), 4, 3), origin) == piece


def test_rows_of_pieces_are_those_of_their_origins(space):
    view = View(1, torch.float32, 0, (2,), (1,))
    pieces = [space.uniform(view, origin) for origin in (COMPUTED, BF16, Number(0, torch.float32))]
    assert space.rows(pieces) == {2, 5, 6}
    assert space.rows([]) == frozenset()


def test_elements_are_viewed_and_then_cast(space):
    piece = space.moved_from(Piece(0, run_of(4), 1, 0), BF16)
    assert space.cast(piece, torch.bfloat16, torch.bfloat16) is piece
    assert space.origin(space.cast(piece, torch.float16, torch.float32)) == Read(2, torch.float16, torch.float32)


def test_parts_of_elements_and_elements_of_parts_are_the_same_bytes(space):
    piece = space.moved_from(Piece(0, Box((3, 4), (8, 1), (4, 1)), 2, 12), BF16)
    parts = space.finer(piece, 2)
    assert space.origin(parts) == Read(2, torch.uint8, torch.uint8)
    assert (parts.box, parts.source_offset % SPAN, parts.target_offset) == (Box((3, 8), (16, 1), (8, 1)), 4, 24)
    assert space.coarser(parts, 2, torch.bfloat16) == piece


@pytest.mark.parametrize(
    "piece",
    [
        Piece(0, run_of(3), 0, 0),
        Piece(0, run_of(4), 1, 0),
        Piece(0, run_of(4), 0, 1),
        Piece(0, Box((2, 2), (3, 1), (2, 1)), 0, 0),
        Piece(0, Box((2, 2), (2, 1), (3, 1)), 0, 0),
        Piece(0, Box((4,), (2,), (1,)), 0, 0),
    ],
)
def test_parts_that_are_apart_make_no_elements(space, piece):
    parts = space.moved_from(piece, Read(0, torch.uint8, torch.uint8))
    with pytest.raises(NotAffine, match="parts of elements are apart"):
        space.coarser(parts, 2, torch.int16)


def test_bytes_of_what_was_cast_are_unknown(space):
    piece = space.moved_from(Piece(0, run_of(4), 0, 0), Read(7, torch.float32, torch.bfloat16))
    assert space.origin(space.finer(piece, 2)) == Unknown(
        "views torch.bfloat16, cast from torch.float32, in parts", frozenset([7])
    )
    with pytest.raises(NotAffine, match="cast from"):
        space.coarser(piece, 2, torch.float32)


def test_constants_have_equal_parts_or_none(space):
    view = View(1, torch.int32, 0, (4,), (1,))
    equal, others = (space.uniform(view, Number(number, torch.int32)) for number in (0x01010101, 1))
    assert space.origin(space.finer(equal, 4)) == Number(1, torch.uint8)
    assert isinstance(space.origin(space.finer(others, 4)), Unknown)
    assert space.origin(space.coarser(equal, 2, torch.int64)) == Number(0x0101010101010101, torch.int64)


def test_walk_over_parts_takes_each_of_them():
    walk = Piece(0, Box((2,), (5,), (3,)), SPAN + 1, 2)
    assert finer_walk(walk, 1) is walk
    assert finer_walk(walk, 4) == Piece(0, Box((2, 4), (20, 1), (12, 1)), SPAN + 4, 8)
