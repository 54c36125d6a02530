"""Tests of files that fsspec reads: sizes, ranges, errors of libraries, and files that change."""

from __future__ import annotations

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from automodel_conv.errors import ReadError
from automodel_conv.files.remote.fsspec_files import FsspecFile

CONTENT = bytes(range(256)) * 4


@pytest.fixture
def system():
    system = fsspec.filesystem("memory")
    system.pipe_file("/fsspec_files/a", CONTENT)
    yield system
    system.rm("/fsspec_files", recursive=True)


def file_in(system):
    return FsspecFile(system, "/fsspec_files/a", "memory://fsspec_files/a")


def get(opened, start, stop):
    data = bytearray(b"\xa5" * (stop - start))
    middle = (stop - start) // 3
    opened.read_into([memoryview(data)[:middle], memoryview(data)[middle:]], start)
    return bytes(data)


@pytest.mark.parametrize(("start", "stop"), [(0, 1024), (0, 1), (1023, 1024), (100, 103), (5, 5), (1024, 1024)])
def test_range_fills_all_views(system, start, stop):
    file = file_in(system)
    opened = file.open()
    assert opened.size() == 1024
    opened.expect([(start, stop)])
    assert get(opened, start, stop) == CONTENT[start:stop]
    opened.abort()
    opened.close()
    assert (file.is_remote, opened.descriptor(), file.describe()) == (True, None, "memory://fsspec_files/a")
    assert repr(file) == "FsspecFile('memory://fsspec_files/a')"


@pytest.mark.parametrize("content", [b"", b"1"])
def test_empty_file_and_one_byte_are_read(system, content):
    system.pipe_file("/fsspec_files/a", content)
    opened = file_in(system).open()
    assert get(opened, 0, opened.size()) == content


def test_file_that_became_shorter_is_an_error(system):
    opened = file_in(system).open()
    system.pipe_file("/fsspec_files/a", CONTENT[:100])
    with pytest.raises(ReadError, match=r"(?s)has changed.*1000 bytes.*found: +76 bytes from byte 24"):
        get(opened, 24, 1024)


def test_identity_changes_with_the_file(system):
    file = file_in(system)
    before = file.identity()
    assert file.identity() == before
    system.pipe_file("/fsspec_files/a", CONTENT[:100])
    assert file.identity() != before
    system.rm("/fsspec_files/a")
    with pytest.raises(OSError, match="FileNotFoundError"):
        file.identity()
    system.pipe_file("/fsspec_files/a", CONTENT)


def test_absent_file_is_an_os_error(system):
    with pytest.raises(OSError, match="FileNotFoundError"):
        FsspecFile(system, "/fsspec_files/absent", "memory://x").open()


class Odd(MemoryFileSystem):
    """A file system whose library fails in its own way."""

    cachable = False

    def info(self, path, **kwargs):
        return super().info(path) | {"size": None}

    def cat_file(self, path, start=None, end=None, **kwargs):
        raise RuntimeError("status 403 of https://user:hidden@h/a?signature=hidden")


def test_size_that_is_not_stated_is_an_os_error(system):
    with pytest.raises(OSError, match="does not state the size"):
        file_in(Odd()).open()


def test_errors_of_libraries_are_shown_without_credentials(system):
    with pytest.raises(ReadError, match=r"RuntimeError: status 403 of https://h/a") as error:
        file_in(Odd()).read(0, 1)
    assert "hidden" not in str(error.value)
    assert error.value.__suppress_context__
