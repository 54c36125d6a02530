"""Tests of the kernels in Triton's interpreter: against loops over coordinates, at any address, between guards."""

import os
import subprocess
import sys
from unittest import mock

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from automodel_conv.kernels import deinterleave as deinterleaving
from automodel_conv.kernels import interleave as interleaving
from automodel_conv.kernels import jit, strided_copy, transpose
from automodel_conv.kernels.deinterleave import deinterleave
from automodel_conv.kernels.interleave import interleave
from automodel_conv.testing import address_valued, assert_bytes_equal
from tests.kernels.support import CASTABLE, DTYPE_PAIRS, VERBS, casting_cases, shapes
from tests.kernels.verbs.support import lot, rounded, run, same

needs_triton = pytest.mark.skipif(not jit.IS_INSTALLED, reason="triton is not installed")
SIDES = [0, 1, 2, 3, 7, 8, 15, 16, 17, 24, 31, 32, 33, 40]


@st.composite
def phases(draw, count, dtype, *, whole=False):
    """Draw bytes past a multiple of 16, mostly equal. ``whole`` keeps elements at multiples of their size."""
    step = dtype.itemsize if whole else 1
    one = st.sampled_from(sorted({0, 8, 4, 2, 1, 3, 12}) if step == 1 else [0, 0, 8, 4 if step <= 4 else 0, step])
    common = draw(one)
    return [draw(one) if draw(st.integers(0, 3)) == 0 else common for _ in range(count)]


@st.composite
def problems(draw, multiple=1):
    """Draw dtypes, sides, counts and gaps, some of which allow long vectors."""
    dst, src = draw(st.sampled_from(DTYPE_PAIRS))
    sides = st.sampled_from(SIDES) | st.sampled_from([16, 32, 48])
    rows, columns, count = draw(sides), draw(sides), draw(st.sampled_from([0, 1, 2, 3]))
    assume(rows * columns * count <= 2500)
    gap = st.sampled_from([0, 0, 16, 8, 1, 3])
    return dst, src, rows, columns, count, draw(gap), draw(gap)


@needs_triton
@settings(max_examples=100)
@given(problem=problems(), data=st.data())
def test_strided_copy_puts_every_element_where_loops_put_it(problem, data):
    dtype, src_dtype, rows, columns, count, dst_gap, src_gap = problem
    whole = dtype != src_dtype
    src = lot((rows, columns), src_dtype, data.draw(phases(count, src_dtype)), src_gap)
    dst = lot((rows, columns), dtype, data.draw(phases(count, dtype, whole=whole)), dst_gap, poisoned=True)
    run(strided_copy.strided_copy, [dst], [src], lambda n, r, c: (0, r, c))


@needs_triton
@settings(max_examples=100)
@given(problem=problems(), data=st.data())
def test_transpose_puts_every_element_where_loops_put_it(problem, data):
    dtype, src_dtype, rows, columns, count, dst_gap, src_gap = problem
    src = lot((rows, columns), src_dtype, data.draw(phases(count, src_dtype)), src_gap)
    dst = lot((columns, rows), dtype, data.draw(phases(count, dtype, whole=True)), dst_gap, poisoned=True)
    run(transpose.transpose, [dst], [src], lambda n, r, c: (0, c, r))


