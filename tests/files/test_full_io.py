"""Tests of reads and writes of many buffers in few calls, with short results and missing functions."""

import errno
import os

import pytest

from automodel_conv.errors import ReadError, WriteError
from automodel_conv.files import system
from automodel_conv.files.full_io import IOV_MAX, read_exactly, write_exactly
from tests.files.support import CONTENT


def slots(sizes):
    """Return poisoned buffers of these sizes, and one view of each."""
    buffers = [bytearray(b"\xee" * size) for size in sizes]
    return buffers, [memoryview(buffer) for buffer in buffers]


@pytest.mark.parametrize("missing", [(), ("preadv",), ("preadv", "pread")], ids=str)
def test_read_exactly_scatters_without_preadv_and_pread_too(fd, file, monkeypatch, missing):
    for name in missing:
        monkeypatch.delattr(os, name)
    buffers, views = slots([3, 0, 100, 1, 0])
    read_exactly(fd, views, 7, file)
    assert b"".join(buffers) == CONTENT[7:111]


@pytest.mark.parametrize("cap", [1, 2, 3, 5, 64])
def test_read_exactly_goes_on_after_short_reads(fd, file, monkeypatch, cap):
    real = system.preadv

    def short(fd, views, offset):
        total = 0
        for view in views:
            part = view[: cap - total]
            if len(part) and total < cap:
                total += real(fd, [part], offset + total)
        return total

    monkeypatch.setattr(system, "preadv", short)
    buffers, views = slots([2, 7, 0, 1, 13])
    kept = list(views)
    read_exactly(fd, views, 5, file)
    assert b"".join(buffers) == CONTENT[5:28]
    assert views == kept, "the caller's list was changed"


def test_read_exactly_never_passes_more_views_than_the_system_accepts(fd, file, monkeypatch):
    real, counts = system.preadv, []

    def counted(fd, views, offset):
        counts.append(len(views))
        return real(fd, views, offset)

    monkeypatch.setattr(system, "preadv", counted)
    buffers, views = slots([1] * (2 * IOV_MAX + 5))
    read_exactly(fd, views, 0, file)
    assert b"".join(buffers) == CONTENT[: len(views)]
    assert counts == [IOV_MAX, IOV_MAX, 5]


def test_read_exactly_of_nothing_makes_no_call(fd, file, monkeypatch):
    monkeypatch.setattr(system, "preadv", None)
    read_exactly(fd, [], 0, file)
    read_exactly(fd, slots([0, 0])[1], 10**9, file)


def test_many_empty_views_are_not_the_end_of_the_file(fd, file):
    buffers, views = slots([0] * (IOV_MAX + 1) + [4])
    read_exactly(fd, views, 9, file)
    assert buffers[-1] == CONTENT[9:13]


def test_end_of_file_names_file_offset_expected_and_found(fd, file):
    with pytest.raises(ReadError) as caught:
        read_exactly(fd, slots([4, 8])[1], len(CONTENT) - 10, file)
    text = str(caught.value)
    assert f"{file}, byte {len(CONTENT)}" in text
    assert f"expected: 12 bytes from byte {len(CONTENT) - 10}" in text
    assert "found:    10 bytes" in text


def test_error_of_the_system_names_file_and_offset(fd, file, monkeypatch):
    def broken(fd, views, offset):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(system, "preadv", broken)
    with pytest.raises(ReadError, match=r"(?s)data, byte 7.*Input/output error.*do: .*check the disk") as caught:
        read_exactly(fd, slots([4])[1], 7, file)
    assert isinstance(caught.value.__cause__, OSError)


@pytest.mark.parametrize("missing", [(), ("pwritev",), ("pwritev", "pwrite")], ids=str)
def test_write_exactly_gathers_without_pwritev_and_pwrite_too(target, tmp_path, monkeypatch, missing):
    for name in missing:
        monkeypatch.delattr(os, name)
    write_exactly(target, [memoryview(b"abc"), memoryview(b""), memoryview(b"defgh")], 3, "new")
    assert (tmp_path / "new").read_bytes() == b"\0\0\0abcdefgh"


@pytest.mark.parametrize("cap", [1, 2, 3, 5, 64])
def test_write_exactly_goes_on_after_short_writes(target, tmp_path, monkeypatch, cap):
    real = system.pwritev
    monkeypatch.setattr(system, "pwritev", lambda fd, views, offset: real(fd, [views[0][:cap]], offset))
    write_exactly(target, [memoryview(CONTENT[:7]), memoryview(CONTENT[7:20])], 0, "new")
    assert (tmp_path / "new").read_bytes() == CONTENT[:20]


@pytest.mark.parametrize("count", [0, OSError(errno.ENOSPC, "No space left on device")], ids=str)
def test_failed_write_names_file_and_offset(target, monkeypatch, count):
    def full(fd, views, offset):
        if isinstance(count, OSError):
            raise count
        return count

    monkeypatch.setattr(system, "pwritev", full)
    with pytest.raises(WriteError, match=r"(?s)new, byte 7.*expected: 4 bytes from byte 7.*found:    0 bytes"):
        write_exactly(target, [memoryview(b"abcd")], 7, "new")
