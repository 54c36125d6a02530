"""Tests of all verbs in Triton's interpreter: casts, loose tensors as in torch, and far addresses."""

import os
import subprocess
import sys
from unittest import mock

import pytest
import torch

from automodel_conv.kernels import deinterleave as deinterleaving
from automodel_conv.kernels import interleave as interleaving
from automodel_conv.kernels import jit, strided_copy, transpose
from automodel_conv.testing import address_valued, assert_bytes_equal
from tests.kernels.lots import rounded, same
from tests.kernels.support import CASTABLE, VERBS, casting_cases, shapes

needs_triton = pytest.mark.skipif(not jit.IS_INSTALLED, reason="triton is not installed")
pytestmark = pytest.mark.usefixtures("small_tiles", "launched")


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
