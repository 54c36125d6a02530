"""Tests of adding deltas to tensors and to slabs of files, against each element by itself in float64."""

import itertools

import pytest
import torch

from automodel_conv.execution import adding
from automodel_conv.execution.adding import Additions, Sums, add_blocks, add_to_tensors, full_float32, merge_bytes
from automodel_conv.execution.factors import KEPT_BYTES, Factors
from automodel_conv.planning.boxes import Box, Piece
from automodel_conv.planning.copies import Target
from automodel_conv.planning.deltas import Delta, blocks_of
from automodel_conv.schedule.writes import Slab
from automodel_conv.testing import assert_bytes_equal
from tests.execution.held import CODES, Held

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def add(memory, start, blocks, factors):
    """Call ``add_blocks`` with scratch that holds other values."""
    scratch = Sums()
    scratch.of(1000, memory).fill_(float("nan"))
    add_blocks(memory, start, blocks, factors, scratch)


def small(*shape, seed=0, dtype=torch.float32):
    """Return quarters from -1 to 1, whose products and sums are exact in float32."""
    return (torch.randint(-4, 5, shape, generator=torch.Generator().manual_seed(seed)) / 4).to(dtype)


def stack(count, rows, columns, rank, scale=1.0, seed=0, dtype=torch.float32, **more):
    """Return the delta of a stack and its factors in the order of an adapter's file, and its matrices in float64."""
    a, b = small(count * rank, columns, seed=seed, dtype=dtype), small(rows, rank * count, seed=seed + 1, dtype=dtype)
    delta = Delta("m", 0, (count, rows, columns), 0, 1, rank, scale, **more)
    each = torch.empty(count, rows, columns, dtype=torch.float64)
    for e in range(count):
        of_expert = b[:, e * rank : (e + 1) * rank] if more else b[:, e::count]
        each[e] = scale * (of_expert.double() @ a[e * rank : (e + 1) * rank].double())
    return delta, Held(a, b), each


def rounded_once(exact, dtype):
    """Return float64 values in a dtype; they must be exact in float32, because torch rounds to that first."""
    assert dtype == torch.float64 or torch.equal(exact.float().double(), exact)
    return exact.to(dtype)


def placed(delta, *strides, offset=0):
    return blocks_of([delta.onto(offset, *strides)], [delta])


@pytest.fixture
def tiny_chunks(monkeypatch):
    monkeypatch.setattr(adding, "_CHUNK", 7)
    monkeypatch.setattr(adding, "_RANGE", 21)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_product_is_added_and_rounded_once(dtype):
    delta, held, each = stack(1, 5, 6, rank=3, scale=2.5)
    weight = torch.randn(5, 6, generator=torch.Generator().manual_seed(3)).to(dtype)
    memory = weight.flatten().clone()
    add(memory, 0, placed(delta, 6, 1), Factors([held], [delta]))
    exact = weight.double() + each[0]
    if dtype == torch.float32:  # a processor may add the terms of a product one by one, each with a rounding
        torch.testing.assert_close(memory.view(5, 6).double(), exact, rtol=0, atol=float(exact.abs().max()) * 2**-22)
    else:
        assert_bytes_equal(memory.view(5, 6), exact if dtype == torch.float64 else exact.float().to(dtype))
    assert not torch.equal(memory.view(5, 6), weight)


