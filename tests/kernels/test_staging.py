"""Tests of tables on their way to a device: memory in use is never written again, and little is ever pinned."""

import ctypes
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import numpy as np
import pytest
import torch

from automodel_conv.kernels import staging
from automodel_conv.kernels.staging import Staging

BLOCK_BYTES = 1 << 10


class HostAllocator:
    """An allocator that keeps memory and reuses it, but not during a copy out of it, as torch keeps pinned memory.

    ``copied`` marks the copies out of dropped memory as done.
    """

    def __init__(self):
        self.pinned, self.dropped, self.free = [], [], []

    def __call__(self, numbers):
        fitting = [number for number, memory in enumerate(self.free) if len(memory) == numbers]
        if fitting:
            memory = self.free.pop(fitting[0])
        else:
            memory = np.full(numbers, -1)
            self.pinned.append(numbers)
        lent = memory.view()  # alive as long as a tensor of this memory
        weakref.finalize(lent, self.dropped.append, memory)
        return torch.from_numpy(lent)

    def copied(self):
        self.free += self.dropped
        self.dropped.clear()


def tables(count, seed=0):
    numbers = np.random.default_rng(seed)
    shapes = numbers.integers(1, 20, (count, 2))
    return [numbers.integers(0, 2**62, tuple(shape)) for shape in shapes]


def test_tables_arrive_in_their_shape_and_stay_as_they_are():
    stage = Staging(lambda numbers: torch.full((numbers,), -1, dtype=torch.int64), BLOCK_BYTES)
    given = tables(500)
    staged = [stage(table) for table in given]
    for table, place in zip(given, staged, strict=True):
        assert place.dtype == torch.int64
        assert place.is_contiguous()
        assert np.array_equal(place.numpy(), table)


def test_threads_allocate_one_at_a_time():
    pinning = []

    def allocate(numbers):
        pinning.append(numbers)
        time.sleep(0.001)  # gives the others the chance to use the same place
        assert pinning.pop() == numbers
        assert not pinning
        return torch.full((numbers,), -1, dtype=torch.int64)

    stage = Staging(allocate, BLOCK_BYTES)
    given = [np.full((40, 2), seed) for seed in range(64)]
    with ThreadPoolExecutor(8) as threads:
        staged = [*threads.map(stage, given)]
    assert all(np.array_equal(place.numpy(), table) for table, place in zip(given, staged, strict=True))


def test_noncontiguous_table_is_staged_whole():
    stage = Staging(lambda numbers: torch.empty(numbers, dtype=torch.int64), BLOCK_BYTES)
    table = np.arange(24).reshape(4, 6).T
    assert np.array_equal(stage(table).numpy(), table)
    assert np.array_equal(stage(table[::2]).numpy(), table[::2])


def test_one_block_serves_many_tables_and_a_full_one_is_followed_by_another():
    pinned = []
    stage = Staging(lambda numbers: pinned.append(numbers) or torch.empty(numbers, dtype=torch.int64), BLOCK_BYTES)
    numbers = BLOCK_BYTES // 8
    for _ in range(8):
        stage(np.zeros((numbers // 8, 1), np.int64))
    assert pinned == [numbers]
    stage(np.zeros((1, 1), np.int64))
    assert pinned == [numbers, numbers]


def test_table_larger_than_a_block_has_memory_of_its_own():
    pinned = []
    stage = Staging(lambda numbers: pinned.append(numbers) or torch.empty(numbers, dtype=torch.int64), BLOCK_BYTES)
    table = np.arange(BLOCK_BYTES).reshape(-1, 2)
    stage(np.zeros((3, 2), np.int64))
    assert np.array_equal(stage(table).numpy(), table)
    stage(np.zeros((3, 2), np.int64))
    assert pinned == [BLOCK_BYTES // 8, table.size]


def upload_to_meta(stage, table):
    with mock.patch.object(staging, "_STAGING", stage):
        return staging.upload(table, torch.device("meta"))


def test_uploads_stage_and_pin_nothing_more():
    stage = mock.Mock(wraps=Staging(lambda numbers: torch.empty(numbers, dtype=torch.int64), BLOCK_BYTES))
    with mock.patch.object(torch.Tensor, "pin_memory", side_effect=AssertionError("pins")):
        for table in tables(20):
            on_device = upload_to_meta(stage, table)
            assert (on_device.shape, on_device.dtype, on_device.device.type) == (table.shape, torch.int64, "meta")
    assert stage.call_count == 20


def test_blocks_take_turns_once_their_copies_are_done():
    allocator = HostAllocator()
    stage = Staging(allocator, BLOCK_BYTES)
    for table in tables(400):
        upload_to_meta(stage, table)
        allocator.copied()
    assert allocator.pinned.count(BLOCK_BYTES // 8) == 2


def test_block_is_not_written_during_copies_out_of_it():
    allocator = HostAllocator()
    stage = Staging(allocator, BLOCK_BYTES)
    in_flight = []
    for table in tables(400):
        # The copy reads later, when no reference to the tensor is left.
        in_flight.append((table, (ctypes.c_int64 * table.size).from_address(stage(table).data_ptr())))
    assert all([*read] == table.reshape(-1).tolist() for table, read in in_flight)


def test_graph_under_capture_gets_memory_that_is_not_shared():
    # Memory that torch pins during a capture stays with the graph, and its replays read it again.
    with (
        mock.patch.object(staging, "_STAGING") as stage,
        mock.patch.object(torch.cuda, "is_current_stream_capturing", return_value=True),
        mock.patch.object(torch.Tensor, "pin_memory") as pin,
    ):
        uploaded = staging.upload(np.zeros((3, 2), np.int64), torch.device("cuda"))
    assert not stage.called
    assert uploaded is pin.return_value.to.return_value
    pin.return_value.to.assert_called_once_with(torch.device("cuda"), non_blocking=True)


def test_cpu_gets_the_table_itself():
    table = np.arange(6).reshape(3, 2)
    uploaded = staging.upload(table, torch.device("cpu"))
    assert uploaded.data_ptr() == table.ctypes.data
    assert torch.equal(uploaded, torch.tensor([[0, 1], [2, 3], [4, 5]]))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_tables_in_flight_on_two_streams_arrive_whole():
    device = torch.device("cuda")
    streams = [torch.cuda.Stream(device) for _ in range(2)]
    stage = Staging(block_bytes=BLOCK_BYTES)
    given, uploaded = tables(400), []
    with mock.patch.object(staging, "_STAGING", stage):
        for number, table in enumerate(given):
            with torch.cuda.stream(streams[number % 2]):
                torch.cuda._sleep(100_000)
                uploaded.append(staging.upload(table, device))
    torch.cuda.synchronize(device)
    for table, on_device in zip(given, uploaded, strict=True):
        assert np.array_equal(on_device.cpu().numpy(), table)
