"""A file that fsspec reads by range, for protocols that are not read over HTTP."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import cached_property
from typing import Any, NamedTuple

from automodel_conv.errors import ReadError, message
from automodel_conv.files.remote.urls import text_of
from automodel_conv.files.source import Identity


class FsspecFile:
    """A file of one of fsspec's file systems.

    Args:
        system: fsspec's file system.
        path: path of the file as the file system has it.
        url: URL for error texts, without credentials.
        keeps: an object that exists as long as the file does.
        secrets: credentials that must not be in error texts.
    """

    is_remote = True

    def __init__(self, system: Any, path: str, url: str, keeps: object = None, secrets: Collection[str] = ()):
        self._system = system
        self._path = path
        self._url = url
        self._keeps = keeps
        self._secrets = secrets

    def __repr__(self) -> str:
        return f"FsspecFile({self._url!r})"

    def describe(self) -> str:
        return self._url

    def identity(self) -> Identity:
        return repr(self._info())  # the size, and an ETag or a time, under names that depend on the library

    def pinned(self) -> str | None:
        """Return all that fsspec stated of the file when it was opened first."""
        return repr(self._first_info)

    def open(self) -> _OpenFsspecFile:
        """Request the size of the file, the first time.

        Raises:
            OSError: the file does not exist or cannot be read.
        """
        return _OpenFsspecFile(self, self._nbytes)

    def read(self, start: int, stop: int) -> bytes:
        """Return the bytes of a range.

        Raises:
            ReadError: fsspec cannot read them.
        """
        try:
            return self._system.cat_file(self._path, start=start, end=stop)
        except Exception as error:  # each library has errors of its own
            raise ReadError(message("bytes of a URL cannot be read", found=text_of(error, self._secrets))) from None

    @cached_property
    def _nbytes(self) -> int:
        size = self._first_info.get("size")
        if size is None:
            raise OSError("the server does not state the size of the file; download the files first")
        return size

    @cached_property
    def _first_info(self) -> dict[str, Any]:
        return self._info()

    def _info(self) -> dict[str, Any]:
        try:
            return self._system.info(self._path)
        except Exception as error:  # each library has errors of its own
            raise OSError(text_of(error, self._secrets)) from None


class _OpenFsspecFile(NamedTuple):
    file: FsspecFile
    nbytes: int
    """Size of the file."""

    def size(self) -> int:
        return self.nbytes

    def expect(self, ranges: Sequence[tuple[int, int]]) -> None:
        pass

    def read_into(self, views: list[memoryview], offset: int) -> None:
        total = sum(map(len, views))
        if not total:
            return
        data = memoryview(self.file.read(offset, offset + total))
        if len(data) != total:
            found = f"{len(data)} bytes from byte {offset}"
            raise ReadError(message("the file has changed", expected=f"{total} bytes", found=found))
        for view in views:
            view[:], data = data[: len(view)], data[len(view) :]

    def descriptor(self) -> int | None:
        return None

    def abort(self) -> None:
        pass

    def close(self) -> None:
        pass
