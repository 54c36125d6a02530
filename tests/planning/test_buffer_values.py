"""Tests of the projections in a buffer and of the buffer that holds them, against loops over elements."""

import itertools
from math import prod

import pytest

from automodel_conv.planning.buffer_values import buffer_of, projections_in, rearrange, without_padding
from automodel_conv.planning.buffers import Blocks, Buffer
from automodel_conv.planning.lowering import copies_of
from automodel_conv.planning.values import LoweringError, leaf

PADDING = 7
GATE_UP = Buffer("first", "E (g i) h", ("gate", "up"))
IN_BLOCKS = GATE_UP._replace(blocks=Blocks("E g (m a) (n k)", "E n m g a k", (("a", 2), ("k", 3))))
SIZES = [(2, 4, 6), (1, 2, 3), (3, 6, 6), (0, 4, 6), (2, 0, 3)]


def elements(value):
    """Return what a value is filled with, in order: (source, element), or 0 for padding."""
    copies, fills = without_padding(copies_of(value), PADDING)
    at = {}
    for piece in [piece for copy in copies for piece in copy.pieces()]:
        for index in itertools.product(*map(range, piece.box.shape)):
            place = piece.target_offset + sum(i * s for i, s in zip(index, piece.box.target_strides, strict=True))
            read = piece.source_offset + sum(i * s for i, s in zip(index, piece.box.source_strides, strict=True))
            assert at.setdefault(place, (piece.source, read)) == (piece.source, read)
    for fill in fills:
        for index in itertools.product(*map(range, fill.shape)):
            place = fill.offset + sum(i * s for i, s in zip(index, fill.strides, strict=True))
            assert at.setdefault(place, fill.value) == fill.value
    assert sorted(at) == list(range(prod(value.shape)))
    return [at[place] for place in sorted(at)]


def projections(*sizes):
    return {"gate": leaf(0, sizes), "up": leaf(1, sizes)}


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_projections_follow_each_other_in_a_buffer(sizes):
    experts, size, hidden = sizes
    value = buffer_of(GATE_UP, projections(*sizes), PADDING)
    assert value.shape == (experts, 2 * size, hidden)
    per_expert = size * hidden
    assert elements(value) == [
        (g, e * per_expert + n) for e in range(experts) for g in range(2) for n in range(per_expert)
    ]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_elements_of_blocks_follow_each_other(sizes):
    experts, size, hidden = sizes
    value = buffer_of(IN_BLOCKS, projections(*sizes), PADDING)
    assert value.shape == (experts, 2 * size, hidden)
    assert elements(value) == [
        (g, (e * size + 2 * m + a) * hidden + 3 * n + k)
        for e in range(experts)
        for n in range(hidden // 3)
        for m in range(size // 2)
        for g in range(2)
        for a in range(2)
        for k in range(3)
    ]


@pytest.mark.parametrize("sizes", [(2, 1, 2), (1, 3, 5), (2, 4, 6), (1, 5, 1), (2, 0, 4)], ids=str)
@pytest.mark.parametrize("buffer", [GATE_UP, IN_BLOCKS])
def test_zeros_follow_each_padded_axis(buffer, sizes):
    experts, size, hidden = sizes
    buffer = buffer._replace(padded=(("i", 4), ("h", 6)))
    padded_size, padded_hidden = -(-size // 4) * 4, -(-hidden // 6) * 6
    value = buffer_of(buffer, projections(*sizes), PADDING)
    assert value.shape == (experts, 2 * padded_size, padded_hidden)
    both = elements(buffer_of(buffer._replace(padded=()), projections(experts, padded_size, padded_hidden), PADDING))

    def padded(source, element):
        e, rest = divmod(element, padded_size * padded_hidden)
        i, h = divmod(rest, padded_hidden)
        return (source, (e * size + i) * hidden + h) if i < size and h < hidden else 0

    assert elements(value) == [padded(*element) for element in both]


@pytest.mark.parametrize("sizes", [(2, 4, 6), (1, 3, 5), (0, 4, 6)], ids=str)
@pytest.mark.parametrize("buffer", [GATE_UP, IN_BLOCKS])
def test_projections_in_a_buffer_are_those_that_it_was_made_of(buffer, sizes):
    experts, size, hidden = sizes
    buffer = buffer._replace(padded=(("i", 4), ("h", 6)))
    value = buffer_of(buffer, projections(*sizes), PADDING)
    parts = projections_in(buffer, value, {"i": size, "h": hidden})
    assert [(name, part.shape) for name, part in parts.items()] == [("gate", sizes), ("up", sizes)]
    numel = experts * size * hidden
    assert [elements(part) for part in parts.values()] == [[(g, n) for n in range(numel)] for g in range(2)]


def test_bias_has_one_size():
    bias = Buffer("bias", "E (g i)", ("up", "gate"), padded=(("i", 2),))
    value = buffer_of(bias, {"gate": leaf(0, (2, 1)), "up": leaf(1, (2, 1))}, PADDING)
    assert elements(value) == [(1, 0), 0, (0, 0), 0, (1, 1), 0, (0, 1), 0]


@pytest.mark.parametrize(("size", "hidden"), [(3, 6), (4, 5)])
def test_sizes_that_blocks_do_not_divide_are_an_error(size, hidden):
    with pytest.raises(LoweringError, match="cannot hold"):
        buffer_of(IN_BLOCKS, projections(2, size, hidden), PADDING)
    with pytest.raises(LoweringError, match="cannot hold"):
        projections_in(IN_BLOCKS, leaf(0, (2, 2 * size, hidden)), {})


@pytest.mark.parametrize("size", [4, 9])
def test_padding_to_another_multiple_is_an_error(size):
    padded = GATE_UP._replace(padded=(("i", 4),))
    with pytest.raises(LoweringError, match=f"i has size 8, not .*, as {size} with padding"):
        projections_in(padded, leaf(0, (2, 16, 6)), {"i": size})


def test_axes_are_rearranged_as_einops_does():
    value = rearrange(leaf(0, (2, 6, 2)), "E (g i) h", "h E (i g)", {"g": 2})
    assert value.shape == (2, 2, 6)
    assert elements(value) == [
        (0, ((e * 2 + g) * 3 + i) * 2 + h) for h in range(2) for e in range(2) for i in range(3) for g in range(2)
    ]
