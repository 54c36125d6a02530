"""Tests of the contents of a storage: pieces are found by the elements that they write."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from automodel_conv.planning.boxes import Box, Piece, run_of
from automodel_conv.planning.storage_contents import StorageContents

NUMEL = 60


def contents_of(pieces):
    contents = StorageContents(4, NUMEL)
    contents.replace([], pieces)
    return contents


def runs(lengths, gap=0):
    starts = [sum(lengths[:index]) + gap * index for index in range(len(lengths))]
    return [Piece(0, run_of(length), 0, start) for length, start in zip(lengths, starts, strict=True)]


@given(
    lengths=st.lists(st.integers(1, 6), max_size=8),
    gap=st.integers(0, 1),
    bounds=st.tuples(st.integers(0, NUMEL - 1), st.integers(0, NUMEL - 1)).map(sorted),
    order=st.randoms(use_true_random=False),
)
def test_pieces_near_elements_are_those_that_write_them(lengths, gap, bounds, order):
    pieces = runs(lengths, gap)
    shuffled = order.sample(pieces, len(pieces))
    first, last = bounds
    near = contents_of(shuffled).near(first, last)
    assert near == [
        piece for piece in pieces if piece.target_offset <= last and piece.target_offset + piece.box.numel > first
    ]


def test_piece_with_strides_is_near_the_elements_between_its_own():
    apart = Piece(0, Box((3,), (1,), (10,)), 0, 5)
    contents = contents_of([apart, *runs([2])])
    assert contents.near(12, 13) == [apart]
    assert contents.near(26, 40) == []


def test_replaced_pieces_are_gone():
    old, kept = runs([3, 4])
    contents = contents_of([old, kept])
    new = Piece(0, run_of(2), 7, 0)
    contents.replace([old], [new])
    assert contents.near(0, NUMEL) == [new, kept]
    assert sorted(contents.pieces) == sorted([new, kept])
    assert contents.near(2, 2) == []


def test_one_of_two_pieces_with_one_start_is_replaced():
    one, other = (Piece(0, Box((2,), (1,), (stride,)), 0, 4) for stride in (2, 3))
    contents = contents_of([one, other])
    contents.replace([other], [])
    assert contents.pieces == [one]
