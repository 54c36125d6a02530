"""Tests of the matrices that transposing verbs accept, and of the table of verbs."""

import pytest
import torch

from automodel_conv.kernels.launch import MAX_STRIDE
from automodel_conv.kernels.verb import Matrix, supports_transposed
from automodel_conv.kernels.verbs import VERBS

BF16, F32 = torch.bfloat16, torch.float32


@pytest.mark.parametrize(
    ("src", "dst", "taken"),
    [
        (BF16, BF16, True),
        (torch.uint8, torch.uint8, True),
        (F32, BF16, True),
        (torch.int64, torch.int64, False),
        (torch.float64, torch.float64, False),
        (torch.int32, F32, False),
        (torch.float8_e4m3fn, BF16, False),
    ],
    ids=str,
)
def test_dtypes_are_equal_ones_of_at_most_4_bytes_or_floats_that_are_cast(src, dst, taken):
    assert supports_transposed(Matrix(2, 3, 3, 2), src, dst) == taken


@pytest.mark.parametrize("side", Matrix._fields)
def test_no_side_or_stride_exceeds_the_limit_of_the_variants(side):
    fits = Matrix(2, 3, 3, 2)
    assert supports_transposed(fits._replace(**{side: MAX_STRIDE}), BF16, BF16)
    assert not supports_transposed(fits._replace(**{side: MAX_STRIDE + 1}), BF16, BF16)


def test_every_verb_has_a_walk_of_its_own():
    walks = [(verb.transposes, verb.steps) for verb in VERBS]
    assert sorted(set(walks)) == sorted(walks)
    assert {verb.name for verb in VERBS} == {"strided_copy", "transpose", "interleave", "deinterleave"}


@pytest.mark.parametrize("verb", VERBS, ids=lambda verb: verb.name)
@pytest.mark.parametrize(("rows", "columns"), [(2, 3), (4, 4), (1, 5)])
def test_destinations_have_as_many_elements_as_sources(verb, rows, columns):
    dst, src = verb.shapes(Matrix(rows, columns, columns, rows))
    assert verb.destinations * dst[0] * dst[1] == verb.sources * src[0] * src[1]
    assert rows * columns <= dst[0] * dst[1]
