"""Tests of arrangements against loops over the elements of the stored matrix."""

import itertools
from math import prod

import pytest

from automodel_conv.planning.arrangement import PLAIN, TRANSPOSED, Arrangement, permuted_words, rows_in_words
from automodel_conv.planning.lowering import copies_of
from automodel_conv.planning.values import leaf
from tests.planning import oracles

AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


def viewed(arrangement, shape):
    """Return the shape of a view, and the stored element of each element of it."""
    value = arrangement.view(leaf(0, shape))
    written = oracles.written(piece for copy in copies_of(value) for piece in copy.pieces())
    assert sorted(written) == list(range(prod(value.shape)))
    return value.shape, [written[at][1] for at in range(prod(value.shape))]


def elementwise(shape, weight, place):
    """Return what ``viewed`` returns, given the row and column of the weight for each stored row and column."""
    *lead, rows, columns = shape
    new_rows, new_columns = weight
    elements = {}
    for matrix, row, column in itertools.product(range(prod(lead)), range(rows), range(columns)):
        new_row, new_column = place(row, column)
        if new_row < new_rows and new_column < new_columns:
            elements[(matrix * new_rows + new_row) * new_columns + new_column] = (
                matrix * rows + row
            ) * columns + column
    assert sorted(elements) == list(range(prod(lead) * new_rows * new_columns))
    return (*lead, *weight), [elements[at] for at in range(len(elements))]


LEADS = [(), (3,), (1, 2), (0,)]


@pytest.mark.parametrize("lead", LEADS, ids=str)
@pytest.mark.parametrize(("rows", "columns"), [(3, 5), (4, 4), (1, 1), (1, 4), (4, 1), (0, 4), (4, 0)])
def test_plain_and_transposed(lead, rows, columns):
    shape = (*lead, rows, columns)
    assert viewed(PLAIN, shape) == elementwise(shape, (rows, columns), lambda r, c: (r, c))
    assert viewed(TRANSPOSED, shape) == elementwise(shape, (columns, rows), lambda r, c: (c, r))
    assert PLAIN.shape((rows, columns)) == (rows, columns)
    assert TRANSPOSED.shape((rows, columns)) == (columns, rows)


@pytest.mark.parametrize("lead", LEADS, ids=str)
@pytest.mark.parametrize("size", [1, 2, 8])
@pytest.mark.parametrize(("rows", "words"), [(3, 5), (4, 4), (1, 1), (0, 2), (2, 0)])
def test_rows_in_words(lead, size, rows, words):
    """Check that word (r, c) holds rows ``size * r`` and up of column c, as GPTQ packs the rows of its matrix."""
    shape = (*lead, rows, words * size)
    arrangement = rows_in_words(size)
    expected = elementwise(shape, (rows * size, words), lambda r, c: (r * size + c % size, c // size))
    assert viewed(arrangement, shape) == expected
    expected = elementwise(shape, (words, rows * size), lambda r, c: (c // size, r * size + c % size))
    assert viewed(arrangement.transposed(), shape) == expected
    assert arrangement.shape(shape[-2:]) == arrangement.transposed().shape(shape[-2:])[::-1] == (rows * size, words)


@pytest.mark.parametrize("lead", LEADS, ids=str)
@pytest.mark.parametrize(("rows", "words"), [(3, 2), (8, 1), (16, 2), (0, 1), (1, 0)])
def test_permuted_words(lead, rows, words):
    """Check the order of AutoAWQ's ``packing_utils.AWQ_ORDER``."""
    shape = (*lead, rows, words * 8)
    expected = elementwise(shape, shape[-2:], lambda r, c: (r, c // 8 * 8 + AWQ_ORDER[c % 8]))
    assert viewed(permuted_words(2, 4), shape) == expected
    expected = elementwise(shape, shape[:-3:-1], lambda r, c: (c // 8 * 8 + AWQ_ORDER[c % 8], r))
    assert viewed(permuted_words(2, 4).transposed(), shape) == expected


@pytest.mark.parametrize("lead", LEADS, ids=str)
@pytest.mark.parametrize(("rows", "columns", "width"), [(3, 8, 5), (4, 4, 4), (1, 2, 1), (3, 8, 0), (0, 8, 5)])
def test_rows_that_end_in_padding(lead, rows, columns, width):
    shape = (*lead, rows, columns)
    arrangement = PLAIN._replace(width=width)
    assert viewed(arrangement, shape) == elementwise(shape, (rows, width), lambda r, c: (r, c))
    assert arrangement.shape((rows, columns)) == (rows, width)
    transposed = TRANSPOSED._replace(width=rows // 2)
    assert viewed(transposed, shape) == elementwise(shape, (columns, rows // 2), lambda r, c: (c, r))


@pytest.mark.parametrize(
    "arrangement",
    [
        Arrangement((4,), (0,), (1, 2)),
        Arrangement((0,), (0,), (1, 2)),
        Arrangement((-2,), (0,), (1, 2)),
        Arrangement((2,), (0,), (1,)),
        Arrangement((), (0, 1), (1,)),
        Arrangement((), (0,), (2,)),
        PLAIN._replace(width=7),
        PLAIN._replace(width=-1),
        TRANSPOSED._replace(width=4),
    ],
    ids=str,
)
def test_arrangement_that_does_not_fit_has_no_shape(arrangement):
    assert arrangement.shape((3, 6)) is None


def test_text_is_as_einops_writes_axes():
    assert str(PLAIN) == "r w -> r w"
    assert str(permuted_words(2, 4).transposed()) == "r (w a b) -> (w b a) r"
    assert str(PLAIN._replace(width=5)) == "r w -> r w, 5 columns"
