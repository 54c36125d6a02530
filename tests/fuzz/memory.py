"""Files in memory that replace ``automodel_conv.files.system``: fast, and every access is recorded."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any

from automodel_conv.files import system

# No descriptor of the system is as large: one that reached the system's functions would be an error.
_FIRST_DESCRIPTOR = 1 << 24


class _Opened(AbstractContextManager[Any]):
    """An open file, in as far as the package uses it."""

    def __init__(self, descriptor: int):
        self._descriptor = descriptor
        self.closed = False

    def fileno(self) -> int:
        assert not self.closed
        return self._descriptor

    def close(self) -> None:
        self.closed = True

    def __exit__(self, *_: object) -> None:
        self.close()


class Memory:
    """Holds files in memory: ``with Memory({path: bytes}) as memory: ...``; paths resolve as in a file system.

    ``opened`` has all paths that were opened, ``reads`` the requested reads as (path, start, stop), and ``removed`` the
    paths of removed files.
    """

    def __init__(self, files: Mapping[str, bytes]):
        self.files = {path: bytearray(data) for path, data in files.items()}
        self.opened: list[str] = []
        self.reads: list[tuple[str, int, int]] = []
        self.removed: list[str] = []
        self._paths: list[str] = []

    def __enter__(self) -> Memory:
        self._real = {name: getattr(system, name) for name in _REPLACED}
        for name in _REPLACED:
            setattr(system, name, getattr(self, name))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name, function in self._real.items():
            setattr(system, name, function)

    def exists(self, path: str) -> bool:
        return self.is_file(path) or self.is_directory(path)

    def is_file(self, path: str) -> bool:
        return os.path.normpath(path) in self.files

    def is_directory(self, path: str) -> bool:
        return any(name.startswith(os.path.normpath(path) + "/") for name in self.files)

    def is_link(self, path: str) -> bool:
        return False

    def list_names(self, directory: str) -> list[str]:
        start = os.path.normpath(directory) + "/"
        return sorted({path[len(start) :].partition("/")[0] for path in self.files if path.startswith(start)})

    def open_readonly(self, path: str) -> _Opened:
        path = os.path.normpath(path)
        if path not in self.files:
            raise FileNotFoundError(2, "No such file", path)
        self.opened.append(path)
        self._paths.append(path)
        return _Opened(_FIRST_DESCRIPTOR + len(self._paths) - 1)

    def size(self, fd: int) -> int:
        return len(self.files[self._path(fd)])

    def preadv(self, fd: int, views: list[memoryview], offset: int) -> int:
        path = self._path(fd)
        self.reads.append((path, offset, offset + sum(map(len, views))))
        data, done = self.files[path], 0
        for view in views:
            part = data[offset + done : offset + done + len(view)]
            view[: len(part)] = part
            done += len(part)
        return done

    def identity(self, path: str) -> tuple[int, int]:
        return (len(self.files[os.path.normpath(path)]) if self.is_file(path) else 0), 7

    def truncate(self, fd: int, nbytes: int) -> None:
        del self.files[self._path(fd)][nbytes:]

    def write_end(self, fd: int, data: bytes) -> None:
        self.files[self._path(fd)] += data

    def remove(self, path: str) -> None:
        path = os.path.normpath(path)
        if path not in self.files:
            raise IsADirectoryError(21, "Is a directory", path)
        del self.files[path]
        self.removed.append(path)

    def remove_directory(self, path: str) -> None:
        if self.is_directory(path):
            raise OSError(39, "Directory not empty", path)

    def _path(self, fd: int) -> str:
        return self._paths[fd - _FIRST_DESCRIPTOR]


_REPLACED = [name for name, value in vars(Memory).items() if callable(value) and not name.startswith("_")]


def memory_of(**files: Any) -> Memory:
    """Return files of the directory ``/c`` by their names."""
    return Memory({f"/c/{name}": data for name, data in files.items()})
