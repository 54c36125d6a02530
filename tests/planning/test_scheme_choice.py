"""Tests of choosing between schemes by the parts of a weight."""

import pytest

from automodel_conv.planning.copies import ZeroPacking
from automodel_conv.planning.methods.compressed_tensors import COMPRESSED_TENSORS
from automodel_conv.planning.methods.fp8 import FP8
from automodel_conv.planning.methods.method import (
    CHANNEL,
    FLOAT_SCALES,
    FP8_CODES,
    TENSOR,
    Packing,
    Scheme,
    modules_of,
)
from automodel_conv.planning.scheme_choice import (
    CodedWeight,
    Misfit,
    Part,
    block_within,
    check_divisor,
    check_global_scale,
    check_zero_points,
    choose_scheme,
    scale_shapes,
)

INT4 = Packing("_packed", "I32", "int4")
BLOCK = Scheme("e4m3", (128, 128), FLOAT_SCALES)
_OTHERS = ("zero_points", "global_scale", "global_divisor")
MX = Scheme("e4m3", (1, 32), frozenset({"U8"}))


def part(name, dtype, *shape):
    return Part(0, name, dtype, shape)


def weight(scales=(2, 2), shape=(256, 256), packing=FP8_CODES[0], **parts):
    """Return a weight with scales of a shape, float32, and further parts as dtype and shape."""
    others = {name: part(f"a.{name}", *parts[name]) if name in parts else None for name in _OTHERS}
    codes, stored_scales = part("a.weight", packing.dtype, *shape), part("a.weight_scale", "F32", *scales)
    return CodedWeight("a.weight", packing, shape, codes, stored_scales, **others)


@pytest.mark.parametrize(
    ("shape", "block", "first", "others"),
    [
        ((256, 200), (128, 128), (2, 2), {(2, 1, 2, 1)}),
        ((256, 200), CHANNEL, (256, 1), {(256,)}),
        ((256, 200), TENSOR, (1, 1), {(1,), ()}),
        ((3, 256, 200), (128, 128), (3, 2, 2), {(6, 2), (3, 2, 1, 2, 1)}),
        ((3, 256, 200), TENSOR, (3, 1, 1), {(3, 1), (3,)}),
        ((1, 256, 200), CHANNEL, (1, 256, 1), {(1, 256), (256, 1), (256,)}),
        ((0, 200), (128, 128), (0, 2), {(0, 1, 2, 1)}),
        ((256, 0), (1, 32), (256, 0), {(256, 1, 0, 1)}),
    ],
    ids=str,
)
def test_shapes_of_scales(shape, block, first, others):
    shapes = scale_shapes(shape, block)
    assert shapes[0] == first
    assert others <= set(shapes)


@pytest.mark.parametrize(
    ("block", "shape", "within"),
    [((128, 128), (256, 100), (128, 100)), (TENSOR, (3, 4), (3, 4)), (CHANNEL, (0, 0), (1, 1))],
)
def test_block_is_cut_to_its_matrix(block, shape, within):
    assert block_within(block, shape) == within


def test_shape_of_the_scales_decides():
    schemes = [BLOCK, BLOCK._replace(block=TENSOR), BLOCK._replace(block=CHANNEL)]
    assert choose_scheme(weight(()), FP8, schemes) == schemes[1]
    assert choose_scheme(weight((256, 1)), FP8, schemes) == schemes[2]


def test_scheme_of_the_module_precedes_all_others():
    stated = BLOCK._replace(block=(128, 200), modules=modules_of(["a"]))
    assert choose_scheme(weight(), FP8, [BLOCK, stated]) == BLOCK
    assert choose_scheme(weight(), FP8, [BLOCK, stated], [stated]) == stated


def test_scheme_of_other_modules_is_the_last_resort():
    stated = BLOCK._replace(modules=modules_of(["b"]))
    assert choose_scheme(weight(), FP8, [stated]) == stated


@pytest.mark.parametrize(
    ("parts", "schemes", "stated", "problem"),
    [
        ({}, [], [], "a.weight has e4m3 codes, which the config does not describe"),
        ({}, [], [BLOCK._replace(format="e2m1")], "a.weight has e4m3 codes; the config states e2m1 for its module"),
        (
            {},
            [BLOCK._replace(scales=frozenset({"U8"}))],
            [],
            "a.weight_scale is F32; these e4m3 codes have scales of U8",
        ),
        ({"scales": (3,)}, [BLOCK], [], "a.weight_scale of a.weight [256, 256]: expected [2, 2], found [3]"),
        ({"zero_points": ("I32", 1)}, [BLOCK], [], "a.zero_points: the config has no zero points"),
        (
            {},
            [BLOCK._replace(global_scale=True)],
            [],
            "a.weight has no global scale: no tensor is named a.weight_global_scale",
        ),
        (
            {"scales": (2, 2), "shape": (200, 200)},
            [BLOCK, BLOCK._replace(block=(100, 100))],
            [],
            "a.weight_scale of a.weight [200, 200] fits several blocks: [128, 128] and [100, 100]",
        ),
    ],
)
def test_misfit_has_its_reason(parts, schemes, stated, problem):
    with pytest.raises(Misfit) as error:
        choose_scheme(weight(**parts), COMPRESSED_TENSORS, schemes, stated)
    assert error.value.kind.format(*error.value.names) == str(error.value) == problem


@pytest.mark.parametrize(("by_columns", "fitting"), [(False, (8, 4)), (True, (64, 1))])
def test_zero_points_have_the_shape_of_their_packing(by_columns, fitting):
    scheme = Scheme("int4", (1, 32), FLOAT_SCALES, zero_points=True, zero_packing=ZeroPacking(by_columns))
    sizes = {"scales": (64, 4), "shape": (64, 128), "packing": INT4}
    check_zero_points(weight(**sizes), scheme)
    check_zero_points(weight(**sizes, zero_points=("I32", *fitting)), scheme)
    for dtype, shape in (("I32", fitting[::-1]), ("I8", fitting)):
        with pytest.raises(Misfit, match=r"a\.zero_points: expected I32"):
            check_zero_points(weight(**sizes, zero_points=(dtype, *shape)), scheme)


def test_global_scale_is_one_for_all_or_one_for_each_matrix():
    for shape in ((), (1,), (3,), (3, 1), (3, 1, 1)):
        check_global_scale(weight(shape=(3, 8, 32), global_scale=("F32", *shape)))
    for dtype, shape in (("F32", (2,)), ("BF16", (3,))):
        with pytest.raises(Misfit, match=r"a.global_scale: expected one F32 or F32 \[3\], found"):
            check_global_scale(weight(shape=(3, 8, 32), global_scale=(dtype, *shape)))


def test_divisor_is_like_the_global_scale():
    check_divisor(weight(), "_divisor")
    check_divisor(weight(global_scale=("F32", 3)), "")
    check_divisor(weight(global_scale=("F32", 3), global_divisor=("F32", 3)), "_divisor")
    with pytest.raises(Misfit, match=r"no tensor is named a\.weight_divisor"):
        check_divisor(weight(global_scale=("F32", 3)), "_divisor")
    with pytest.raises(Misfit, match=r"a\.global_divisor has no global scale to divide"):
        check_divisor(weight(global_divisor=("F32", 3)), "_divisor")
    with pytest.raises(Misfit, match=r"a.global_divisor: expected F32 \[3\] like a.global_scale, found F32 \[\]"):
        check_divisor(weight(global_scale=("F32", 3), global_divisor=("F32",)), "_divisor")
