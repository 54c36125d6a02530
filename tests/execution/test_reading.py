"""Tests of reads of files into memory: one call for neighbours, files closed after their last job, named errors."""

import os

import pytest
import torch

from automodel_conv.errors import ReadError
from automodel_conv.execution.reading import OpenFiles, read, read_whole
from automodel_conv.files import system
from automodel_conv.schedule.jobs import GAP_BYTES, Read, Reads
from automodel_conv.testing import assert_bytes_equal
from tests.execution.support import write_checkpoint
from tests.faults import descriptors

FILES = {
    "a.safetensors": {"a": torch.arange(5, dtype=torch.uint8), "b": torch.arange(50, 57, dtype=torch.uint8)},
    "b.safetensors": {"c": torch.tensor(2.5, dtype=torch.bfloat16), "none": torch.ones(0, 3)},
}


@pytest.fixture
def checkpoint(tmp_path):
    return write_checkpoint(tmp_path, FILES)


@pytest.fixture
def calls(monkeypatch):
    """Record the offset and the bytes of each system call."""
    seen, stock = [], system.preadv

    def preadv(fd, views, offset):
        seen.append((offset, sum(map(len, views))))
        return stock(fd, views, offset)

    monkeypatch.setattr(system, "preadv", preadv)
    return seen


def test_neighbours_are_read_in_one_call_and_the_gap_between_them_is_counted(checkpoint, calls):
    start = checkpoint.offsets[0]
    reads = Reads.from_list([Read(0, start, 2, 0, 3), Read(0, start + 4, 3, 1, 0)])
    memories = [bytearray(b"." * 6), bytearray(b"." * 4)]
    files = OpenFiles(checkpoint, [reads])
    assert read(reads, checkpoint, files, list(map(memoryview, memories))) == 2
    assert memories == [bytearray(b"...\0\1."), bytearray([4, 50, 51]) + b"."]
    assert calls == [(start, 7)]


def test_distant_reads_are_calls_of_their_own(tmp_path, calls):
    big = torch.zeros(GAP_BYTES + 3, dtype=torch.uint8)
    big[-1] = 9
    checkpoint = write_checkpoint(tmp_path, {"a.safetensors": {"a": big}})
    start, memory = checkpoint.offsets[0], bytearray(2)
    calls.clear()
    reads = Reads.from_list([Read(0, start, 1, 0, 0), Read(0, start + GAP_BYTES + 2, 1, 0, 1)])
    assert read(reads, checkpoint, OpenFiles(checkpoint, [reads]), [memoryview(memory)]) == 0
    assert (list(memory), len(calls)) == ([0, 9], 2)


def test_file_is_open_from_its_first_job_to_its_last(checkpoint):
    one = Reads.from_list([Read(0, checkpoint.offsets[0], 1, 0, 0)])
    before, memory = descriptors(), [memoryview(bytearray(1))]
    files = OpenFiles(checkpoint, [one, one])
    assert descriptors() == before
    read(one, checkpoint, files, memory)
    assert descriptors() == before + 1
    assert files.opened(0) is files.opened(0)
    read(one, checkpoint, files, memory)
    assert descriptors() == before
    files.close()


def test_source_is_read_whole_into_its_shape_and_dtype(checkpoint):
    before = descriptors()
    for name, tensor in {**FILES["a.safetensors"], **FILES["b.safetensors"]}.items():
        assert_bytes_equal(read_whole(checkpoint.position[name], checkpoint), tensor)
    assert descriptors() == before


def test_tensor_that_a_cut_file_lacks_is_named(checkpoint):
    row = checkpoint.position["b"]
    os.truncate(checkpoint.files[0], checkpoint.offsets[row] + 6)
    reads = Reads.from_list([Read(0, checkpoint.offsets[0], 12, 0, 0)])
    files = OpenFiles(checkpoint, [reads])
    with pytest.raises(ReadError, match=r"(?s)a\.safetensors.*tensor:   b\n.*ends too early"):
        read(reads, checkpoint, files, [memoryview(bytearray(12))])
    files.close()


def test_read_that_fails_names_the_tensors_that_it_touches(checkpoint, monkeypatch):
    def fail(fd, views, offset):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(system, "preadv", fail)
    reads = Reads.from_list([Read(0, checkpoint.offsets[0], 12, 0, 0)])
    files = OpenFiles(checkpoint, [reads])
    with pytest.raises(ReadError, match=r"(?s)one of 2, a to b\n.*Input/output"):
        read(reads, checkpoint, files, [memoryview(bytearray(12))])
    files.close()


def test_file_that_is_gone_is_named_with_its_tensor(checkpoint):
    os.remove(checkpoint.files[1])
    with pytest.raises(ReadError, match=r"(?s)b\.safetensors.*tensor:   c\n.*cannot open"):
        read_whole(checkpoint.position["c"], checkpoint)
