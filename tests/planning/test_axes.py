"""Tests of axes in einops notation, and of their sizes in a buffer."""

import pytest

from automodel_conv.planning.axes import dims_of, sizes_of


@pytest.mark.parametrize(
    ("axes", "dims"),
    [
        ("", ()),
        ("E", (("E",),)),
        ("E h", (("E",), ("h",))),
        ("(i g)", (("i", "g"),)),
        ("E (g i) h", (("E",), ("g", "i"), ("h",))),
        ("(a b) c (d e f)", (("a", "b"), ("c",), ("d", "e", "f"))),
    ],
)
def test_parentheses_merge_axes_into_one_dimension(axes, dims):
    assert dims_of(axes) == dims


@pytest.mark.parametrize(
    ("axes", "shape", "sizes"),
    [
        ("E (g i) h", (4, 6, 5), {"E": 4, "g": 2, "i": 3, "h": 5}),
        ("E h (i g)", (4, 5, 6), {"E": 4, "g": 2, "i": 3, "h": 5}),
        ("E (g i) h", (2, 2, 2), {"E": 2, "g": 2, "i": 1, "h": 2}),
        ("E (g i) h", (0, 6, 5), {"E": 0, "g": 2, "i": 3, "h": 5}),
        ("E (g i) h", (4, 0, 1), {"E": 4, "g": 2, "i": 0, "h": 1}),
        ("g E", (2, 7), {"E": 7, "g": 2}),
    ],
)
def test_unknown_axis_of_a_dimension_has_the_rest_of_its_size(axes, shape, sizes):
    assert sizes_of(dims_of(axes), shape, {"g": 2}) == sizes


def test_known_sizes_are_unchanged():
    known = {"g": 2}
    sizes_of(dims_of("E (g i)"), (3, 8), known)
    assert known == {"g": 2}


@pytest.mark.parametrize("shape", [(), (4,), (4, 6), (4, 6, 5, 1)])
def test_shape_of_another_rank_is_refused(shape):
    with pytest.raises(ValueError, match="3 dimensions"):
        sizes_of(dims_of("E (g i) h"), shape, {"g": 2})


def test_size_that_the_known_size_does_not_divide_is_refused():
    with pytest.raises(ValueError, match=r"size 7 .*g by i"):
        sizes_of(dims_of("E (g i) h"), (4, 7, 5), {"g": 2})


@pytest.mark.parametrize("size", [1, 3, 4])
def test_known_axis_of_another_size_is_refused(size):
    with pytest.raises(ValueError, match=f"size {size} .*g with"):
        sizes_of(dims_of("g E"), (size, 5), {"g": 2})
