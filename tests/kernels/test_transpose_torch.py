"""Tests of transposing copies: against loops over coordinates, for every bit pattern, between guards."""

from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from automodel_conv.errors import ConversionError
from automodel_conv.kernels import transpose_torch as transpose
from automodel_conv.kernels.transpose_torch import transpose_torch
from automodel_conv.testing import address_valued, assert_bytes_equal, guarded, poisoned

INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
DTYPES = [
    torch.bool,
    torch.uint8,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.bfloat16,
    torch.float16,
    torch.float32,
    torch.int32,
    torch.float64,
    torch.complex64,
]
# Small panels have every kind of edge in matrices that a loop over coordinates can check.
SMALL_PANELS = {
    "_MIN_ROWS": 8,
    "_MAX_ROWS": 8,
    "_PANEL_BYTES": 8 * 4 * 3,
    "_SMALLEST_SIDE": 4,
    "_SMALLEST_NUMEL": 16,
}
SIDES = [0, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33]

SOURCE_LAYOUTS = {
    "contiguous": lambda r, c, dtype: address_valued((r, c), dtype),
    "rows of a wider matrix": lambda r, c, dtype: address_valued((r, c + 3), dtype)[:, :c],
    "starts at an odd address": lambda r, c, dtype: address_valued((1 + r * c,), dtype)[1:].view(r, c),
    "every other column": lambda r, c, dtype: address_valued((r, 2 * c), dtype)[:, ::2],
    "columns first": lambda r, c, dtype: address_valued((c, r), dtype).t(),
    "one row repeated": lambda r, c, dtype: address_valued((1, c), dtype).expand(r, c),
    "one column repeated": lambda r, c, dtype: address_valued((r, 1), dtype).expand(r, c),
}
# Strides of a destination [C, R].
DESTINATION_LAYOUTS = {
    "contiguous": lambda c, r: (r, 1),
    "a half of wider rows": lambda c, r: (2 * r + 1, 1),
    "every other element": lambda c, r: (2 * r, 2),
    "columns first": lambda c, r: (1, c),
}


def transposed_by_hand(source):
    """Transpose element by element, on the bits."""
    rows, columns = source.shape
    integer = INTEGERS[source.element_size()]
    bits = source.view(integer).tolist()
    by_hand = [[bits[row][column] for row in range(rows)] for column in range(columns)]
    return torch.tensor(by_hand, dtype=integer).reshape(columns, rows).view(source.dtype)


def packed(tensor):
    return tensor.clone(memory_format=torch.contiguous_format)


def simd_or_not():
    return st.sampled_from([transpose._SIMD_SHUFFLE, False])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(
    rows=st.sampled_from(SIDES),
    columns=st.sampled_from(SIDES),
    source_layout=st.sampled_from(sorted(SOURCE_LAYOUTS)),
    destination_layout=st.sampled_from(sorted(DESTINATION_LAYOUTS)),
    simd=simd_or_not(),
)
def test_transpose_puts_every_element_where_loops_put_it(dtype, rows, columns, source_layout, destination_layout, simd):
    src = SOURCE_LAYOUTS[source_layout](rows, columns, dtype)
    dst, check = guarded((columns, rows), dtype, strides=DESTINATION_LAYOUTS[destination_layout](columns, rows))
    expected = transposed_by_hand(src)
    with mock.patch.multiple(transpose, **SMALL_PANELS, _SIMD_SHUFFLE=simd):
        transpose_torch([dst], [src])
    assert_bytes_equal(packed(dst), expected)
    assert_bytes_equal(transposed_by_hand(src), expected)
    check()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32, torch.int64], ids=str)
@pytest.mark.parametrize(
    "shape", [(127, 65), (128, 64), (129, 257), (300, 16), (16, 301), (1030, 24), (513, 3000)], ids=str
)
def test_transpose_keeps_its_promise_at_the_real_panel_size(shape, dtype):
    src = address_valued(shape, dtype)
    dst, check = guarded(shape[::-1], dtype, strides=(2 * shape[0], 1))
    transpose_torch([dst], [src])
    assert_bytes_equal(dst, transposed_by_hand(src))
    check()


def test_transpose_splits_rows_too_long_for_one_panel():
    columns = transpose._PANEL_BYTES // (transpose._MIN_ROWS * 4) + 5
    src = address_valued((130, columns), torch.float32)
    dst, check = guarded((columns, 130), torch.float32)
    transpose_torch([dst], [src])
    assert_bytes_equal(dst, src.t())
    check()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32], ids=str)
