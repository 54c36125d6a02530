"""Tests of new memory: its pages are populated before bytes are written, and all other memory is left unchanged."""

from __future__ import annotations

import mmap
import sys

import pytest
import torch

from automodel_conv.execution import page_calls
from automodel_conv.execution.new_memory import BLOCK_BYTES, NewMemory
from automodel_conv.planning.boxes import Box, run_of
from automodel_conv.schedule.jobs import Copies, Read, Reads

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="pages are asked for on Linux")

MIB = 1 << 20


def new(nbytes):
    """Return ``nbytes`` of new memory that begins with a block."""
    memory = torch.frombuffer(mmap.mmap(-1, nbytes + BLOCK_BYTES), dtype=torch.uint8)
    start = -memory.data_ptr() % BLOCK_BYTES
    return memory[start : start + nbytes]


def share(tensor):
    start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    stop = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    return page_calls.resident_share(start, stop - start)


def filling(*places):
    """Return reads that fill ranges: ``(start, length)``, or ``(start, length, tensor)``."""
    return Reads.from_list([Read(0, 0, nbytes, *target or (0,), start) for start, nbytes, *target in places])


@pytest.fixture
def advice(monkeypatch):
    calls = []
    stock = page_calls.advise_huge_pages
    monkeypatch.setattr(
        page_calls, "advise_huge_pages", lambda *arguments: calls.append(arguments) or stock(*arguments)
    )
    return calls


@pytest.mark.parametrize("huge_pages", [None, True, False])
def test_only_pages_near_the_writes_of_a_job_are_populated(huge_pages):
    buffer = new(64 * MIB)
    memory = NewMemory([buffer], huge_pages)
    memory.populate_for(filling((16 * MIB + 5, 3 * MIB)))
    assert share(buffer[16 * MIB : 19 * MIB]) == 1
    assert share(buffer[: 14 * MIB]) == share(buffer[22 * MIB :]) == 0
    assert not buffer.any()


@pytest.mark.parametrize("huge_pages", [True, False])
def test_given_page_size_is_requested_once(huge_pages, advice):
    buffers = [new(16 * MIB), new(16 * MIB)]
    memory = NewMemory(buffers, huge_pages)
    for _ in range(2):
        memory.populate_for(filling(*((start * MIB, MIB, n) for n in (0, 1) for start in range(16))))
    assert [share(buffer) for buffer in buffers] == [1, 1]
    assert [call[2] for call in advice] == [huge_pages] * 2
    use = memory.use()
    assert (use.huge_bytes, use.small_bytes)[not huge_pages] == 32 * MIB
    assert (use.huge_bytes, use.small_bytes)[huge_pages] == 0


def test_span_of_a_move_is_populated():
    buffer = new(32 * MIB)
    column = Copies(0, "U8", Box((8, 16), (16, 1), (2 * MIB, 1)), [0], [8 * MIB])
    NewMemory([buffer]).populate_for([column])
    assert share(buffer[8 * MIB : 22 * MIB]) == 1
    assert share(buffer[: 6 * MIB]) == 0


def test_offsets_of_moves_count_elements():
    buffer = new(32 * MIB).view(torch.float32)
    NewMemory([buffer]).populate_for([Copies(0, "F32", run_of(16), [0], [4 * MIB])])
    assert share(buffer.view(torch.uint8)[16 * MIB : 18 * MIB]) == 1
    assert share(buffer.view(torch.uint8)[: 14 * MIB]) == 0


def test_written_memory_is_unchanged(advice):
    buffer = new(16 * MIB).fill_(7)
    memory = NewMemory([buffer])
    memory.populate_for(filling((0, 16 * MIB)))
    assert memory.use().huge_bytes == memory.use().small_bytes == 0
    assert advice == []
    assert bool((buffer == 7).all())


def test_block_begun_by_another_job_is_populated():
    buffer = new(16 * MIB)
    buffer[4 * MIB : 4 * MIB + 100] = 7
    NewMemory([buffer]).populate_for(filling((0, 16 * MIB)))
    assert share(buffer) == 1
    assert int(buffer.sum()) == 700