@needs_triton
@settings(max_examples=100)
@given(problem=problems(), data=st.data())
def test_interleave_puts_every_element_where_loops_put_it(problem, data):
    dtype, src_dtype, rows, columns, count, dst_gap, src_gap = problem
    src = [lot((rows, columns), src_dtype, data.draw(phases(count, src_dtype)), src_gap) for _ in range(2)]
    dst = lot((columns, 2 * rows), dtype, data.draw(phases(count, dtype, whole=True)), dst_gap, poisoned=True)
    run(interleave, [dst], src, lambda n, r, c: (c % 2, c // 2, r))


@needs_triton
@settings(max_examples=100)
@given(problem=problems(), data=st.data())
def test_deinterleave_puts_every_element_where_loops_put_it(problem, data):
    dtype, src_dtype, rows, columns, count, dst_gap, src_gap = problem
    src = lot((rows, 2 * columns), src_dtype, data.draw(phases(count, src_dtype)), src_gap)
    dst = [
        lot((columns, rows), dtype, data.draw(phases(count, dtype, whole=True)), dst_gap, poisoned=True)
        for _ in range(2)
    ]
    run(deinterleave, dst, [src], lambda n, r, c: (0, c, 2 * r + n))


@needs_triton
@pytest.mark.parametrize(("dst_dtype", "src_dtype"), [(d, s) for d in CASTABLE for s in CASTABLE if d != s], ids=str)
def test_casts_round_to_nearest_even(dst_dtype, src_dtype):
    src = casting_cases(src_dtype)
    dst = torch.full(src.shape, -1, dtype=torch.int32 if dst_dtype.itemsize == 4 else torch.int16).view(dst_dtype)
    with mock.patch.multiple(strided_copy, _WIDE=(16, 4096)):
        strided_copy.strided_copy([dst], [src])
    size = src_dtype.itemsize
    raw = src.reshape(-1).view(torch.uint8).numpy().tobytes()
    data = dst.reshape(-1).view(torch.uint8).numpy().tobytes()
    for at in range(src.numel()):
        value = raw[size * at : size * (at + 1)]
        element = data[dst_dtype.itemsize * at : dst_dtype.itemsize * (at + 1)]
        assert same(element, rounded(value, src_dtype, dst_dtype), dst_dtype), value.hex()


@needs_triton
@pytest.mark.parametrize("name", VERBS)
def test_loose_tensors_are_moved_as_in_torch(name):
    verb, dst_count, src_count = VERBS[name]
    twin = {
        "strided_copy": strided_copy.strided_copy_torch,
        "transpose": transpose.transpose_torch,
        "interleave": interleaving.interleave_torch,
        "deinterleave": deinterleaving.deinterleave_torch,
    }[name]
    dst_shape, src_shape = shapes(name, 6, 20)
    sources = [
        [address_valued((src_shape[0], src_shape[1] + 5), torch.bfloat16, 1000 * k)[:, 2:-3] for k in range(3)]
        for _ in range(src_count)
    ]
    actual, expected = (
        [[torch.zeros(dst_shape, dtype=torch.bfloat16) for _ in range(3)] for _ in range(dst_count)] for _ in range(2)
    )
    verb(*actual, *sources)
    twin(*expected, *sources)
    for some, others in zip(actual, expected, strict=True):
        for one, other in zip(some, others, strict=True):
            assert_bytes_equal(one, other)


@needs_triton
def test_elements_beyond_4_gib_are_reached():
    code = """
import torch
from automodel_conv.kernels.deinterleave import deinterleave
from automodel_conv.kernels.interleave import interleave
from automodel_conv.kernels.strided_copy import strided_copy
from automodel_conv.kernels.transpose import transpose

ROWS, COLUMNS, STRIDE = 1100, 8, 2**21
memory = torch.empty(ROWS * STRIDE, dtype=torch.bfloat16)  # pages that are never touched are never allocated
far = memory.as_strided((ROWS, COLUMNS), (STRIDE, 1))
assert (ROWS - 1) * STRIDE > 2**31 and (ROWS - 64) * STRIDE * 2 > 2**32
numbers = torch.arange(ROWS * COLUMNS, dtype=torch.int16).view(torch.bfloat16).reshape(ROWS, COLUMNS)
same = lambda a, b: torch.equal(a.contiguous().view(torch.int16), b.contiguous().view(torch.int16))
near = torch.zeros_like(numbers)
turned = numbers.t().contiguous()
for verb, operands in (
    (strided_copy, ([far], [numbers])),
    (transpose, ([far], [turned])),
    (interleave, ([far], [turned[0::2].contiguous()], [turned[1::2].contiguous()])),
):
    far.zero_()
    verb(*operands)
    assert same(far, numbers), verb
strided_copy([near], [far])
assert same(near, numbers)
# Words of 2 bytes now, so that their count also exceeds 32 bits.
strided_copy([near.zero_()[:, 1:]], [far[:, 1:]])
assert same(near[:, 1:], numbers[:, 1:])
far.zero_()
strided_copy([far[:, 1:]], [numbers[:, 1:]])
assert same(far[:, 1:], numbers[:, 1:])
strided_copy([far], [numbers])
transpose([turned.zero_()], [far])
assert same(turned, numbers.t())
first, second = torch.zeros(4, ROWS, dtype=torch.bfloat16), torch.zeros(4, ROWS, dtype=torch.bfloat16)
deinterleave([first], [second], [far])
assert same(first, numbers[:, 0::2].t()) and same(second, numbers[:, 1::2].t())
far.zero_(), near.zero_()
"""
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
