"""Tests of buffers of grouped experts, and of the layouts that they make up."""

import pytest

from automodel_conv.planning.buffers import Blocks, Buffer, Layout

GATE_UP = ("gate", "up")
BLOCKS = Blocks("E g (m a) h", "E m g h a", (("a", 2),))


def layout(*biases, **changes):
    first = Buffer("first", "E (g i) h", GATE_UP, **changes)
    return Layout((first, *biases), (Buffer("up", "E i h", ("up",)),), (Buffer("down", "E h i", ("down",), **changes),))


@pytest.mark.parametrize(("axes", "is_weight"), [("E (g i) h", True), ("E h", False), ("E (i g)", False), ("", False)])
def test_weights_have_both_sizes_of_experts(axes, is_weight):
    assert Buffer("name", axes, GATE_UP).is_weight is is_weight


def test_axes_follow_each_other_whatever_their_dimensions():
    assert Buffer("name", "E h (i g)", GATE_UP).flat_axes == ("E", "h", "i", "g")


@pytest.mark.parametrize("shape", [(2, 5, 4), (6, 4), ()])
def test_shape_that_a_buffer_cannot_have_has_no_sizes(shape):
    assert Buffer("name", "E (g i) h", GATE_UP).sizes(shape) is None
    assert Buffer("name", "E (g i) h", GATE_UP).sizes((2, 6, 4)) == {"E": 2, "g": 2, "i": 3, "h": 4}


@pytest.mark.parametrize(
    "changes",
    [
        {"axes": "E (i g) h"},
        {"projections": ("up", "gate")},
        {"blocks": BLOCKS},
        {"multiples": (("i", 2),)},
        {"padded": (("i", 2),)},
        {"dtypes": ("BF16",)},
    ],
    ids=str,
)
def test_only_the_name_leaves_the_arrangement_as_it_is(changes):
    buffer = Buffer("name", "E (g i) h", GATE_UP)
    assert buffer._replace(name="other").arrangement == buffer.arrangement
    assert buffer._replace(**changes).arrangement != buffer.arrangement


def test_text_shows_blocks_and_padding():
    buffer = Buffer("name", "E (g i) h", GATE_UP)
    assert buffer.text == "E (g i) h"
    assert buffer._replace(blocks=BLOCKS).text == "E (g i) h in blocks E m g h a"
    padded = buffer._replace(padded=(("i", 4), ("h", 8)), multiples=(("h", 2),))
    assert padded.text == "E (g i) h, i padded to 4, h padded to 8"


def test_layout_shows_whether_it_has_biases_and_padding():
    plain = layout()
    assert not plain.has_biases
    assert not plain.is_padded
    assert layout(Buffer("bias", "E (g i)", GATE_UP)).has_biases
    assert layout(padded=(("i", 4),)).is_padded
    assert layout().arrangement != layout(padded=(("i", 4),)).arrangement


def test_shapes_fit_a_layout_if_its_weights_agree_on_their_sizes():
    plain = layout()
    assert plain.fits({"first": (2, 6, 4), "down": (2, 4, 3)})
    assert plain.fits({"up": (2, 3, 4), "down": (2, 4, 3)}, gated=False)
    assert not plain.fits({"first": (2, 6, 4), "down": (2, 3, 4)})
    assert not plain.fits({"first": (2, 6, 4)})
