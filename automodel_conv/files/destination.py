"""A directory that becomes a checkpoint in one step, once all of its files are written.

    DIRECTORY/incomplete.automodel_conv/   the shards while they are written, a lock, and a journal of finished shards
    DIRECTORY/incomplete.automodel_conv/beside/   the files that accompany the shards, in their folders
    DIRECTORY/                             all files, renamed into place at the end; the index last

A loader sees either all files or no index (or no ``model.safetensors``). After a crash, the journal records which work
was under way and which shards it finished. The same work resumes; other work is refused.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from automodel_conv.files import system
from automodel_conv.files.final_files import folders_of, path_below, remove_placed
from automodel_conv.files.full_io import write_exactly
from automodel_conv.files.journal import append_record, read_journal
from automodel_conv.files.resuming import resume_or_discard
from automodel_conv.files.shards import CHECKSUMS_NAME, DEFAULT_NAMING, Shard
from automodel_conv.files.staging import (
    COMPANIONS_NAME,
    JOURNAL_NAME,
    LOCK_NAME,
    STAGING_NAME,
    locked,
    remove_staging,
)
from automodel_conv.files.write_errors import write_errors
from automodel_conv.progress import ignore


class Destination:
    """A directory that is being written to, as opened by ``open_destination``."""

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
        """Size and modification time of each file that ``commit`` moves into place; empty before it does."""
        self._journal = journal
        self._shards = shards
        self._finished = finished
        self._index_name = index_name
        self.verified = finished & verified
        """Names of the shards that have been compared with their sources."""
        self.checksums: dict[str, dict[str, str]] = {}
        """Checksums of the tensors in each shard that were computed when it was finished, by its name."""
        self.on_upload: Callable[[int], None] = ignore
        """Function that is called with the bytes of each shard that was uploaded."""

    @property
    def unfinished(self) -> frozenset[str]:
        """Names of the shards that must still be written."""
        return frozenset(shard.name for shard in self._shards) - self._finished

    def path(self, name: str) -> str:
        """Return the path of a file before ``commit``."""
        return os.path.join(self.staging, name)

    def companion_path(self, name: str) -> str:
        """Return the path before ``commit`` of a file that accompanies the shards, after creating its folder."""
        path = path_below(self.path(COMPANIONS_NAME), name)
        system.make_directory(os.path.dirname(path))
        return path

    def finished_path(self, name: str) -> str:
        """Return the current path of a finished file, which an interrupted ``commit`` may have moved into place."""
        staged = self.path(name)
        return staged if system.exists(staged) else os.path.join(self.directory, name)

    def write(self, name: str, text: bytes) -> None:
        """Write a small file that accompanies the shards."""
        with write_errors(self.directory):
            with system.create(self.path(name)) as file:
                write_exactly(file.fileno(), [memoryview(text)], 0, self.path(name))
                system.sync(file.fileno())

    def finish(self, shard: Shard, *, verified: bool = False, checksums: dict[str, str] | None = None) -> None:
        """Record that a shard is complete on the disk.

        Args:
            shard: the shard.
            verified: whether it has been compared with its sources.
            checksums: checksums of its tensors; None if they have not been computed.
        """
        with write_errors(self.directory):
            append_record(self._journal, {"finished": shard.name, "verified": verified})
        self._finished.add(shard.name)
        if checksums is not None:
            self.checksums[shard.name] = checksums

    def commit(self, index: bytes | None) -> None:
        """Turn the directory into a checkpoint once all shards are finished.

        Other files in ``staging`` are moved into place too, and replace files of the same names.

        Args:
            index: text of the index; None for a checkpoint without one.
        """
        shards = [shard.name for shard in self._shards]
        with write_errors(self.directory):
            others = self._others()
            for path in others.values():
                _sync(path)
            if index is not None:
                self.write(self._index_name, index)
            names = [*sorted(others), *weights_in_order(shards, None if index is None else self._index_name)]
            paths = {name: others.get(name) or self.finished_path(name) for name in names}
            placed = {name: [*system.identity(paths[name])] for name in names}  # raises if a file is in neither place
            system.sync_directory(self.staging)
            self.placed = placed
            append_record(self._journal, {"placing": placed})
            if CHECKSUMS_NAME not in others and system.exists(os.path.join(self.directory, CHECKSUMS_NAME)):
                system.remove(os.path.join(self.directory, CHECKSUMS_NAME))  # checksums of an earlier checkpoint
            folders = folders_of(names, self.directory)
            for folder in reversed(folders):
                system.make_directory(folder)
            for name in names:
                if name == names[-1]:  # the file that makes it a checkpoint follows once all others are on the disk
                    for folder in (*folders, self.directory):
                        system.sync_directory(folder)
                final_path = path_below(self.directory, name)
                if paths[name] != final_path:  # equal if it was moved before a crash
                    system.rename(paths[name], final_path)
            system.sync_directory(self.directory)

    def _others(self) -> dict[str, str]:
        """Return the paths of all files before ``commit`` but shards and index, by their names."""
        known = {LOCK_NAME, JOURNAL_NAME, COMPANIONS_NAME, self._index_name, *(shard.name for shard in self._shards)}
        written = set(system.list_names(self.staging)) - known
        return {name: self.path(name) for name in written} | _files_below(self.path(COMPANIONS_NAME))


def weights_in_order(shards: Sequence[str], index_name: str | None) -> list[str]:
    """Return the names of weights and index in an order in which no loader mistakes a part of them for the whole.

    A loader may take a file without a number for a whole checkpoint, unless an index names others. It even prefers
    ``model.safetensors`` to an index.
    """
    if index_name is None:
        return list(shards)
    numbered = all("-of-" in name for name in shards)
    if numbered:
        return [*shards, index_name]
    return [index_name, *sorted(shards, key=lambda name: name == "model.safetensors")]


def _files_below(directory: str) -> dict[str, str]:
    """Return the paths of all files below a directory by their relative names; nothing if it does not exist."""
    paths: dict[str, str] = {}
    for name in system.list_names(directory) if system.is_directory(directory) else ():
        path = os.path.join(directory, name)
        if system.is_directory(path):
            paths |= {f"{name}/{below}": file for below, file in _files_below(path).items()}
        else:
            paths[name] = path
    return paths


def _sync(path: str) -> None:
    with system.open_readonly(path) as file:  # its permissions may not allow writing
        system.sync(file.fileno())


@contextmanager
def open_destination(
    directory: str,
    shards: Sequence[Shard],
    work: Mapping[str, Any] | None,
    *,
    resume: bool = False,
    index_name: str = DEFAULT_NAMING.index_name,
) -> Iterator[Destination]:
    """Lock a directory for the length of a block that ends with ``commit``, and create it if necessary.

    Args:
        directory: path of the directory.
        shards: files that the work will write.
        work: JSON description of the work, by which a later call can resume it. If the directory holds unfinished work
            of another description, the error names the options and keys that differ (see ``OPTIONS_KEY``). None: the
            work cannot be resumed, and if it fails, all of its files are removed.
        resume: whether to continue unfinished work of the same description. Otherwise it is discarded.
        index_name: name of the index, if one will be written.

    Raises:
        DestinationError: the directory is a checkpoint already, another process writes to it, or it holds unfinished
            work of another description.
        WriteError: the directory cannot be written to.
    """
    staging = os.path.join(directory, STAGING_NAME)
    with locked(staging, directory):
        keeps_staging = True
        try:
            with write_errors(directory):
                file = system.open_append(os.path.join(staging, JOURNAL_NAME))
            with file:
                journal = file.fileno()
                with write_errors(directory):
                    earlier = read_journal(journal)
                    keeps_staging = earlier.work is not None  # so it can be resumed
                    finished = resume_or_discard(earlier, journal, directory, shards, work, resume, index_name)
                keeps_staging = work is not None
                destination = Destination(directory, journal, shards, finished, earlier.verified, index_name)
                try:
                    yield destination
                except BaseException:
                    if not keeps_staging:
                        remove_placed(directory, destination.placed)
                    raise
            keeps_staging = False
        finally:
            if not keeps_staging:
                remove_staging(staging)
