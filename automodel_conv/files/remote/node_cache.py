"""``CachedFile``, a remote file whose bytes the processes of this machine fetch once and keep in a directory.

A thread fetches what it expects to read with a request for each run of adjacent blocks, except blocks that others are
fetching. It waits for those afterwards.
"""

from __future__ import annotations

import hashlib
import os
import re
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from automodel_conv.errors import ReadError, UnsupportedError, WriteError, message
from automodel_conv.files.remote.cache_blocks import BLOCK_BYTES, CacheBlocks, Claims
from automodel_conv.files.remote.urls import refuse_url
from automodel_conv.files.source import ByteSource, Identity, OpenSource
from automodel_conv.files.waits import waiting

PATIENCE_SECONDS = 60.0
"""How long a thread waits for a block that somebody else fetches, before it fetches the block too.

The other process may have been stopped, or a fork of a killed process may still hold its lock. The bytes are equal.
"""
_FIRST_WAIT_SECONDS = 0.002
_MOST_WAIT_SECONDS = 0.05
_UNUSUAL = re.compile(r"[^\w.-]", re.ASCII)


class PinnedSource(ByteSource, Protocol):
    """A source that reads the same version of a file from its first open on."""

    def pinned(self) -> str | None:
        """Return a text that is different for each version of the file, which has been opened.

        None if nothing tells one version from another.
        """
        ...


def cache_directory(path: str | os.PathLike[str]) -> str:
    """Return the absolute path of a directory for ``node_cache``.

    Raises:
        UnsupportedError: it is a URL.
    """
    refuse_url(path, ["pass a directory on this machine as {node_cache=}"])
    return os.path.abspath(os.path.expanduser(os.fsdecode(path)))


class CachedFile:
    """A remote file, read through a directory that all processes of this machine share.

    The first open, which reads the header, reads the file itself: a plan would else fetch whole blocks for headers that
    are small. All later opens read through the directory.

    Args:
        source: the remote file.
        directory: absolute path of the directory.
    """

    is_remote = True

    def __init__(self, source: PinnedSource, directory: str):
        self._source = source
        self._directory = directory
        self._path: str | None = None
        self._complete: set[int] = set()
        """Blocks that this process has fetched or verified."""

    def __repr__(self) -> str:
        return f"CachedFile({self._source!r}, {self._directory!r})"

    def describe(self) -> str:
        return self._source.describe()

    def identity(self) -> Identity:
        return self._source.identity()

    def open(self) -> OpenSource:
        """Open the remote file, the first time; later, open the file that keeps its bytes too.

        Raises:
            OSError: the remote file cannot be opened.
            UnsupportedError: nothing tells versions of the remote file apart.
            ReadError: the directory cannot be used.
        """
        file = self._source.open()
        try:
            if self._path is None:
                self._path = self._path_of(self._source.pinned())
                return file
            with _cache_errors(self._path):
                return _OpenCachedFile(file, CacheBlocks(self._path, file.size()), self._complete)
        except BaseException:
            file.close()
            raise

    def _path_of(self, version: str | None) -> str:
        """Return the path of the file that keeps the bytes; another version of the remote file has another path."""
        if version is None:
            raise UnsupportedError(
                message(
                    "this server states no version of a file, so kept bytes could be old ones",
                    where=self.describe(),
                    expected="an ETag or Last-Modified header",
                    do="load without {node_cache=}",
                )
            )
        digest = hashlib.blake2b(f"{self.describe()}\n{version}".encode(), digest_size=16).hexdigest()
        name = _UNUSUAL.sub("_", self.describe().rpartition("/")[2])[-100:]
        return os.path.join(self._directory, f"{digest}-{name}")


class _Ahead(threading.local):
    """The ranges that one thread has stated and not begun to read."""

    def __init__(self):
        self.ranges: Sequence[tuple[int, int]] = ()