def test_small_buffers_are_left_to_the_system(advice):
    buffer = new(2 * BLOCK_BYTES - mmap.PAGESIZE)
    memory = NewMemory([buffer, torch.empty(0), torch.tensor(1)])
    memory.populate_for(filling((0, buffer.nbytes)))
    memory.populate_all(1)
    assert advice == []
    assert share(buffer) == 0


def test_nothing_outside_of_a_buffer_is_populated():
    whole = new(32 * MIB)
    inside = whole[8 * MIB + 100 : 16 * MIB + 200]
    NewMemory([inside]).populate_all(2)
    assert share(whole[8 * MIB + mmap.PAGESIZE : 16 * MIB]) == 1
    assert share(whole[: 8 * MIB]) == share(whole[16 * MIB + mmap.PAGESIZE :]) == 0


@pytest.mark.parametrize("threads", [1, 3])
def test_whole_buffers_are_populated(threads):
    buffers = [new(20 * MIB), new(5 * MIB).view(torch.bfloat16)]
    memory = NewMemory(buffers)
    memory.populate_all(threads)
    assert [share(buffer) for buffer in buffers] == [1, 1]
    use = memory.use()
    assert use.huge_bytes + use.small_bytes == 25 * MIB
    assert None not in (use.huge_gb_per_s, use.small_gb_per_s)


def test_both_sizes_are_tried(advice):
    NewMemory([new(64 * MIB)]).populate_all(1)
    assert [call[2] for call in advice[:4]] == [True, False] * 2


@pytest.mark.parametrize(("huge_pages", "asked"), [(None, True), (True, True), (False, False)])
def test_system_that_cannot_populate_pages_gets_huge_page_advice(monkeypatch, advice, huge_pages, asked):
    monkeypatch.setattr(page_calls, "populate_pages", lambda address, nbytes: False)
    buffer = new(64 * MIB)
    memory = NewMemory([buffer], huge_pages)
    memory.populate_all(1)
    assert advice[-1][2] is asked
    assert share(buffer) == 0
    assert memory.use().huge_gb_per_s is None


def test_tensors_side_by_side_stay_one_mapping():
    """Check tensors that share pages with the headers that malloc puts between them, as torch's large ones do."""

    def mappings():
        with open("/proc/self/maps") as maps:
            return len(maps.readlines())

    distance, header = 40 * MIB + mmap.PAGESIZE, 64
    memory = mmap.mmap(-1, 20 * distance, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    tensors = [whole[at : at + 40 * MIB] for at in range(header, 20 * distance, distance)]
    before = mappings()
    for huge_pages in (False, None, True, None):
        NewMemory(tensors, huge_pages).populate_all(1)
        assert mappings() - before < 20


def test_partial_block_is_not_measured(advice):
    """Such a block cannot be a huge page, so its time is not evidence about huge pages."""
    buffer = new(32 * MIB)[MIB : 13 * MIB]  # half a block, five whole ones, half a block
    memory = NewMemory([buffer])
    memory.populate_all(1)
    assert share(buffer) == 1
    sizes = [(nbytes, address % BLOCK_BYTES) for address, nbytes, _ in advice if nbytes < buffer.nbytes]
    assert set(sizes) == {(BLOCK_BYTES, 0)}
    assert sum(memory.use()[:2]) == 12 * MIB


def test_unwritten_memory_is_not_populated():
    columns = new(64 * MIB).view(-1, 4096)[:, :100]
    NewMemory([columns]).populate_all(1)
    assert page_calls.resident_share(columns.data_ptr(), 60 * MIB) == 0


def test_requested_pages_are_reported_if_they_cannot_be_populated(monkeypatch):
    monkeypatch.setattr(page_calls, "populate_pages", lambda address, nbytes: False)
    buffer = new(64 * MIB)
    memory = NewMemory([buffer])
    memory.populate_all(1)
    assert memory.use() == (64 * MIB, 0, None, None)


def test_system_without_page_calls_is_not_called(monkeypatch, advice):
    monkeypatch.setattr(page_calls, "can_advise", lambda: False)
    buffer = new(16 * MIB)
    NewMemory([buffer]).populate_all(2)
    assert advice == []
    assert share(buffer) == 0
