"""Calls of the system: what they return, and how they do without what a system lacks."""

import errno
import io
import os
import sys
import time

import pytest

from automodel_conv.files import system
from tests.faults import descriptors
from tests.files.support import CONTENT


def test_size_is_the_length_of_the_file(fd):
    assert system.size(fd) == len(CONTENT)


def test_working_thread_is_ready_and_sleeping_one_is_not():
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


def test_journal_file_grows_only_at_its_end(tmp_path):
    path = str(tmp_path / "journal")
    for text in (b"one", b"two"):
        with system.open_append(path) as file:
            system.write_end(file.fileno(), text)
    with system.open_append(path) as file:
        system.truncate(file.fileno(), 4)
        system.write_end(file.fileno(), b"x" * 100_000)
    assert (tmp_path / "journal").read_bytes() == b"onet" + b"x" * 100_000


@pytest.mark.parametrize("missing", [False, True])
def test_reserved_space_is_the_length_of_the_file(target, monkeypatch, missing):
    if missing:
        monkeypatch.delattr(os, "posix_fallocate", raising=False)
    system.reserve(target, 12_345)
    assert system.size(target) == 12_345


def test_lack_of_space_is_an_error_but_unsupported_fallocate_is_not(target, monkeypatch):
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


def test_kernel_copy_returns_the_number_of_copied_bytes(fd, target, tmp_path, monkeypatch):
    count = system.copy_range(fd, 5, target, 3, 100)
    if count:  # some file systems cannot
        assert (tmp_path / "new").read_bytes() == b"\0\0\0" + CONTENT[5 : 5 + count]
    assert system.copy_range(fd, len(CONTENT), target, 0, 10) == 0

    def refuse(*arguments):
        raise OSError(errno.EXDEV, "other file system")

    monkeypatch.setattr(os, "copy_file_range", refuse, raising=False)
    assert system.copy_range(fd, 0, target, 0, 10) == 0
    monkeypatch.delattr(os, "copy_file_range")
    assert system.copy_range(fd, 0, target, 0, 10) == 0


def test_error_of_close_is_ignored_unless_other_code_has_closed_the_file(tmp_path):
    class Failing(io.FileIO):
        def close(self):
            super().close()
            raise OSError(errno.EIO, "Input/output error")

    class File(system.File, Failing):
        """A file that calls ``Failing.close``."""

    File(str(tmp_path / "a"), "w+").close()
    file = system.create(str(tmp_path / "a"))
    os.close(file.fileno())
    with pytest.raises(OSError, match="Bad file descriptor"):
        file.close()
    file.close()  # closing twice does nothing: the number may belong to another file by now


def test_file_without_a_reference_is_closed(tmp_path):
    before = descriptors()
    system.create(str(tmp_path / "a"))
    assert descriptors() == before


@pytest.mark.skipif(sys.platform != "linux", reason="Linux locks")
def test_locked_file_is_refused_until_closed_and_a_removed_one_is_detected(tmp_path):
    path = str(tmp_path / "lock")
    with system.open_append(path) as first, system.open_append(path) as second:
        assert system.lock(first.fileno())
        assert not system.lock(second.fileno())
        first.close()
        assert system.lock(second.fileno())
        assert system.is_at(second.fileno(), path)
        system.remove(path)
        assert not system.is_at(second.fileno(), path)
        with system.open_append(path) as third:
            assert not system.is_at(second.fileno(), path)
            assert system.is_at(third.fileno(), path)


@pytest.mark.skipif(sys.platform != "linux", reason="Linux locks")
def test_unlocked_file_is_free_even_if_a_forked_process_has_it_open(tmp_path):
    path = str(tmp_path / "lock")
    with system.open_append(path) as file, system.open_append(path) as other:
        copy = os.dup(file.fileno())  # as a forked process has
        assert system.lock(file.fileno())
        file.close()
        assert not system.lock(other.fileno())
        system.unlock(copy)
        assert system.lock(other.fileno())
        os.close(copy)


def test_names_and_directories(tmp_path):
    inner = str(tmp_path / "a" / "b")
    system.make_directory(inner)
    system.make_directory(inner)
    system.create(os.path.join(inner, "x")).close()
    (tmp_path / "a" / "y").write_bytes(b"old")
    system.rename(os.path.join(inner, "x"), str(tmp_path / "a" / "y"))
    assert system.identity(str(tmp_path / "a" / "y"))[0] == 0
    system.copy_file(str(tmp_path / "a" / "y"), str(tmp_path / "z"))
    system.sync_directory(inner)
    system.remove_directory(inner)
    assert system.list_names(str(tmp_path)) == ["a", "z"]
    assert system.free_bytes(str(tmp_path)) > 0
