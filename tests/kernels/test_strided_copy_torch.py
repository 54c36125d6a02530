"""Tests of strided copies of any rank: against loops over coordinates, in guarded memory."""

from itertools import product
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from automodel_conv.errors import ConversionError
from automodel_conv.kernels import strided_copy_torch as strided_copy
from automodel_conv.kernels import transpose_torch as transpose
from automodel_conv.kernels.strided_copy_torch import strided_copy_torch
from automodel_conv.testing import address_valued, assert_bytes_equal, guarded, poisoned

INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
SMALL_PANELS = {
    "_MIN_ROWS": 8,
    "_MAX_ROWS": 8,
    "_PANEL_BYTES": 8 * 4 * 3,
    "_SMALLEST_SIDE": 4,
    "_SMALLEST_NUMEL": 16,
}


def copied_by_hand(source):
    """Return a contiguous copy of the bits, one coordinate at a time."""
    integer = INTEGERS[source.element_size()]
    out = torch.empty(source.shape, dtype=integer)
    bits = source.view(integer)
    for at in product(*map(range, source.shape)):
        out[at] = bits[at].item()
    return out.view(source.dtype)


@st.composite
def strides_of(draw, shape):
    """Draw strides that give every element its own address, with dimensions in any order and gaps."""
    strides, step = [0] * len(shape), 1
    for dim in draw(st.permutations(range(len(shape)))):
        step *= draw(st.sampled_from([1, 1, 1, 2, 3]))
        strides[dim] = step
        step *= max(1, shape[dim])
    return tuple(strides)


@st.composite
def sources(draw, shape, dtype):
    """Draw permuted, sliced and expanded tensors of distinct values."""
    strides = draw(strides_of(shape))
    if draw(st.booleans()) and shape:
        dim = draw(st.integers(0, len(shape) - 1))
        strides = (*strides[:dim], 0, *strides[dim + 1 :])
    offset = draw(st.integers(0, 2))
    span = 1 + sum(max(0, size - 1) * step for size, step in zip(shape, strides, strict=True))
    return address_valued((offset + span,), dtype).as_strided(shape, strides, offset)


def shapes():
    sizes = st.lists(st.sampled_from([0, 1, 2, 3, 4, 5, 8, 9, 17]), max_size=4)
    return sizes.map(tuple).filter(lambda shape: torch.Size(shape).numel() <= 700)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool, torch.bfloat16, torch.float32, torch.int64], ids=str)
@given(data=st.data(), shape=shapes())
def test_strided_copy_puts_every_element_where_loops_put_it(dtype, data, shape):
    src = data.draw(sources(shape, dtype))
    dst, check = guarded(shape, dtype, strides=data.draw(strides_of(shape)))
    with mock.patch.multiple(transpose, **SMALL_PANELS):
        strided_copy_torch([dst], [src])
    assert_bytes_equal(dst.clone(memory_format=torch.contiguous_format), copied_by_hand(src))
    check()


def matrices_of(dst, src):
    """Return the shapes that ``strided_copy_torch`` passes to the transpose."""
    with mock.patch.object(strided_copy, "transpose_torch", wraps=transpose.transpose_torch) as call:
        strided_copy_torch([dst], [src])
    (matrices, _), _ = call.call_args
    return [tuple(matrix.shape) for matrix in matrices]


def test_tensors_in_the_same_order_are_not_transposed():
    whole = poisoned((3, 64, 160), torch.bfloat16)
    src = address_valued((3, 64, 80), torch.bfloat16)
    assert matrices_of(whole[..., 80:], src) == []
    assert_bytes_equal(whole[..., 80:], src)
    both = poisoned((80, 64), torch.bfloat16)
    assert matrices_of(both.t(), src[0].t().contiguous().t()) == []
    assert_bytes_equal(both.t(), src[0])


