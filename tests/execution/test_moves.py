"""Tests of the verb chosen for each copy: by example, and by running the moves one element at a time."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from automodel_conv.execution import moves as module
from automodel_conv.execution.moves import CopyGeometry
from automodel_conv.kernels.interleave import INTERLEAVE
from automodel_conv.kernels.verbs import VERBS
from automodel_conv.planning.boxes import Box, contiguous_strides
from automodel_conv.planning.copies import StridedCopy

SOURCE_BYTES, TARGET_BYTES = 2, 4  # different, so that mixing them up shows
APART = 1 << 20  # bytes from one tensor to the next


def copy(shape, source_strides, target_strides, *columns):
    """Build a copy; each column is (ordinal, source offset, target offset)."""
    return StridedCopy(
        Box(shape, source_strides, target_strides), *(tuple(column) for column in zip(*columns, strict=True))
    )


def elements_of_copy(a_copy):
    """Return every (ordinal, source element, target element) of a copy."""
    elements = []
    for ordinal, source, target in zip(a_copy.ordinals, a_copy.source_offsets, a_copy.target_offsets, strict=True):
        for index in itertools.product(*map(range, a_copy.box.shape)):
            read = source + sum(i * s for i, s in zip(index, a_copy.box.source_strides, strict=True))
            written = target + sum(i * s for i, s in zip(index, a_copy.box.target_strides, strict=True))
            elements.append((ordinal, read, written))
    return sorted(elements)


def moves_of(a_copy, verbs=VERBS):
    """Return the moves of copies whose sources are far from each other."""
    form = CopyGeometry(a_copy.box, SOURCE_BYTES, TARGET_BYTES)
    sources = np.array(a_copy.ordinals, np.int64) * APART + np.array(a_copy.source_offsets, np.int64) * SOURCE_BYTES
    return module.choose_verb(form, sources, np.array(a_copy.target_offsets, np.int64) * TARGET_BYTES, verbs)


def elements_of_moves(moves):
    """Return the same for moves, by the definition of each verb, with unpaired places by their geometry."""
    elements = []
    verb, (_, (rows, columns)) = moves.verb.name, moves.verb.shapes(moves.matrix)
    *_, source_stride, target_stride = moves.matrix
    for k in range(len(moves.sources[0])):
        targets = [int(column[k]) // TARGET_BYTES for column in moves.targets]
        for r, c in itertools.product(range(rows), range(columns)):
            for lane, column in enumerate(moves.sources):
                ordinal, source = divmod(int(column[k]), APART)
                read = source // SOURCE_BYTES + r * source_stride + c
                if verb == "strided_copy":
                    written = targets[0] + r * target_stride + c
                elif verb == "transpose":
                    written = targets[0] + c * target_stride + r
                elif verb == "interleave":
                    written = targets[0] + c * target_stride + len(moves.sources) * r + lane
                else:
                    written = targets[c % 2] + c // 2 * target_stride + r
                elements.append((ordinal, read, written))
    for _, address, target in zip(*moves.unpaired, strict=True):
        ordinal, source = divmod(int(address), APART)
        unpaired = StridedCopy(
            moves.unpaired_geometry.box, (ordinal,), (source // SOURCE_BYTES,), (int(target) // TARGET_BYTES,)
        )
        elements += elements_of_copy(unpaired)
    return sorted(elements)


# The copies of experts: E = 3, I = 4, H = 5.
COPIES = {
    "one run": ("strided_copy", (1, 20), copy((20,), (1,), (1,), (0, 0, 0), (1, 0, 20))),
    "one element": ("strided_copy", (1, 1), copy((), (), (), (0, 7, 0), (1, 7, 1))),
    "rows of a wider target": ("strided_copy", (4, 5), copy((4, 5), (5, 1), (10, 1), (0, 0, 0), (1, 0, 5))),
    "experts of a wider target": ("strided_copy", (4, 5), copy((3, 4, 5), (20, 5, 1), (80, 10, 1), (0, 0, 0))),
    "one row for all": ("strided_copy", (4, 5), copy((4, 5), (0, 1), (5, 1), (0, 0, 0))),
    "up and gate of [E, H, 2I]": ("transpose", (4, 5), copy((5, 4), (1, 5), (8, 1), (0, 0, 0), (1, 0, 4))),
    "grouped experts": ("transpose", (4, 5), copy((3, 5, 4), (20, 1, 5), (20, 4, 1), (0, 0, 0))),
    "gate and up alternating": (
        "interleave",
        (4, 5),
        copy((5, 4), (1, 5), (8, 2), (0, 0, 0), (2, 0, 40), (1, 0, 1), (3, 0, 41)),
    ),
    "grouped gate and up, alternating": (
        "interleave",
        (4, 5),
        copy((3, 5, 4, 2), (40, 1, 5, 20), (40, 8, 2, 1), (0, 0, 0)),
    ),
    "alternating gate and up to two targets": (
        "deinterleave",
        (5, 8),
        copy((4, 5), (2, 8), (5, 1), (0, 0, 0), (0, 1, 20), (1, 0, 40), (1, 1, 60)),
    ),
    "grouped alternating gate and up to two targets": (
        "deinterleave",
        (5, 8),
        copy((3, 2, 4, 5), (40, 1, 2, 8), (40, 20, 5, 1), (0, 0, 0)),
    ),
}


@pytest.mark.parametrize("name", COPIES)
def test_copies_of_experts_use_their_verb(name):
    verb, shape, a_copy = COPIES[name]
    moves = moves_of(a_copy)
    assert moves is not None
    assert (moves.verb.name, moves.verb.shapes(moves.matrix)[1]) == (verb, shape)
    assert not len(moves.unpaired.copies)
    assert elements_of_moves(moves) == elements_of_copy(a_copy)


NO_KERNEL = {
    "alternating, not turned": copy((5, 4), (4, 1), (8, 2), (0, 0, 0), (0, 20, 1)),
    "three alternating": copy((5, 4), (1, 5), (12, 3), (0, 0, 0)),
    "every other element": copy((20,), (2,), (1,), (0, 0, 0)),
}


@pytest.mark.parametrize("name", NO_KERNEL)
def test_other_copies_are_left_to_torch(name):
    assert moves_of(NO_KERNEL[name]) is None


LONE = {
    "a gate without an up": (copy((5, 4), (1, 5), (8, 2), (0, 0, 0)), [0]),
    "gates, one without an up": (copy((5, 4), (1, 5), (8, 2), (0, 0, 0), (1, 0, 1), (2, 0, 40)), [2]),
    "gate and up with a gap": (copy((5, 4), (1, 5), (16, 2), (0, 0, 0), (1, 0, 8)), [0, 1]),
    "halves of two sources": (copy((4, 5), (2, 8), (5, 1), (0, 0, 0), (1, 1, 20)), [0, 1]),
    "a half read twice": (copy((4, 5), (2, 8), (5, 1), (0, 0, 0), (0, 0, 20), (0, 1, 40)), [0]),
}


@pytest.mark.parametrize("name", LONE)
def test_halves_without_a_partner_are_unpaired(name):
    a_copy, unpaired = LONE[name]
    moves = moves_of(a_copy)
    assert sorted(moves.unpaired.copies.tolist()) == unpaired
    assert elements_of_moves(moves) == elements_of_copy(a_copy)


def test_verb_of_more_sources_gets_as_many_neighbours():
    a_copy = copy((5, 4), (1, 5), (12, 3), *((k, 0, at) for k, at in enumerate((61, 0, 2, 1, 60, 120, 121, 122))))
    assert moves_of(a_copy) is None
    three = replace(INTERLEAVE, sources=3, steps=(1, 3), shapes=lambda matrix: ((matrix.columns, 0), matrix[:2]))
    moves = moves_of(a_copy, (*VERBS, three))
    assert len(moves.sources) == 3
    assert sorted(moves.unpaired.copies.tolist()) == [0, 4]
    assert elements_of_moves(moves) == elements_of_copy(a_copy)


def test_many_tiny_matrices_are_left_to_torch(monkeypatch):
    a_copy = copy((6, 3, 3), (9, 1, 3), (9, 3, 1), (0, 0, 0))
    assert moves_of(a_copy) is not None
    monkeypatch.setattr(module, "_MOST_MATRICES", 5)
    assert moves_of(a_copy) is None


def test_empty_copy_is_an_empty_move():
    for shape in ((0,), (3, 0), (0, 3)):
        moves = moves_of(copy(shape, contiguous_strides(shape), contiguous_strides(shape), (0, 0, 0)))
        assert moves is None or elements_of_moves(moves) == []


@given(
    sizes=st.lists(st.integers(1, 4), min_size=0, max_size=4),
    source_order=st.permutations(range(4)),
    target_order=st.permutations(range(4)),
    steps=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    columns=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3)), min_size=1, max_size=4),
    lanes=st.booleans(),
)
def test_moves_read_and_write_the_elements_of_the_copy(sizes, source_order, target_order, steps, columns, lanes):
    strides = []
    for order, step in ((source_order, steps[0]), (target_order, steps[1])):
        side = [0] * len(sizes)
        for dim in (dim for dim in order if dim < len(sizes)):
            side[dim], step = step, step * sizes[dim]
        strides.append(tuple(side))
    total = 2 * int(np.prod(sizes, dtype=np.int64))
    if lanes:
        columns = [(column[0], column[1] + lane) for column in columns for lane in (0, 1)]
    targets = [total * (k // 2) + k % 2 if lanes else total * k for k in range(len(columns))]
    a_copy = StridedCopy(
        Box(tuple(sizes), *strides), tuple(o for o, _ in columns), tuple(s for _, s in columns), tuple(targets)
    )
    moves = moves_of(a_copy)
    if moves is not None:
        assert elements_of_moves(moves) == elements_of_copy(a_copy)
