import errno
import os
import sys
import time

import pytest

from automodel_conv.errors import ReadError, WriteError
from automodel_conv.files import system
from automodel_conv.files.full_io import IOV_MAX, read_exactly, write_exactly

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
    assert views == kept, "the caller's list is his own"


def test_read_exactly_never_passes_more_views_than_the_system_takes(fd, file, monkeypatch):
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
    with pytest.raises(ReadError, match=r"(?s)data, byte 7.*Input/output error") as caught:
        read_exactly(fd, slots([4])[1], 7, file)
    assert isinstance(caught.value.__cause__, OSError)


def test_a_thread_that_works_is_ready_and_one_that_sleeps_is_not():
    before, begin = system.seconds_ready(), time.thread_time()
    while time.thread_time() - begin < 0.05:
        pass
    worked, now = system.seconds_ready(), time.perf_counter()
    assert worked - before >= 0.05
    time.sleep(0.2)
    assert time.perf_counter() - now - (system.seconds_ready() - worked) >= 0.15


def test_listing_and_kinds_of_paths(tmp_path, file):
    (tmp_path / "a").mkdir()
    assert system.list_names(str(tmp_path)) == ["a", "data"]
    assert system.is_file(file)
    assert not system.is_file(str(tmp_path))
    assert system.is_directory(str(tmp_path))
    assert not system.is_directory(file)
    assert system.exists(file)
    assert not system.exists(file + "x")


@pytest.fixture
def target(tmp_path):
    descriptor = system.create(str(tmp_path / "new"))
    yield descriptor
    system.close(descriptor)


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
def test_a_write_that_ends_names_file_and_offset(target, monkeypatch, count):
    def full(fd, views, offset):
        if isinstance(count, OSError):
            raise count
        return count

    monkeypatch.setattr(system, "pwritev", full)
    with pytest.raises(WriteError, match=r"(?s)new, byte 7.*expected: 4 bytes from byte 7.*found:    0 bytes"):
        write_exactly(target, [memoryview(b"abcd")], 7, "new")


def test_a_file_of_a_journal_grows_at_its_end_alone(tmp_path):
    path = str(tmp_path / "journal")
    for text in (b"one", b"two"):
        fd = system.open_append(path)
        system.write_end(fd, text)
        system.close(fd)
    fd = system.open_append(path)
    system.truncate(fd, 4)
    system.write_end(fd, b"x" * 100_000)
    system.close(fd)
    assert (tmp_path / "journal").read_bytes() == b"onet" + b"x" * 100_000


@pytest.mark.parametrize("missing", [False, True])
def test_reserved_room_is_the_length_of_the_file(target, monkeypatch, missing):
    if missing:
        monkeypatch.delattr(os, "posix_fallocate", raising=False)
    system.reserve(target, 12_345)
    assert system.size(target) == 12_345


def test_room_that_is_not_there_is_told_but_a_file_system_that_cannot_promise_is_not(target, monkeypatch):
    def refuse(code):
        def call(*arguments):
            raise OSError(code, os.strerror(code))

        return call

    monkeypatch.setattr(os, "posix_fallocate", refuse(errno.EOPNOTSUPP), raising=False)
    system.reserve(target, 10)
    assert system.size(target) == 10
    monkeypatch.setattr(os, "posix_fallocate", refuse(errno.ENOSPC))
    with pytest.raises(OSError, match="No space left"):
        system.reserve(target, 20)


def test_bytes_copied_within_the_kernel_are_counted_and_none_where_it_cannot(fd, target, tmp_path, monkeypatch):
    count = system.copy_range(fd, 5, target, 3, 100)
    if count:  # which some file systems do not
        assert (tmp_path / "new").read_bytes() == b"\0\0\0" + CONTENT[5 : 5 + count]
    assert system.copy_range(fd, len(CONTENT), target, 0, 10) == 0

    def refuse(*arguments):
        raise OSError(errno.EXDEV, "other file system")

    monkeypatch.setattr(os, "copy_file_range", refuse, raising=False)
    assert system.copy_range(fd, 0, target, 0, 10) == 0
    monkeypatch.delattr(os, "copy_file_range")
    assert system.copy_range(fd, 0, target, 0, 10) == 0


def test_what_closing_tells_is_not_an_error_but_closing_twice_is(target, monkeypatch):
    def fails(fd):
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "close", fails)
        system.close(target)
    other = os.dup(target)
    system.close(other)
    with pytest.raises(OSError, match="Bad file descriptor"):
        system.close(other)


@pytest.mark.skipif(sys.platform != "linux", reason="locks as Linux has them")
def test_a_locked_file_is_refused_until_it_is_closed_and_a_removed_one_is_told(tmp_path):
    path = str(tmp_path / "lock")
    first, second = system.open_append(path), system.open_append(path)
    assert system.lock(first)
    assert not system.lock(second)
    system.close(first)
    assert system.lock(second)
    assert system.is_at(second, path)
    system.remove(path)
    assert not system.is_at(second, path)
    third = system.open_append(path)
    assert not system.is_at(second, path)
    assert system.is_at(third, path)
    system.close(second)
    system.close(third)


def test_names_and_directories(tmp_path):
    inner = str(tmp_path / "a" / "b")
    system.make_directory(inner)
    system.make_directory(inner)
    system.close(system.create(os.path.join(inner, "x")))
    (tmp_path / "a" / "y").write_bytes(b"old")
    system.rename(os.path.join(inner, "x"), str(tmp_path / "a" / "y"))
    assert system.identity(str(tmp_path / "a" / "y"))[0] == 0
    system.copy_file(str(tmp_path / "a" / "y"), str(tmp_path / "z"))
    system.sync_directory(inner)
    system.remove_directory(inner)
    assert system.list_names(str(tmp_path)) == ["a", "z"]
    assert system.free_bytes(str(tmp_path)) > 0
