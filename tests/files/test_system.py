import ctypes
import errno
import mmap
import os
import sys

import pytest

from automodel_conv.errors import ReadError
from automodel_conv.files import system

CONTENT = bytes(range(256)) * 20


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "data"
    path.write_bytes(CONTENT)
    return str(path)


@pytest.fixture
def fd(file):
    descriptor = system.open_readonly(file)
    yield descriptor
    system.close(descriptor)


def slots(sizes):
    """Poisoned buffers of these sizes and one view of each."""
    buffers = [bytearray(b"\xee" * size) for size in sizes]
    return buffers, [memoryview(buffer) for buffer in buffers]


def test_size_is_the_length_of_the_file(fd):
    assert system.size(fd) == len(CONTENT)


@pytest.mark.parametrize("missing", [(), ("preadv",), ("preadv", "pread")], ids=str)
def test_read_exactly_scatters_without_preadv_and_pread_too(fd, file, monkeypatch, missing):
    for name in missing:
        monkeypatch.delattr(os, name)
    buffers, views = slots([3, 0, 100, 1, 0])
    system.read_exactly(fd, views, 7, file)
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
    system.read_exactly(fd, views, 5, file)
    assert b"".join(buffers) == CONTENT[5:28]
    assert views == kept, "the caller's list is his own"


def test_read_exactly_never_passes_more_views_than_the_system_takes(fd, file, monkeypatch):
    real, counts = system.preadv, []

    def counted(fd, views, offset):
        counts.append(len(views))
        return real(fd, views, offset)

    monkeypatch.setattr(system, "preadv", counted)
    buffers, views = slots([1] * (2 * system.IOV_MAX + 5))
    system.read_exactly(fd, views, 0, file)
    assert b"".join(buffers) == CONTENT[: len(views)]
    assert counts == [system.IOV_MAX, system.IOV_MAX, 5]


def test_read_exactly_of_nothing_makes_no_call(fd, file, monkeypatch):
    monkeypatch.delattr(system, "preadv")
    system.read_exactly(fd, [], 0, file)
    system.read_exactly(fd, slots([0, 0])[1], 10**9, file)


def test_many_empty_views_are_not_the_end_of_the_file(fd, file):
    buffers, views = slots([0] * (system.IOV_MAX + 1) + [4])
    system.read_exactly(fd, views, 9, file)
    assert buffers[-1] == CONTENT[9:13]


def test_end_of_file_names_file_offset_expected_and_found(fd, file):
    with pytest.raises(ReadError) as caught:
        system.read_exactly(fd, slots([4, 8])[1], len(CONTENT) - 10, file)
    text = str(caught.value)
    assert f"{file}, byte {len(CONTENT)}" in text
    assert f"expected: 12 bytes from byte {len(CONTENT) - 10}" in text
    assert "found:    10 bytes" in text


def test_error_of_the_system_names_file_and_offset(fd, file, monkeypatch):
    def broken(fd, views, offset):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(system, "preadv", broken)
    with pytest.raises(ReadError, match=r"(?s)data, byte 7.*Input/output error") as caught:
        system.read_exactly(fd, slots([4])[1], 7, file)
    assert isinstance(caught.value.__cause__, OSError)


@pytest.mark.skipif(sys.platform != "linux", reason="madvise with huge pages is Linux's")
def test_huge_page_advice_covers_whole_pages_inside_the_range_alone(monkeypatch):
    calls = []
    monkeypatch.setattr(system, "_madvise", lambda: lambda *arguments: calls.append(arguments) or 0)
    page = mmap.PAGESIZE
    assert system.advise_huge_pages(10 * page + 1, 3 * page)
    assert system.advise_huge_pages(10 * page, 2 * page + 5)
    assert not system.advise_huge_pages(10 * page + 1, 2 * page - 2)
    assert not system.advise_huge_pages(10 * page, 0)
    assert calls == [(11 * page, 2 * page, 14), (10 * page, 2 * page, 14)]


@pytest.mark.skipif(sys.platform != "linux", reason="madvise with huge pages is Linux's")
def test_huge_page_advice_keeps_the_contents_and_ignores_refusal():
    buffer = mmap.mmap(-1, 4 << 20)
    buffer[:] = b"\x5a" * len(buffer)
    address = ctypes.addressof(ctypes.c_char.from_buffer(buffer))
    system.advise_huge_pages(address, len(buffer))
    assert buffer[:] == b"\x5a" * (4 << 20)
    # The last page of the address space is never mapped for a process: the kernel refuses.
    assert not system.advise_huge_pages(2**64 - 2 * mmap.PAGESIZE, mmap.PAGESIZE)


def test_huge_page_advice_does_nothing_elsewhere(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.delattr(system, "_madvise")
    assert not system.advise_huge_pages(0, 1 << 30)


def test_listing_and_kinds_of_paths(tmp_path, file):
    (tmp_path / "a").mkdir()
    assert system.list_names(str(tmp_path)) == ["a", "data"]
    assert system.is_file(file)
    assert not system.is_file(str(tmp_path))
    assert system.is_directory(str(tmp_path))
    assert not system.is_directory(file)
    assert system.exists(file)
    assert not system.exists(file + "x")
