"""A directory that becomes a checkpoint: nothing in it is one until everything is.

    DIRECTORY/incomplete.automodel_conv/   the shards while they are written, a lock, and a journal of what is finished
    DIRECTORY/incomplete.automodel_conv/beside/   the files that go with the shards, in their folders
    DIRECTORY/                             all of it, at the end, by renaming; the index last

A loader finds either all files or no index (or no ``model.safetensors``). After a crash the journal says which shards
are finished, and of what: the same work goes on, other work is refused.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from automodel_conv.files import system
from automodel_conv.files.earlier import taken_over
from automodel_conv.files.full_io import write_exactly
from automodel_conv.files.journal import note, read_journal
from automodel_conv.files.placed import folders_of, inside, take_back
from automodel_conv.files.shards import CHECKSUMS_NAME, FORM, Shard
from automodel_conv.files.staging import (
    BESIDE_NAME,
    JOURNAL_NAME,
    LOCK_NAME,
    STAGING_NAME,
    locked,
    remove_staging,
)
from automodel_conv.files.write_errors import write_errors


class Destination:
    """A directory that is being written to; made by ``open_destination``."""

    def __init__(
        self,
        directory: str,
        journal: int,
        shards: Sequence[Shard],
        finished: set[str],
        verified: set[str],
        index_name: str,
    ):
        self.directory = directory
        self.staging = os.path.join(directory, STAGING_NAME)
        self.placed: dict[str, list[int]] = {}
        """Size and time of change of what ``commit`` puts in its place, once it does."""
        self._journal = journal
        self._shards = shards
        self._finished = finished
        self._index_name = index_name
        self.verified = finished & verified
        """Names of the shards that have been compared with what they were made of."""

    @property
    def unfinished(self) -> frozenset[str]:
        """Names of the shards that are still to be written."""
        return frozenset(shard.name for shard in self._shards) - self._finished

    def path(self, name: str) -> str:
        """Where a file lies until all are there."""
        return os.path.join(self.staging, name)

    def beside(self, name: str) -> str:
        """Where a file that goes with the shards lies until all are there, in a folder made if need be."""
        path = inside(self.path(BESIDE_NAME), name)
        system.make_directory(os.path.dirname(path))
        return path

    def found(self, name: str) -> str:
        """Where a finished file lies: put in its place already, if ``commit`` was cut short, or not yet."""
        staged = self.path(name)
        return staged if system.exists(staged) else os.path.join(self.directory, name)

    def write(self, name: str, text: bytes) -> None:
        """Write a small file that goes with the shards."""
        with write_errors(self.directory):
            fd = system.create(self.path(name))
            try:
                write_exactly(fd, [memoryview(text)], 0, self.path(name))
                system.sync(fd)
            finally:
                system.close(fd)

    def finish(self, shard: Shard, *, verified: bool = False) -> None:
        """Note that a shard is on the disk, whole, and whether it was compared with what it was made of."""
        with write_errors(self.directory):
            note(self._journal, {"finished": shard.name, "verified": verified})
        self._finished.add(shard.name)

    def commit(self, index: bytes | None) -> None:
        """Make the directory a checkpoint, once all shards are finished.

        What else lies in ``staging`` goes with them, in place of files of the same names.

        Args:
            index: the text of the index, if there is to be one.
        """
        shards = [shard.name for shard in self._shards]
        with write_errors(self.directory):
            known = {LOCK_NAME, JOURNAL_NAME, BESIDE_NAME, self._index_name, *shards}
            written = set(system.list_names(self.staging)) - known
            others = {name: self.path(name) for name in written} | _files_below(self.path(BESIDE_NAME))
            for path in others.values():
                _sync(path)
            if index is not None:
                self.write(self._index_name, index)
            names = [*sorted(others), *_in_order(shards, None if index is None else self._index_name)]
            paths = {name: others.get(name) or self.found(name) for name in names}
            placed = {name: [*system.identity(paths[name])] for name in names}  # fails if one is in neither place
            system.sync_directory(self.staging)
            self.placed = placed
            note(self._journal, {"placing": placed})
            if CHECKSUMS_NAME not in others and system.exists(os.path.join(self.directory, CHECKSUMS_NAME)):
                system.remove(os.path.join(self.directory, CHECKSUMS_NAME))  # of what was there before
            folders = folders_of(names, self.directory)
            for folder in reversed(folders):
                system.make_directory(folder)
            for name in names:
                if name == names[-1]:  # what makes it a checkpoint comes after all else is on the disk
                    for folder in (*folders, self.directory):
                        system.sync_directory(folder)
                place = inside(self.directory, name)
                if paths[name] != place:  # where it was put before a crash
                    system.rename(paths[name], place)
            system.sync_directory(self.directory)


def _in_order(shards: Sequence[str], index_name: str | None) -> list[str]:
    """The weights and their index, if they have one, in the order in which no loader takes a part of them for all.

    One file that is not numbered may be taken for a checkpoint without an index, but not if an index names others. That
    of the usual name is even preferred to an index.
    """
    if index_name is None:
        return list(shards)
    numbered = all("-of-" in name for name in shards)
    if numbered:
        return [*shards, index_name]
    return [index_name, *sorted(shards, key=lambda name: name == "model.safetensors")]


def _files_below(directory: str) -> dict[str, str]:
    """Paths of the files that a directory and its folders hold, by their names from there on; none without it."""
    found: dict[str, str] = {}
    for name in system.list_names(directory) if system.is_directory(directory) else ():
        path = os.path.join(directory, name)
        if system.is_directory(path):
            found |= {f"{name}/{below}": file for below, file in _files_below(path).items()}
        else:
            found[name] = path
    return found


def _sync(path: str) -> None:
    fd = system.open_readonly(path)  # which may be all that its permissions allow
    try:
        system.sync(fd)
    finally:
        system.close(fd)


@contextmanager
def open_destination(
    directory: str,
    shards: Sequence[Shard],
    work: Mapping[str, Any] | None,
    *,
    resume: bool = False,
    index_name: str = FORM.index_name,
) -> Iterator[Destination]:
    """Take a directory, made if need be, for the length of a block that ends with ``commit``.

    Args:
        work: what is written, as JSON, so that a later call can go on with it; the error names the keys in which an
            earlier work in this directory differs. None: work that cannot go on; if it fails nothing of it stays.
        resume: go on where an earlier work of the same kind ended; otherwise that is thrown away.
        index_name: what the index is called, if there is to be one.

    Raises:
        DestinationError: the directory is a checkpoint already, another process writes to it, or it holds an earlier
            work of another kind.
        WriteError: the system does not let us write there.
    """
    staging = os.path.join(directory, STAGING_NAME)
    with write_errors(directory):
        lock = locked(staging, directory)
    try:
        with write_errors(directory):
            journal = system.open_append(os.path.join(staging, JOURNAL_NAME))
        keeps = True
        try:
            with write_errors(directory):
                earlier = read_journal(journal)
                keeps = earlier.work is not None  # and so may go on
                finished = taken_over(earlier, journal, directory, shards, work, resume, index_name)
            keeps = work is not None
            destination = Destination(directory, journal, shards, finished, earlier.verified, index_name)
            try:
                yield destination
            except BaseException:
                if not keeps:
                    take_back(directory, destination.placed)
                raise
            keeps = False
        finally:
            system.close(journal)
            if not keeps:
                remove_staging(staging)
    finally:
        system.close(lock)
