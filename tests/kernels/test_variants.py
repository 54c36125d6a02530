"""Tests of every launchable variant of a verb, and of the number of launches, in Triton's interpreter."""

import itertools
from unittest import mock

import numpy as np
import pytest
import torch

from automodel_conv.kernels import jit, launch, strided_copy, transpose
from automodel_conv.kernels.address_table import at_addresses
from tests.kernels.lots import lot, run
from tests.kernels.support import PHASES, VERBS, shapes
from tests.machine_code.variants import DTYPE_PAIRS as DTYPES_CHECKED
from tests.machine_code.variants import launchable

needs_triton = pytest.mark.skipif(not jit.IS_INSTALLED, reason="triton is not installed")
pytestmark = pytest.mark.usefixtures("small_tiles", "launched")

ELEMENTS = {
    "strided_copy": lambda n, r, c: (0, r, c),
    "transpose": lambda n, r, c: (0, c, r),
    "interleave": lambda n, r, c: (c % 2, c // 2, r),
    "deinterleave": lambda n, r, c: (0, c, 2 * r + n),
}


@needs_triton
@pytest.mark.parametrize("name", VERBS)
def test_every_variant_of_a_verb_moves_right_and_its_machine_code_is_checked(name, launched):
    verb, dst_count, src_count = VERBS[name]
    known = set(launchable())
    cases = itertools.product(DTYPES_CHECKED, PHASES, PHASES, [(16, 16), (3, 48)])
    for (dst_dtype, src_dtype), dst_phase, src_phase, (rows, columns) in cases:
        if dst_phase % dst_dtype.itemsize and (name != "strided_copy" or dst_dtype != src_dtype):
            continue
        dst_shape, src_shape = shapes(name, rows, columns)
        dst = [lot(dst_shape, dst_dtype, [dst_phase], 0, poisoned=True) for _ in range(dst_count)]
        src = [lot(src_shape, src_dtype, [src_phase], 0) for _ in range(src_count)]
        before = len(launched)
        with mock.patch.object(launch, "queue", lambda variant, *_: launched.append((variant, 1))):
            verb(*(d.matrices for d in dst), *(s.matrices for s in src))
        if launched[-1] not in launched[:before]:
            run(verb, dst, src, ELEMENTS[name])
    kernels = {"transpose": {"transpose_tiles", "interleave_tiles"}, "strided_copy": {"copy_tiles"}}
    expected = {variant for variant in known if variant.kernel.name in kernels.get(name, {f"{name}_tiles"})}
    actual = {variant for variant, _ in launched}
    assert actual <= expected
    assert {variant for variant in expected if not (name == "transpose" and "inter" in variant.kernel.name)} <= actual


@needs_triton
def test_one_odd_address_does_not_slow_the_others(launched):
    src = lot((16, 16), torch.bfloat16, [0, 0, 1, 0, 8, 1], 0)
    dst = lot((16, 16), torch.bfloat16, [0, 0, 0, 0, 0, 0], 0, poisoned=True)
    with mock.patch.object(launch, "upload", wraps=launch.upload) as upload:
        run(transpose.transpose, [dst], [src], ELEMENTS["transpose"])
    assert sorted((v.src_vector, v.bytewise, count) for v, count in launched) == [
        (1, True, 2),
        (4, False, 1),
        (8, False, 3),
    ]
    assert upload.call_count == 1


@needs_triton
def test_more_matrices_than_a_grid_has_rows_take_more_launches(launched):
    src = lot((2, 3), torch.float32, [0] * 7, 0)
    dst = lot((2, 3), torch.float32, [0] * 7, 0, poisoned=True)
    with mock.patch.object(launch, "_MAX_ROWS", 3):
        run(strided_copy.strided_copy, [dst], [src], ELEMENTS["strided_copy"])
    assert [count for _, count in launched] == [3, 3, 1]


@needs_triton
def test_grid_with_too_many_programs_is_split_into_launches(launched):
    src = lot((40, 20), torch.uint8, [0] * 5, 1)
    dst = lot((40, 20), torch.uint8, [0] * 5, 1, poisoned=True)
    with mock.patch.object(launch, "_MAX_PROGRAMS", 25):  # tiles are 4 x 32: 10 for a matrix
        run(strided_copy.strided_copy, [dst], [src], ELEMENTS["strided_copy"])
    assert [count for _, count in launched] == [2, 2, 1]


@needs_triton
@pytest.mark.parametrize("shape", [(3, 300_000_001), (300_000_001, 3), (1, 2**30 - 1)])
def test_runs_of_any_shape_are_accepted_up_to_the_promised_length(shape):
    # Nothing uses these addresses: the launch is left out.
    runs = at_addresses(np.array([64]), shape, shape[1], torch.uint8, torch.device("cpu"))
    assert strided_copy.MAX_RUN_BYTES - runs.nbytes < 2**28
    with mock.patch.object(launch, "queue") as launched:
        strided_copy.strided_copy(runs, runs)
    assert launched.call_count == 1


@needs_triton
def test_runs_without_gaps_are_cut_into_full_tiles(launched):
    for shape in [(1, 128), (128, 1), (8, 16)]:
        src = lot(shape, torch.float32, [0], 0)
        dst = lot(shape, torch.bfloat16, [0], 0, poisoned=True)
        run(strided_copy.strided_copy, [dst], [src], ELEMENTS["strided_copy"])
    assert {variant.src_vector for variant, _ in launched} == {4}