class _OpenCachedFile:
    """An open remote file, and the file that keeps its bytes."""

    def __init__(self, source: OpenSource, blocks: CacheBlocks, complete: set[int]):
        self._source = source
        self._blocks = blocks
        self._complete = complete
        self._ahead = _Ahead()
        self._stopped = threading.Event()

    def size(self) -> int:
        return self._blocks.nbytes

    def expect(self, ranges: Sequence[tuple[int, int]]) -> None:
        self._ahead.ranges = tuple(ranges)

    def read_into(self, views: list[memoryview], offset: int) -> None:
        total = sum(map(len, views))
        if not total:
            return
        if offset + total > self.size():
            self._source.read_into(views, offset)  # raises the error of a file that ends too early
        with _cache_errors(self._blocks.path):
            self._complete_blocks(self._blocks.blocks_of(offset, offset + total))
        self._blocks.read(views, offset)

    def descriptor(self) -> int | None:
        return None

    def abort(self) -> None:
        self._stopped.set()
        self._source.abort()

    def close(self) -> None:
        self._source.close()
        self._blocks.close()

    def _complete_blocks(self, wanted: Sequence[int]) -> None:
        """Fetch all of these blocks that are not here, and what else this thread expects, or wait for others."""
        missing = self._missing(wanted)
        if not missing:
            return
        ahead, self._ahead.ranges = self._ahead.ranges, ()
        todo = self._missing(sorted({*missing, *(block for each in ahead for block in self._blocks.blocks_of(*each))}))
        wait, until = _FIRST_WAIT_SECONDS, time.monotonic() + PATIENCE_SECONDS
        while True:
            with self._blocks.claimed(todo) as claims:
                self._fetch(claims)
            todo = self._missing(missing)
            if not todo:
                return
            self._go_on()
            if time.monotonic() > until:
                return self._fetch(Claims(self._blocks, None, todo))
            with waiting():
                self._stopped.wait(wait)
            wait = min(2 * wait, _MOST_WAIT_SECONDS)

    def _missing(self, blocks: Iterable[int]) -> list[int]:
        """Return the blocks that are not here, or damaged."""
        missing = []
        for block in blocks:
            if block not in self._complete:
                if self._blocks.is_complete(block):
                    self._complete.add(block)
                else:
                    missing.append(block)
        return missing

    def _fetch(self, claims: Claims) -> None:
        """Fetch blocks, with one request for each run of them, and end the claim to each as soon as it is here."""
        blocks = self._missing(claims.blocks)  # another process may have fetched one before it was claimed
        if not blocks:
            return
        self._source.expect([self._range_of_run(run) for run in _runs(blocks)])
        window = memoryview(bytearray(BLOCK_BYTES))
        for block in blocks:
            self._go_on()
            start, stop = self._blocks.range_of(block)
            data = window[: stop - start]
            self._source.read_into([data], start)
            self._blocks.write(block, data)
            self._complete.add(block)
            claims.end(block)

    def _go_on(self) -> None:
        """Raise ReadError if another thread has ended all reads."""
        if self._stopped.is_set():
            raise ReadError(message("reading has been stopped", where=self._blocks.path))

    def _range_of_run(self, run: Sequence[int]) -> tuple[int, int]:
        return self._blocks.range_of(run[0])[0], self._blocks.range_of(run[-1])[1]


def _runs(blocks: Sequence[int]) -> list[list[int]]:
    """Return ascending numbers as lists of numbers that follow each other."""
    runs: list[list[int]] = []
    for block in blocks:
        if runs and runs[-1][-1] == block - 1:
            runs[-1].append(block)
        else:
            runs.append([block])
    return runs


@contextmanager
def _cache_errors(path: str) -> Iterator[None]:
    """Raise errors of the kept file as a ReadError that names ``node_cache``."""
    try:
        yield
    except (OSError, WriteError) as error:
        found = error.reason() if isinstance(error, WriteError) else str(error)
        raise ReadError(
            message(
                "the directory that node_cache names cannot be used",
                where=path,
                found=found,
                do="check its permissions and free space, or pass another one as {node_cache=}",
            )
        ) from error
