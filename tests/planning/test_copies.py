"""Tests of copies over the row of all sources: fewer pieces that move the same elements."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from automodel_conv import open_checkpoint
from automodel_conv.planning.boxes import SPAN, Box, Piece
from automodel_conv.planning.copies import (
    Places,
    SourceTable,
    StridedCopy,
    by_source,
    group_copies,
    group_pieces,
    over_sources,
)

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


def test_the_table_of_a_checkpoint_has_the_places_of_its_tensors(tmp_path):
    for file, names in (("one", "ab"), ("two", "c")):
        save_file({name: torch.full((3,), ord(name)) for name in names}, tmp_path / f"{file}.safetensors")
    index = {"weight_map": {"a": "one.safetensors", "b": "one.safetensors", "c": "two.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    table = SourceTable.from_checkpoint(open_checkpoint(tmp_path))
    for name, file, at in zip(table.names, table.places.file_ids, table.places.offsets, strict=True):
        path = table.places.files[file]
        assert path.endswith({"a": "/one", "b": "/one", "c": "/two"}[name] + ".safetensors")
        with open(path, "rb") as data:
            assert data.read()[at : at + 24] == torch.full((3,), ord(name)).numpy().tobytes()


def test_places_do_not_distinguish_tables():
    names, dtypes, shapes = ["a"], ["BF16"], [(2,)]
    placed = SourceTable(names, dtypes, shapes, places=Places(("file",), [0], [8]))
    assert placed == SourceTable(names, dtypes, shapes)
    assert "file" not in repr(placed)
    assert placed.read_as({0: "U8"}).places == placed.places
