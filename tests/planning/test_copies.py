"""Tests of copies over the row of all sources: fewer pieces that move the same elements."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from automodel_conv.planning.boxes import SPAN, Box, Piece
from automodel_conv.planning.copies import SourceTable, StridedCopy, by_source, group_copies, group_pieces, over_sources

EXPERTS = 8192


def copy_of(columns, shape=(3,), strides=(1,)):
    ordinals, reads, writes = zip(*columns, strict=True)
    return StridedCopy(Box(shape, strides, strides), ordinals, reads, writes)


def again(copy):
    return [piece for walk in over_sources(copy) for piece in by_source(walk).pieces()]


PLACES = st.integers(0, 4)


@given(st.lists(st.tuples(PLACES, PLACES, PLACES), min_size=1, max_size=8), st.sampled_from([(), (1,), (3,), (2, 3)]))
def test_pieces_of_single_sources_come_back(columns, shape):
    copy = copy_of(columns, shape, (7, 2)[2 - len(shape) :] if shape else ())
    assert sorted(again(copy)) == sorted(piece.canonical() for piece in copy.pieces())


@pytest.mark.parametrize("step", [1, 2])
def test_evenly_spaced_experts_are_one_piece(step):
    copy = copy_of([(step * expert, 5, 3 * expert + 1) for expert in range(EXPERTS)])
    assert len(over_sources(copy)) == 1
    assert again(copy) == copy.pieces()


def test_gate_and_up_that_alternate_are_two():
    columns = [(part * EXPERTS + expert, 0, 6 * expert + 3 * part) for expert in range(EXPERTS) for part in (0, 1)]
    copy = copy_of(columns)
    assert len(over_sources(copy)) == 2
    assert sorted(again(copy)) == sorted(copy.pieces())


def test_gap_separates_two_runs():
    copy = copy_of([(0, 0, 0), (1, 0, 3), (3, 0, 6), (4, 0, 9)])
    assert len(over_sources(copy)) == 2
    assert again(copy) == copy.pieces()


def test_experts_in_falling_order_stay_separate():
    copy = copy_of([(0, 0, 6), (1, 0, 3), (2, 0, 0)])
    assert len(over_sources(copy)) == 3
    assert again(copy) == copy.pieces()


def test_runs_within_one_source_stay_separate():
    """They are not walks over sources: as one piece they would have another shape."""
    copy = copy_of([(0, 0, 0), (0, 6, 3), (0, 12, 6)])
    assert again(copy) == copy.pieces() == [Piece(0, Box((3,), (1,), (1,)), i * 6, i * 3) for i in range(3)]


COLUMNS = st.lists(st.lists(st.tuples(st.integers(0, 9), PLACES), max_size=4), min_size=1, max_size=4)
GEOMETRIES = st.sampled_from([((3,), (1,)), ((3, 3), (5, 1))])


@given(COLUMNS, st.data())
def test_copies_are_grouped_like_their_pieces(columns, data):
    places = iter(data.draw(st.permutations(range(sum(map(len, columns))))))
    copies = []
    for group in columns:
        shape, strides = data.draw(GEOMETRIES)
        of_group = tuple(zip(*[(source, 3 * read, 3 * next(places)) for source, read in group], strict=True))
        copies.append(StridedCopy(Box(shape, strides, strides), *(of_group or ((), (), ()))))
    assert group_copies(copies) == group_pieces([piece for copy in copies for piece in copy.pieces()])


def test_piece_that_walks_over_sources_in_two_dimensions_is_a_copy_of_each():
    walk = Piece(0, Box((2, 3, 4), (3 * SPAN, SPAN, 1), (24, 8, 1)), SPAN + 7, 100)
    writes = (100, 108, 116, 124, 132, 140)
    assert by_source(walk) == StridedCopy(Box((4,), (1,), (1,)), (1, 2, 3, 4, 5, 6), (7,) * 6, writes)


def test_sources_are_read_as_other_dtypes():
    sources = SourceTable(["a", "b", "c"], ["F32", "U8", "F32"], [(2, 3), (4, 8), ()])
    read = sources.read_as({0: "U8", 1: "F32", 2: "I16"})
    assert (read.dtypes, read.shapes) == (["U8", "F32", "I16"], [(2, 12), (4, 2), (2,)])
    assert read.stored == {0: ("F32", (2, 3)), 1: ("U8", (4, 8)), 2: ("F32", ())}
    assert (sources.dtypes, sources.stored) == (["F32", "U8", "F32"], {})


def test_sources_that_are_read_as_they_are_stay():
    sources = SourceTable(["a", "b"], ["F32", "U8"], [(2, 3), (4,)])
    assert sources.read_as({0: "F32"}) is sources
    assert sources.read_as({0: "F32", 1: "I16"}).stored == {1: ("U8", (4,))}
