"""Tests of values against loops over coordinates: every element identifies its source element."""

import random
from math import prod

import pytest
from hypothesis import given

from automodel_conv.planning import values
from automodel_conv.planning.boxes import NotAffine
from automodel_conv.planning.lowering import copies_of
from automodel_conv.planning.values import LoweringError, leaf, leaves
from tests.planning import oracles
from tests.planning.operation_cases import SEEDS
from tests.planning.oracles import Cells, cells, flat

SHAPES = [(2, 3), (3, 3), (1, 1), (1, 4), (0, 3), (3, 0)]


def elements(value, sources):
    """Return the elements of a value by executing its copies one element at a time."""
    written = oracles.written(piece for copy in copies_of(value) for piece in copy.pieces())
    assert sorted(written) == list(range(prod(value.shape)))
    return [flat(sources[source])[element] for _, (source, element) in sorted(written.items())]


def assert_same(value, sources, expected):
    assert value.shape == expected.shape
    assert elements(value, sources) == flat(expected)


def permuted(tensor, order):
    at = {tuple(c[dim] for dim in order): element for c, element in tensor.at.items()}
    return Cells(tuple(tensor.shape[dim] for dim in order), at)


def narrowed(tensor, dim, start, length):
    kept = {c: element for c, element in tensor.at.items() if start <= c[dim] < start + length}
    at = {(*c[:dim], c[dim] - start, *c[dim + 1 :]): element for c, element in kept.items()}
    return Cells((*tensor.shape[:dim], length, *tensor.shape[dim + 1 :]), at)


@given(SEEDS)
def test_any_chain_of_views_equals_loops(seed):
    rng = random.Random(seed)
    shape = tuple(rng.choice((0, 1, 2, 3, 4)) for _ in range(rng.randint(1, 4)))
    source = tensor = cells(shape)
    value = leaf(0, shape)
    for _ in range(rng.randint(1, 4)):
        rank = len(value.shape)
        match rng.choice(("permute", "transpose", "narrow", "reshape")):
            case "permute":
                order = rng.sample(range(rank), rank)
                value, tensor = values.permute(value, order), permuted(tensor, order)
            case "transpose":
                dims = rng.randrange(-rank, rank), rng.randrange(-rank, rank)
                value, tensor = values.transpose(value, *dims), oracles.transposed(tensor, *dims)
            case "narrow":
                dim = rng.randrange(rank)
                start = rng.randint(0, value.shape[dim])
                length = rng.randint(0, value.shape[dim] - start)
                value, tensor = values.narrow(value, dim, start, length), narrowed(tensor, dim, start, length)
            case "reshape":
                shape = rng.choice([(prod(value.shape), 1), (1, *value.shape[::-1]), value.shape])
                value, tensor = values.reshape(value, shape), oracles.reshaped(tensor, shape)
    assert_same(value, [source], tensor)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_values_are_stacked_and_joined_in_their_order(shape, dim):
    sources = [cells(shape, 100 * number) for number in range(4)]
    parts = leaves(0, [shape] * 4)
    for order in ([0, 1, 2, 3], [3, 2, 1, 0], [0, 2], [2, 0, 3], [1, 1], [1]):
        chosen, tensors = [parts[i] for i in order], [sources[i] for i in order]
        assert_same(values.concatenate(chosen, dim), sources, oracles.joined(tensors, dim))
        assert_same(values.stack(chosen, dim), sources, oracles.stacked(tensors, dim))


def test_views_of_joined_views_read_the_right_sources():
    sources = [cells((3, 3), 100 * number) for number in range(3)]
    turned = [values.transpose(value, 0, 1) for value in leaves(0, [(3, 3)] * 3)]
    expected = narrowed(oracles.stacked([oracles.transposed(source, 0, 1) for source in sources], 1), 1, 1, 2)
    assert_same(values.narrow(values.stack(turned, 1), 1, 1, 2), sources, expected)


def test_values_of_unequal_sizes_are_joined_along_one_dimension():
    shapes = [(2, 3), (0, 3), (4, 3), (1, 3)]
    sources = [cells(shape, 100 * number) for number, shape in enumerate(shapes)]
    assert_same(values.concatenate(leaves(0, shapes), 0), sources, oracles.joined(sources, 0))


def test_thousands_of_experts_are_one_piece():
    assert len(values.stack(leaves(0, [(3, 5)] * 4096), 0).pieces) == 1


def test_leaves_are_numbered_from_the_first():
    assert [value.source for value in leaves(3, [(2,), (2,), (5,)])] == [3, 4, 5]
    assert leaves(0, [(2, 0)])[0].pieces == []


@pytest.mark.parametrize("shape", [(7,), (2, 4), (0,), ()])
def test_shape_of_another_number_of_elements_is_refused(shape):
    with pytest.raises(LoweringError, match=r"cannot reshape \(2, 3\)"):
        values.reshape(leaf(0, (2, 3)), shape)


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        (lambda value: values.transpose(value, 0, 2), "no dimension 2"),
        (lambda value: values.narrow(value, -3, 0, 1), "no dimension -3"),
        (lambda value: values.concatenate([value], 2), "no dimension 2"),
        (lambda value: values.stack([value], 3), "cannot stack"),
    ],
)
def test_missing_dimension_of_a_value_is_named(wrong, text):
    with pytest.raises(LoweringError, match=text):
        wrong(leaf(0, (2, 3)))


def test_tensors_of_other_ranks_are_not_joined():
    with pytest.raises(LoweringError, match="cannot join"):
        values.concatenate([leaf(0, (2, 3)), leaf(1, (2,))], 1)


@pytest.mark.parametrize("shape", [(2, 3), (0, 3), (2,), (3, 0)])
def test_appended_rows_are_filled_by_no_piece(shape):
    value = values.append_zeros(leaf(0, shape), 2)
    assert value.shape == (shape[0] + 2, *shape[1:])
    assert value.zero_rows == 2
    assert value.pieces == leaf(0, shape).pieces


def test_appended_rows_stay_the_last():
    value = values.append_zeros(leaf(0, (2, 3)), 1)
    for following in (
        lambda: values.transpose(value, 0, 1),
        lambda: values.reshape(value, (9,)),
        lambda: values.narrow(value, 0, 0, 1),
        lambda: values.concatenate([leaf(1, (1, 3)), value], 0),
        lambda: values.append_zeros(value, 1),
    ):
        with pytest.raises(NotAffine, match="appends zeros"):
            following()


@pytest.mark.parametrize(("shape", "rows"), [((), 1), ((2, 3), -1)])
def test_rows_that_cannot_be_appended_are_named(shape, rows):
    with pytest.raises(LoweringError, match=f"cannot append {rows} rows"):
        values.append_zeros(leaf(0, shape), rows)