@given(
    lanes=st.integers(2, 4),
    rows=st.sampled_from(SIDES),
    columns=st.sampled_from(SIDES),
    layout=st.sampled_from(["contiguous", "rows of a wider matrix", "columns first"]),
)
def test_interleaved_destinations_each_get_their_own_source(dtype, lanes, rows, columns, layout):
    whole, check = guarded((columns, rows, lanes), dtype, strides=(rows * lanes + 5, lanes, 1))
    sources = [SOURCE_LAYOUTS[layout](rows, columns, torch.int64).add(17 * lane).to(dtype) for lane in range(lanes)]
    with mock.patch.multiple(transpose, **SMALL_PANELS):
        transpose_torch(list(whole.unbind(-1)), sources)
    for lane, source in enumerate(sources):
        assert_bytes_equal(packed(whole[..., lane]), transposed_by_hand(source))
    check()


def test_interleaved_destinations_are_written_together():
    whole = poisoned((64, 128), torch.bfloat16)
    sources = [address_valued((64, 64), torch.bfloat16, start) for start in (0, 5000)]
    with mock.patch.object(transpose, "_transpose_panels", wraps=transpose._transpose_panels) as panels:
        transpose_torch([whole[:, 0::2], whole[:, 1::2]], sources)
    assert panels.call_count == 1
    assert_bytes_equal(whole[:, 1::2], transposed_by_hand(sources[1]))


@pytest.mark.parametrize("order", [(1, 0), (0, 0, 1)], ids=str)
def test_destinations_that_only_look_interleaved_are_written_right(order):
    src = [address_valued((64, 65), torch.bfloat16, 9000 * k) for k in range(len(order))]
    memory = poisoned((len(order), 65, 64, 2), torch.bfloat16)
    dst = [memory[0 if len(order) == 2 else k, ..., lane] for k, lane in enumerate(order)]
    transpose_torch(dst, src)
    for d, s in zip(dst, src, strict=True):
        assert_bytes_equal(d, transposed_by_hand(s))


def test_neighbours_of_different_shape_or_dtype_are_not_written_together():
    whole, check = guarded((80, 128), torch.bfloat16)
    gate, up = torch.arange(2 * 64 * 80).reshape(2, 64, 80).float()
    transpose_torch([whole[:, 0::2], whole[:70, 1::2]], [gate, up[:, :70]])
    assert_bytes_equal(whole[:, 0::2], gate.t().bfloat16())
    assert_bytes_equal(whole[:70, 1::2], up[:, :70].t().bfloat16())
    assert_bytes_equal(whole[70:, 1::2], poisoned((10, 64), torch.bfloat16))
    transpose_torch([whole[:, 0::2], whole.view(torch.float16)[:, 1::2]], [gate, up / 4])
    assert_bytes_equal(whole[:, 0::2], gate.t().bfloat16())
    assert_bytes_equal(whole.view(torch.float16)[:, 1::2], (up / 4).t().half())
    check()


def test_interleaved_sources_of_different_dtypes_are_each_cast():
    whole = poisoned((80, 128), torch.float32)
    gate = torch.arange(64 * 80).reshape(64, 80).to(torch.bfloat16)
    up = torch.arange(64 * 80).reshape(64, 80).float().neg()
    transpose_torch([whole[:, 0::2], whole[:, 1::2]], [gate, up])
    assert_bytes_equal(whole[:, 0::2], gate.t().float())
    assert_bytes_equal(whole[:, 1::2], up.t())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int16], ids=str)
@pytest.mark.parametrize("simd", [True, False])
def test_all_16_bit_patterns_arrive_as_they_left(dtype, simd, monkeypatch):
    monkeypatch.setattr(transpose, "_SIMD_SHUFFLE", simd and transpose._SIMD_SHUFFLE)
    src = address_valued((256, 256), dtype)
    for source in (src, src.flip(0), src[:, 1:], src.t().contiguous()):
        dst = poisoned(source.t().shape, dtype)
        transpose_torch([dst], [source])
        assert_bytes_equal(dst, transposed_by_hand(source))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.uint8], ids=str)
def test_all_byte_patterns_arrive_as_they_left(dtype):
    src = address_valued((64, 256), torch.uint8).add(torch.arange(64)[:, None]).to(torch.uint8)
    dst = poisoned((256, 64), dtype)
    transpose_torch([dst], [src.view(dtype)])
    assert_bytes_equal(dst, transposed_by_hand(src.view(dtype)))


