"""A simulated disk that loses unsynced data when the power fails."""

from __future__ import annotations

import contextlib
import os
import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.faults import CHANGING, replace_calls


class PowerFailed(BaseException):
    """Raised by every file call after the power fails, so that no cleanup can run either."""


class Disk:
    """Records what a disk has stored for certain, and loses the rest when the power fails.

    These can be lost, each by chance: bytes of a file that were written since its last ``sync``, and renames since the
    last ``sync_directory`` of the target directory.
    """

    def __init__(self, fails: int):
        self._fails = fails
        self._failed = False
        self._lock = threading.Lock()
        self._synced: dict[tuple[int, int], int] = {}  # synced bytes of files that were changed
        self._renamed: list[tuple[str, str]] = []
        self.calls = 0

    def before(self, number: int, name: str, arguments: tuple[Any, ...]) -> None:
        with self._lock:
            self.calls = number
            self._failed |= number >= self._fails
            if self._failed:
                raise PowerFailed
            if name in ("pwritev", "reserve", "truncate", "write_end"):
                self._change(os.fstat(arguments[0]), appends=name == "write_end")
            elif name == "copy_range":
                self._change(os.fstat(arguments[2]))

    def after(self, number: int, name: str, arguments: tuple[Any, ...]) -> None:
        with self._lock:
            if name in ("sync", "write_end"):
                self._synced.pop(self._key(os.fstat(arguments[0])), None)
            elif name in ("create", "copy_file"):
                self._change(os.stat(arguments[-1]))
            elif name == "rename":
                self._renamed.append(arguments)
            elif name == "sync_directory":
                self._renamed = [pair for pair in self._renamed if os.path.dirname(pair[1]) != arguments[0]]

    @staticmethod
    def _key(status: os.stat_result) -> tuple[int, int]:
        return status.st_dev, status.st_ino

    def _change(self, status: os.stat_result, appends: bool = False) -> None:
        self._synced.setdefault(self._key(status), status.st_size if appends else 0)

    def lose(self, directory: Path, chosen: random.Random) -> None:
        for path in [path for path in directory.rglob("*") if path.is_file()]:
            status = path.stat()
            safe = self._synced.get(self._key(status))
            if safe is not None and chosen.random() < 0.7:
                data = path.read_bytes()[:safe]
                if chosen.random() < 0.7:  # the length may have reached the disk before the bytes
                    data = data.ljust(status.st_size, b"\0")
                path.write_bytes(data)
        for old, new in reversed(self._renamed):
            if os.path.isdir(os.path.dirname(old)) and os.path.exists(new) and chosen.random() < 0.5:
                os.rename(new, old)


def stop(call: Callable[[], Any], number: int) -> Disk:
    """Run ``call`` until the power fails before file call ``number``; return the disk."""
    disk = Disk(number)
    with pytest.MonkeyPatch.context() as patch:
        replace_calls(CHANGING, disk.before, disk.after, patch.setattr)
        with contextlib.suppress(PowerFailed):
            call()
    return disk
