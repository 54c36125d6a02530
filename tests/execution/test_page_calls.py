"""Tests of the system calls about pages of memory."""

import ctypes
import mmap
import sys

import pytest

from automodel_conv.execution import page_calls


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has madvise for huge pages")
def test_huge_page_advice_covers_only_whole_pages_in_the_range(monkeypatch):
    calls = []
    monkeypatch.setattr(
        page_calls, "_memory_call", lambda name: lambda *arguments: calls.append((name, *arguments)) or 0
    )
    page = mmap.PAGESIZE
    assert page_calls.advise_huge_pages(10 * page + 1, 3 * page)
    assert page_calls.advise_huge_pages(10 * page, 2 * page + 5)
    assert not page_calls.advise_huge_pages(10 * page + 1, 2 * page - 2)
    assert not page_calls.advise_huge_pages(10 * page, 0)
    assert page_calls.advise_huge_pages(10 * page, page, use=False)
    assert calls == [
        ("madvise", 11 * page, 2 * page, 14),
        ("madvise", 10 * page, 2 * page, 14),
        ("madvise", 10 * page, page, 15),
    ]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has madvise for huge pages")
def test_huge_page_advice_keeps_the_contents_and_ignores_refusal():
    buffer = mmap.mmap(-1, 4 << 20)
    buffer[:] = b"\x5a" * len(buffer)
    address = ctypes.addressof(ctypes.c_char.from_buffer(buffer))
    page_calls.advise_huge_pages(address, len(buffer))
    assert buffer[:] == b"\x5a" * (4 << 20)
    # The last page of the address space is never mapped for a process: the kernel refuses.
    assert not page_calls.advise_huge_pages(2**64 - 2 * mmap.PAGESIZE, mmap.PAGESIZE)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can populate pages")
def test_pages_are_populated_once_and_keep_their_contents():
    page = mmap.PAGESIZE
    buffer = mmap.mmap(-1, 8 * page)
    buffer[3 * page] = 7
    address = ctypes.addressof(ctypes.c_char.from_buffer(buffer))
    assert page_calls.resident_share(address, 8 * page) == 1 / 8
    assert page_calls.populate_pages(address, 6 * page)
    assert page_calls.resident_share(address, 8 * page) == 6 / 8
    assert page_calls.populate_pages(address, 8 * page)
    assert page_calls.resident_share(address, 8 * page) == 1
    assert buffer[3 * page] == 7
    assert buffer[:].count(0) == 8 * page - 1
    assert not page_calls.populate_pages(2**64 - 2 * page, page)
    assert page_calls.resident_share(2**64 - 2 * page, page) == 1


def test_other_systems_leave_memory_unchanged(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.delattr(page_calls, "_memory_call")
    assert not page_calls.can_advise()
    assert not page_calls.advise_huge_pages(0, 1 << 30)
    assert not page_calls.populate_pages(0, 1 << 30)
    assert page_calls.resident_share(0, 1 << 30) == 1