def test_sum_is_not_rounded_between_adapters():
    """A weight of 256 in bfloat16 has no neighbour closer than 2, so only the sum of both products changes it."""
    memory = torch.full((1,), 256.0, dtype=torch.bfloat16)
    deltas = [Delta("m", number, (1, 1, 1), 0, 1, 1, 1.0) for number in (0, 1)]
    one = torch.ones(1, 1)
    blocks = blocks_of([delta.onto(0, 1, 1)._replace(source=i) for i, delta in enumerate(deltas)], deltas)
    add(memory, 0, blocks, Factors([Held(one, one), Held(one, one)], deltas))
    assert memory.tolist() == [258.0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matrices_of_any_dtype_are_widened_before_the_product(dtype):
    delta, held, each = stack(2, 3, 4, rank=2, dtype=dtype)
    memory = torch.zeros(24)
    add(memory, 0, placed(delta, 4, 1, 12), Factors([held], [delta]))
    assert_bytes_equal(memory.view(2, 3, 4), each.float())


def test_float64_is_computed_in_float64():
    delta = Delta("m", 0, (1, 1, 1), 0, 1, 1, 1.0)
    third = torch.full((1, 1), 1 / 3, dtype=torch.float64)
    memory = torch.ones(1, dtype=torch.float64)
    add(memory, 0, placed(delta, 1, 1), Factors([Held(third, third)], [delta]))
    assert memory.item() == 1 + (1 / 3) * (1 / 3)


@pytest.mark.parametrize("scale", [0.0, -1.5])
def test_scale_may_be_zero_or_negative(scale):
    delta, held, each = stack(1, 3, 4, rank=2, scale=scale)
    memory = torch.ones(12)
    add(memory, 0, placed(delta, 4, 1), Factors([held], [delta]))
    assert_bytes_equal(memory.view(3, 4), (1 + each[0]).float())


def test_columns_of_b_may_be_grouped_by_matrix():
    delta, held, each = stack(3, 4, 5, rank=2, is_b_grouped=True)
    memory = torch.zeros(60)
    add(memory, 0, placed(delta, 5, 1, 20), Factors([held], [delta]))
    assert_bytes_equal(memory.view(3, 4, 5), each.float())


PLACES = {
    "plain": (lambda e, i, j: 20 * e + 5 * i + j, (5, 1, 20)),
    "transposed": (lambda e, i, j: 20 * e + i + 4 * j, (1, 4, 20)),
    "interleaved": (lambda e, i, j: 1 + 40 * e + 2 * i + 8 * j, (2, 8, 40)),
    "in wider rows": (lambda e, i, j: 1 + 44 * e + 11 * i + j, (11, 1, 44)),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("start", [0, 3, 8, 25])
@pytest.mark.parametrize("length", [1, 6, 30, 200])
@pytest.mark.usefixtures("tiny_chunks")
def test_any_range_of_a_tensor_gets_its_elements_of_the_products(place, start, length):
    at, strides = PLACES[place]
    delta, held, each = stack(3, 4, 5, rank=2)
    whole = small(132, seed=9)
    expected = whole.clone()
    for e, i, j in itertools.product(range(3), range(4), range(5)):
        expected[at(e, i, j)] += each[e, i, j]
    memory = whole[start : start + length].clone()
    add(memory, start, placed(delta, *strides, offset=at(0, 0, 0)), Factors([held], [delta]))
    assert_bytes_equal(memory, expected[start : start + length])


@pytest.mark.usefixtures("tiny_chunks")
def test_part_of_a_matrix_is_added():
    """Add every second row and every third column, from row 1 and column 2 on."""
    delta, held, each = stack(2, 6, 9, rank=2)
    piece = Piece(0, Box((2, 3, 2), (54, 18, 3), (6, 2, 1)), 9 + 2, 0)
    memory = torch.zeros(12)
    blocks = blocks_of([piece], [delta])
    add(memory, 0, blocks, Factors([held], [delta]))
    assert_bytes_equal(memory.view(2, 3, 2), each[:, 1::2, 2:8:3].float())


@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.usefixtures("tiny_chunks")
def test_delta_without_b_replaces_elements_before_others_are_added(is_transposed):
    values = small(4, 5, seed=5)
    whole = Delta("w", 1, (1, 4, 5), 0, None)
    delta, held, each = stack(1, 4, 5, rank=2)
    strides = (1, 4) if is_transposed else (5, 1)
    blocks = blocks_of([whole.onto(0, *strides), delta.onto(0, *strides)._replace(source=1)], [whole, delta])
    memory = torch.full((20,), float("nan"))
    add(memory, 0, blocks, Factors([held, Held(values)], [whole, delta]))
    expected = (values.double() + each[0]).float()
    assert_bytes_equal(memory, (expected.T if is_transposed else expected).flatten())


def test_elements_that_no_block_has_keep_their_bits():
    delta, held, _ = stack(1, 2, 3, rank=1)
    memory = torch.full((40,), float("nan"), dtype=torch.bfloat16)
    memory.view(torch.int16)[:] = 0x7FA1  # a NaN that a computation would change
    add(memory, 0, placed(delta, 3, 1, offset=100), Factors([held], [delta]))
    assert set(memory.view(torch.int16).tolist()) == {0x7FA1}


def test_no_elements_are_no_work():
    delta, held, _ = stack(1, 2, 3, rank=1)
    add(torch.empty(0), 0, placed(delta, 3, 1), Factors([held], [delta]))
    assert held.reads == []


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.usefixtures("tiny_chunks")
def test_tensors_get_their_deltas_wherever_their_elements_lie(threads):
    delta, held, each = stack(2, 6, 8, rank=2)
    base = {name: small(2, 6, 8, seed=4) for name in ("plain", "other")}
    tensors = {name: tensor.clone() for name, tensor in base.items()}
    spread = torch.zeros(2, 6, 16)
    tensors["spread"] = spread[:, :, ::2].copy_(base["plain"])
    tensors["turned"] = base["plain"].transpose(1, 2).contiguous().transpose(1, 2)
    tensors["parameter"] = torch.nn.Parameter(base["plain"].clone())
    blocks = {name: placed(delta, 8, 1, 48) for name in ("plain", "spread", "turned", "parameter")}
    add_to_tensors(tensors, blocks, Factors([held], [delta]), threads)
    expected = (base["plain"].double() + each).float()
    for name in blocks:
        assert_bytes_equal(tensors[name].detach().contiguous(), expected)
    assert_bytes_equal(tensors["other"], base["other"])
    assert not spread[:, :, 1::2].any()


def fail_without_tf32(flags):
    with full_float32():
        assert not flags.allow_tf32
        raise KeyError


def test_products_are_not_computed_in_tf32_meanwhile():
    flags = torch.backends.cuda.matmul
    before = flags.allow_tf32
    try:
        for setting in (True, False):
            flags.allow_tf32 = setting
            with pytest.raises(KeyError):
                fail_without_tf32(flags)
            assert flags.allow_tf32 == setting
    finally:
        flags.allow_tf32 = before


def test_memory_grows_with_the_threads():
    factors = Factors([Held(torch.ones(1, 6), torch.ones(3, 1))], [Delta("m", 0, (1, 3, 6), 0, 1, 1)], [(0,)])
    assert factors.kept_bytes == KEPT_BYTES + 4 * (6 + 3)
    assert merge_bytes(factors, 3) == factors.kept_bytes + 3 * adding.CHUNK_BYTES


def test_scratch_is_used_again_while_it_fits():
    scratch = Sums()
    first = scratch.of(8, torch.empty(0, dtype=torch.bfloat16))
    assert (first.dtype, first.shape) == (torch.float32, (8,))
    assert scratch.of(5, torch.empty(0)).data_ptr() == first.data_ptr()
    assert scratch.of(9, torch.empty(0)).shape == (9,)
    assert scratch.of(2, torch.empty(0, dtype=torch.float64)).dtype == torch.float64


class Producer:
    """Produces slabs from the bytes of a file, as one view or several; copies ranges on its own if asked to."""

    def __init__(self, data, parts=1, readonly=False):
        self.data, self.parts, self.readonly, self.copied = bytearray(data), parts, readonly, []

    def __call__(self, slab):
        view = memoryview(self.data)[slab.offset_bytes : slab.offset_bytes + slab.nbytes]
        view = view.toreadonly() if self.readonly else view
        middle = slab.nbytes // self.parts
        return [view] if self.parts == 1 else [view[:middle], view[middle:]]

    def try_copy_range(self, slab, fd):
        self.copied.append(slab.offset_bytes)
        return True


def slab(offset, nbytes, file=0):
    return Slab(file, offset, nbytes, [], {})


def one_file(dtype=torch.bfloat16):
    """Return a file of three tensors, of which the second has deltas, and its bytes after the merge."""
    delta, held, each = stack(1, 4, 5, rank=2, scale=0.5)
    parts = [small(20, seed=seed, dtype=dtype) for seed in (6, 7, 8)]
    size = parts[0].nbytes
    targets = [Target(name, CODES[dtype], (4, 5), -1, (), ()) for name in "abc"]
    additions = Additions(
        targets, [(0, i * size) for i in range(3)], {"b": placed(delta, 5, 1)}, Factors([held], [delta])
    )
    after = [parts[0], rounded_once(parts[1].double() + each.flatten(), dtype), parts[2]]
    data, expected = (b"".join(t.view(torch.uint8).numpy().tobytes() for t in group) for group in (parts, after))
    return additions, data, expected


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("step", [8, 24, 56, 480])
@pytest.mark.parametrize(("parts", "readonly"), [(1, False), (1, True), (2, False)])
def test_slabs_of_any_size_get_their_part_of_the_deltas(dtype, step, parts, readonly):
    additions, data, expected = one_file(dtype)
    source = Producer(data, parts, readonly)
    produce = additions.added(lambda: source)()
    slabs = [slab(offset, min(step, len(data) - offset)) for offset in range(0, len(data), step)]
    assert b"".join(bytes(view) for one in slabs for view in produce(one)) == expected
    if readonly:
        assert source.data == data


def test_only_slabs_without_deltas_are_copied_by_the_system():
    additions, data, _ = one_file()
    source = Producer(data)
    produce = additions.added(lambda: source)()
    slabs = [slab(0, 40), slab(0, 41), slab(40, 40), slab(79, 2), slab(80, 40), slab(60, 0), slab(40, 40, file=1)]
    assert [produce.try_copy_range(one, 3) for one in slabs] == [True, False, False, False, True, True, True]
    assert source.copied == [0, 80, 60, 40]


def test_each_thread_has_a_producer_of_its_own():
    additions, data, _ = one_file()
    started = []
    start = additions.added(lambda: started.append(len(started)) or Producer(data))
    assert start() is not start()
    assert started == [0, 1]