def test_stack_of_experts_is_transposed_one_by_one():
    whole = poisoned((3, 80, 128), torch.bfloat16)
    src = address_valued((3, 64, 80), torch.bfloat16)
    assert matrices_of(whole[..., :64].transpose(1, 2), src) == [(80, 64)] * 3
    assert_bytes_equal(whole[..., :64], src.transpose(1, 2))


def test_gate_and_up_interleave_in_one_call():
    whole = poisoned((80, 64, 2), torch.bfloat16)
    gate, up = (address_valued((64, 80), torch.bfloat16, start) for start in (0, 6000))
    with mock.patch.object(transpose, "_transpose_panels", wraps=transpose._transpose_panels) as panels:
        strided_copy_torch([whole[..., 0].t(), whole[..., 1].t()], [gate, up])
    assert panels.call_count == 1
    assert_bytes_equal(whole, torch.stack([gate.t(), up.t()], -1))


def test_dimensions_of_size_one_do_not_hide_a_transposition():
    dst = poisoned((80, 64), torch.bfloat16).t()[:, None]
    src = address_valued((64, 1, 80), torch.bfloat16)
    assert matrices_of(dst, src) == [(80, 64)]
    assert_bytes_equal(dst, src)


@pytest.mark.parametrize(("source", "target"), [("bfloat16", "float32"), ("float32", "bfloat16")])
@pytest.mark.parametrize("permute", [(0, 1, 2), (0, 2, 1), (2, 1, 0)], ids=str)
def test_casts_round_as_tensor_to_does(source, target, permute):
    source, target = getattr(torch, source), getattr(torch, target)
    src = torch.randn(65, 66, 67, generator=torch.Generator().manual_seed(0)).to(source)
    shape = tuple(src.shape[dim] for dim in permute)
    back = [permute.index(dim) for dim in range(3)]
    dst = poisoned(shape, target).permute(back)
    strided_copy_torch([dst], [src])
    assert_bytes_equal(dst, src.to(target))


def test_each_pair_may_have_its_own_rank_and_dtype():
    dst = [
        poisoned((7,), torch.uint8),
        poisoned((), torch.float64),
        poisoned((80, 64), torch.bool).t(),
    ]
    src = [address_valued(d.shape, d.dtype, 3) for d in dst]
    strided_copy_torch(dst, src)
    for d, s in zip(dst, src, strict=True):
        assert_bytes_equal(d, s)


def test_lists_of_different_length_are_refused():
    with pytest.raises(ConversionError, match="one source per destination"):
        strided_copy_torch([], [torch.empty(2)])


def test_source_that_would_have_to_be_broadcast_is_refused_before_anything_is_written():
    good = torch.zeros(4)
    with pytest.raises(ConversionError, match=r"pair 1(.|\n)*src \[4, 3\]"):
        strided_copy_torch([good, torch.zeros(4, 3)], [torch.ones(4), torch.ones(1, 3)])
    assert not good.any()


@pytest.mark.parametrize("shape", [(80, 1), (1, 80, 64)], ids=str)
def test_destination_that_repeats_an_address_is_refused(shape):
    dst = torch.zeros(shape).expand(*([3] * (len(shape) - 2)), 80, 64)
    src = torch.ones(*dst.shape[:-2], 64, 80).transpose(-2, -1)
    with pytest.raises(RuntimeError, match="single memory location"):
        strided_copy_torch([dst], [src])


class CopiesCounted(TorchDispatchMode):
    """Counts the calls of ``copy_``."""

    calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += func is torch.ops.aten.copy_.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("rows", "words", "copies"), [(64, 8, 1), (1, 1, 1), (0, 8, 1)])
def test_many_small_transposes_are_one_copy(rows, words, copies):
    """Check the words of AWQ in a transposed layout: 2 x 4 matrices, of which a model has hundreds of millions."""
    src = torch.arange(rows * words * 8).view(rows, words, 2, 4)
    dst = torch.full((rows, words, 4, 2), -1).transpose(2, 3)
    with CopiesCounted() as counted:
        strided_copy_torch([dst], [src])
    assert counted.calls == copies
    assert torch.equal(dst, src)
