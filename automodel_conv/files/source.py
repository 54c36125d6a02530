"""``ByteSource``, the bytes of one file of a checkpoint wherever they lie; ``LocalFile``, a file on this machine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple, Protocol

from automodel_conv.errors import ReadError, message
from automodel_conv.files import system
from automodel_conv.files.full_io import read_exactly

Identity = tuple[int, int] | str


class OpenSource(Protocol):
    """A source that is open; threads share it."""

    def size(self) -> int:
        """Length in bytes."""
        ...

    def read_into(self, views: list[memoryview], offset: int) -> None:
        """Fill all views, one after the other, with the bytes that follow ``offset``.

        Raises:
            ReadError: there are fewer bytes, or they cannot be read.
        """
        ...

    def descriptor(self) -> int | None:
        """The descriptor of a local file, which can be mapped, or copied by the kernel; None for other sources."""
        ...

    def close(self) -> None:
        """Close it; nobody reads after that."""
        ...


class ByteSource(Protocol):
    """The bytes of one file of a checkpoint, wherever they lie."""

    def describe(self) -> str:
        """A path or a URL, for errors."""
        ...

    def identity(self) -> Identity:
        """A JSON value that differs once the bytes were changed: size and time of the last change, or a version.

        Raises:
            OSError: it is not there any more.
        """
        ...

    def open(self) -> OpenSource:
        """Make it ready to be read.

        Raises:
            OSError: it cannot be.
        """
        ...


class LocalFile(NamedTuple):
    """A file on this machine."""

    path: str

    def describe(self) -> str:
        return self.path

    def identity(self) -> Identity:
        return system.identity(self.path)

    def open(self) -> OpenSource:
        return _OpenFile(system.open_readonly(self.path), self.path)


class _OpenFile(NamedTuple):
    fd: int
    path: str

    def size(self) -> int:
        return system.size(self.fd)

    def read_into(self, views: list[memoryview], offset: int) -> None:
        read_exactly(self.fd, views, offset, self.path)

    def descriptor(self) -> int | None:
        return self.fd

    def close(self) -> None:
        system.close(self.fd)


@contextmanager
def opened(source: ByteSource) -> Iterator[OpenSource]:
    """A source that is open for the length of a block.

    Raises:
        ReadError: it cannot be opened.
    """
    try:
        file = source.open()
    except OSError as error:
        raise ReadError(message("cannot open a file", where=source.describe(), found=error)) from error
    try:
        yield file
    finally:
        file.close()