def test_float32_specials_arrive_as_they_left():
    specials = [
        0x80000000,
        0x7F800001,
        0x7FA00000,
        0x7FC00123,
        0xFFFFFFFF,
        0xFF800000,
        1,
        0x007FFFFF,
    ]
    src = torch.tensor(specials * 1024, dtype=torch.int64).to(torch.int32).view(64, 128)
    src = src.view(torch.float32)
    dst = poisoned((128, 64), torch.float32)
    transpose_torch([dst], [src])
    assert_bytes_equal(dst, transposed_by_hand(src))


@pytest.mark.parametrize(
    ("source", "target"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float16),
        (torch.float16, torch.bfloat16),
        (torch.float64, torch.float32),
        (torch.bfloat16, torch.float64),
    ],
    ids=str,
)
@pytest.mark.parametrize("shape", [(129, 67), (64, 80), (300, 16), (3, 5)], ids=str)
def test_casts_round_as_tensor_to_does(source, target, shape):
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**62), 2**62, shape, generator=generator)
    src = (bits >> (62 - 8 * source.itemsize)).to(INTEGERS[source.itemsize]).view(source)
    dst, check = guarded(shape[::-1], target, strides=(2 * shape[0], 1))
    transpose_torch([dst], [src])
    expected = src.to(target).t()
    # PyTorch's own casts give a NaN different payloads in the vectorized loop and in its tail.
    assert torch.equal(dst.isnan(), expected.isnan())
    assert_bytes_equal(dst.nan_to_num(7.0), expected.nan_to_num(7.0))
    check()


@pytest.mark.parametrize("simd", [True, False])
@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (5, 1), (16, 16), (37, 53), (128, 500)], ids=str)
def test_words_are_transposed_into_memory_of_their_own(shape, simd, monkeypatch):
    monkeypatch.setattr(transpose, "_SIMD_SHUFFLE", simd and transpose._SIMD_SHUFFLE)
    words = address_valued(shape, torch.float32, start=0x7F7FFFF0)
    out = transpose._transposed_words(words)
    expected = transposed_by_hand(words.view(torch.int32))
    assert out.is_contiguous()
    assert_bytes_equal(out, expected)
    # The caller shifts the words in place.
    out.zero_()
    assert_bytes_equal(transposed_by_hand(words.view(torch.int32)), expected)


def test_scratch_stays_within_its_bound():
    src = address_valued((300, 9000), torch.bfloat16)[:, 1:]
    whole = poisoned((8999, 600), torch.bfloat16)
    known = {t.untyped_storage().data_ptr() for t in (src, whole)}
    sizes = []

    class Storages(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() not in known:
                sizes.append(out.untyped_storage().nbytes())
            return out

    with Storages():
        transpose_torch([whole[:, :300]], [src])
    assert 0 < max(sizes) <= transpose._PANEL_BYTES
    assert_bytes_equal(whole[:, :300], src.t())


def test_many_threads_may_transpose_at_once():
    sources = [address_valued((130, 200), torch.bfloat16, 1000 * k) for k in range(16)]
    whole = poisoned((16, 200, 260), torch.bfloat16)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda k: transpose_torch([whole[k, :, :130]], [sources[k]]), range(16)))
    for k, source in enumerate(sources):
        assert_bytes_equal(whole[k, :, :130], transposed_by_hand(source))


@pytest.mark.parametrize("shape", [(81, 64), (5, 3)], ids=str)
def test_parameter_is_written_without_a_graph(shape):
    parameter = torch.nn.Parameter(torch.zeros(shape, dtype=torch.bfloat16))
    src = torch.rand(shape[::-1]).bfloat16().requires_grad_()
    transpose_torch([parameter], [src])
    assert parameter.is_leaf
    assert_bytes_equal(parameter, src.t())


def test_nothing_to_do_is_done():
    transpose_torch([], [])


def test_lists_of_different_length_are_refused():
    with pytest.raises(ConversionError, match="one source per destination"):
        transpose_torch([torch.empty(2, 2)], [])


@pytest.mark.parametrize("shape", [(80, 65), (64, 80), (80,), (1, 80, 64)], ids=str)
def test_destination_of_another_shape_is_named_before_anything_is_written(shape):
    good = torch.zeros(80, 64)
    with pytest.raises(ConversionError, match=r"pair 1(.|\n)*dst \[80, 64\]"):
        transpose_torch([good, torch.zeros(shape)], [torch.ones(64, 80)] * 2)
    assert not good.any()


def test_destination_that_repeats_an_address_is_refused():
    with pytest.raises(RuntimeError, match="single memory location"):
        transpose_torch([torch.zeros(80, 1).expand(80, 64)], [torch.ones(64, 80)])
