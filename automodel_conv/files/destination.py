"""A directory that becomes a checkpoint: nothing in it is one until everything is.

    DIRECTORY/incomplete.automodel_conv/   the shards while they are written, a lock, and a journal of what is finished
    DIRECTORY/                             all of it, at the end, by renaming; the index last

A loader finds either all files or no index (or no ``model.safetensors``). After a crash the journal says which shards
are finished, and of what: the same work goes on, other work is refused.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from automodel_conv.errors import DestinationError, WriteError, listing, message
from automodel_conv.files import system
from automodel_conv.files.shards import INDEX_NAME, Shard

STAGING_NAME = "incomplete.automodel_conv"
_LOCK = "lock"
_JOURNAL = "journal.jsonl"
WEIGHT_SUFFIXES = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".gguf", ".pt", ".pth")


class Destination:
    """A directory that is being written to; made by ``open_destination``."""

    def __init__(self, directory: str, journal: int, shards: Sequence[Shard], finished: set[str]):
        self.directory = directory
        self.staging = os.path.join(directory, STAGING_NAME)
        self._journal = journal
        self._shards = shards
        self._finished = finished

    @property
    def unfinished(self) -> frozenset[str]:
        """Names of the shards that are still to be written."""
        return frozenset(shard.name for shard in self._shards) - self._finished

    def path(self, name: str) -> str:
        """Where a file lies until all are there."""
        return os.path.join(self.staging, name)

    def found(self, name: str) -> str:
        """Where a finished file lies: put in its place already, if ``commit`` was cut short, or not yet."""
        staged = self.path(name)
        return staged if system.exists(staged) else os.path.join(self.directory, name)

    def write(self, name: str, text: bytes) -> None:
        """Write a small file that goes with the shards."""
        fd = system.create(self.path(name))
        try:
            system.write_exactly(fd, [memoryview(text)], 0, self.path(name))
            system.sync(fd)
        finally:
            system.close(fd)

    def finish(self, shard: Shard) -> None:
        """Note that a shard is on the disk, whole."""
        with _telling(self.directory):
            system.write_end(self._journal, _line({"finished": shard.name}))
        self._finished.add(shard.name)

    def commit(self, index: bytes | None) -> None:
        """Make the directory a checkpoint, once all shards are finished.

        What else lies in ``staging`` goes with them, in place of files of the same names.

        Args:
            index: the text of the index, if there is to be one.
        """
        own = {_LOCK, _JOURNAL, INDEX_NAME, *(shard.name for shard in self._shards)}
        with _telling(self.directory):
            others = [name for name in system.list_names(self.staging) if name not in own]
            for name in others:
                _sync(self.path(name))
            names = [*others, *(shard.name for shard in self._shards)]
            if index is not None:
                self.write(INDEX_NAME, index)
                names.append(INDEX_NAME)
            system.sync_directory(self.staging)
            for name in names:
                if name == names[-1]:  # what makes it a checkpoint comes after all else is on the disk
                    system.sync_directory(self.directory)
                if system.exists(self.path(name)):  # or it was put in its place before a crash
                    system.rename(self.path(name), os.path.join(self.directory, name))
            system.sync_directory(self.directory)


def _sync(path: str) -> None:
    fd = system.open_append(path)
    try:
        system.sync(fd)
    finally:
        system.close(fd)


@contextmanager
def open_destination(
    directory: str, shards: Sequence[Shard], work: Mapping[str, Any] | None, *, resume: bool = False
) -> Iterator[Destination]:
    """Take a directory, made if need be, for the length of a block that ends with ``commit``.

    Args:
        work: what is written, as JSON, so that a later call can go on with it; the error names the keys in which an
            earlier work in this directory differs. None: work that cannot go on; if it fails nothing of it stays.
        resume: go on where an earlier work of the same kind ended; otherwise that is thrown away.

    Raises:
        DestinationError: the directory is a checkpoint already, another process writes to it, or it holds an earlier
            work of another kind.
        WriteError: the system does not let us write there.
    """
    staging = os.path.join(directory, STAGING_NAME)
    with _telling(directory):
        lock = _locked(staging, directory)
    try:
        with _telling(directory):
            journal = system.open_append(os.path.join(staging, _JOURNAL))
        try:
            keeps = system.size(journal) > 0  # an earlier work, which may go on
            with _telling(directory):
                finished = _taken_over(journal, directory, shards, work, resume)
            keeps = work is not None
            yield Destination(directory, journal, shards, finished)
            keeps = False
        finally:
            system.close(journal)
            if not keeps:
                _remove(staging)
    finally:
        system.close(lock)


def _locked(staging: str, directory: str) -> int:
    """The lock file, open and locked."""
    path = os.path.join(staging, _LOCK)
    while True:
        system.make_directory(staging)
        try:
            fd = system.open_append(path)
        except FileNotFoundError:
            continue  # who had it has just finished and removed the directory
        try:
            if not system.lock(fd):
                raise DestinationError(
                    message(
                        "another process writes to this directory",
                        where=directory,
                        do="wait until it has finished, or choose another directory",
                    )
                )
            if system.is_at(fd, path):
                return fd
        except BaseException:
            system.close(fd)
            raise
        system.close(fd)  # likewise


def _taken_over(
    journal: int, directory: str, shards: Sequence[Shard], work: Mapping[str, Any] | None, resume: bool
) -> set[str]:
    """Names of the shards that an earlier work has finished; what cannot be used of it is thrown away.

    Raises:
        DestinationError: see ``open_destination``.
    """
    staging = os.path.join(directory, STAGING_NAME)
    work = None if work is None else json.loads(json.dumps(work))
    first, *lines = _journal_lines(journal) or [{}]
    begun = first.get("work")
    finished: set[str] = set()
    if begun is not None and (resume or work is None):
        if begun != work:
            _refuse_other_work(directory, begun, work or {})
        noted = {line.get("finished") for line in lines}
        finished = {shard.name for shard in shards if shard.name in noted and _is_whole(shard, directory)}
    complete = len(finished) == len(shards)
    allowed = finished | ({INDEX_NAME} if complete else set())
    present = [name for name in system.list_names(directory) if name.endswith(WEIGHT_SUFFIXES) and name not in allowed]
    if present:
        raise DestinationError(
            message(
                "the directory holds a checkpoint already",
                where=directory,
                found="\n" + listing(present),
                do="choose another directory, or remove these files first",
            )
        )
    if not finished:
        for name in system.list_names(staging):
            if name not in (_LOCK, _JOURNAL):
                system.remove(os.path.join(staging, name))
        system.truncate(journal, 0)
        system.write_end(journal, _line({"work": work}))
    return finished


def _refuse_other_work(directory: str, begun: Mapping[str, Any], work: Mapping[str, Any]) -> None:
    differ = sorted(key for key in {*begun, *work} if begun.get(key) != work.get(key))
    raise DestinationError(
        message(
            "the directory holds an unfinished work that is not this one",
            where=os.path.join(directory, STAGING_NAME),
            expected="\n" + listing(f"{key}: {_short(begun.get(key))}" for key in differ),
            found="\n" + listing(f"{key}: {_short(work.get(key))}" for key in differ),
            do="finish it as it was begun, or start again with resume=False (--no-resume)",
        )
    )


def _short(value: object, limit: int = 200) -> str:
    text = str(value)
    return text if len(text) <= limit else text[:limit] + "..."


def _journal_lines(journal: int) -> list[dict[str, Any]]:
    """The whole lines; what a crash left of another one is cut off."""
    data = bytearray(system.size(journal))
    system.read_exactly(journal, [memoryview(data)], 0, _JOURNAL)
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        system.truncate(journal, whole)
    try:
        lines = [json.loads(line) for line in data[:whole].splitlines()]
    except ValueError:
        return []
    return lines if all(isinstance(line, dict) for line in lines) else []


def _is_whole(shard: Shard, directory: str) -> bool:
    places = (os.path.join(directory, STAGING_NAME, shard.name), os.path.join(directory, shard.name))
    return any(system.is_file(path) and system.identity(path)[0] == shard.nbytes for path in places)


def _remove(staging: str) -> None:
    """Remove what is no longer needed; the next work removes what cannot be removed now."""
    with suppress(OSError):
        for name in system.list_names(staging):
            system.remove(os.path.join(staging, name))
        system.remove_directory(staging)


def _line(record: Mapping[str, Any]) -> bytes:
    return json.dumps(record).encode() + b"\n"


@contextmanager
def _telling(directory: str) -> Iterator[None]:
    """What the system refuses is told as a WriteError."""
    try:
        yield
    except OSError as error:
        raise WriteError(
            message(
                "cannot write to a directory",
                where=error.filename or directory,
                found=error,
                do="look at the disk, its quota and the permissions",
            )
        ) from error
