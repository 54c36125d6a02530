"""A directory that becomes a checkpoint: nothing in it is one until everything is.

    DIRECTORY/incomplete.automodel_conv/   the shards while they are written, a lock, and a journal of what is finished
    DIRECTORY/incomplete.automodel_conv/beside/   the files that go with the shards, in their folders
    DIRECTORY/                             all of it, at the end, by renaming; the index last

A loader finds either all files or no index (or no ``model.safetensors``). After a crash the journal says which shards
are finished, and of what: the same work goes on, other work is refused. A line of the journal is one of

    {"work": what}          the first one; null: it cannot go on
    {"finished": shard}     that shard is on the disk, whole
    {"again": shard}        it was, and has to be written anew
    {"placing": {name: its size and time of change}}   from here on files are put in their places, in this order

The name of a file that goes with the shards may have folders, each before a "/".
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

from automodel_conv.errors import DestinationError, WriteError, listing, message
from automodel_conv.files import system
from automodel_conv.files.shards import CHECKSUMS_NAME, FORM, Shard

STAGING_NAME = "incomplete.automodel_conv"
_LOCK = "lock"
_JOURNAL = "journal.jsonl"
_BESIDE = "beside"
# Far more than a line for every file of any checkpoint.
_MOST_JOURNAL_BYTES = 64 << 20


def is_checkpoint(name: str) -> bool:
    """Whether a file of this name is one that loaders take weights from."""
    own = name.endswith((".safetensors", ".safetensors.index.json", ".gguf"))
    return own or (name.startswith("pytorch_model") and name.endswith((".bin", ".bin.index.json")))


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
        path = _inside(self.path(_BESIDE), name)
        system.make_directory(os.path.dirname(path))
        return path

    def found(self, name: str) -> str:
        """Where a finished file lies: put in its place already, if ``commit`` was cut short, or not yet."""
        staged = self.path(name)
        return staged if system.exists(staged) else os.path.join(self.directory, name)

    def write(self, name: str, text: bytes) -> None:
        """Write a small file that goes with the shards."""
        with telling(self.directory):
            fd = system.create(self.path(name))
            try:
                system.write_exactly(fd, [memoryview(text)], 0, self.path(name))
                system.sync(fd)
            finally:
                system.close(fd)

    def finish(self, shard: Shard, *, verified: bool = False) -> None:
        """Note that a shard is on the disk, whole, and whether it was compared with what it was made of."""
        with telling(self.directory):
            system.write_end(self._journal, _line({"finished": shard.name, "verified": verified}))
        self._finished.add(shard.name)

    def commit(self, index: bytes | None) -> None:
        """Make the directory a checkpoint, once all shards are finished.

        What else lies in ``staging`` goes with them, in place of files of the same names.

        Args:
            index: the text of the index, if there is to be one.
        """
        shards = [shard.name for shard in self._shards]
        with telling(self.directory):
            written = set(system.list_names(self.staging)) - {_LOCK, _JOURNAL, _BESIDE, self._index_name, *shards}
            others = {name: self.path(name) for name in written} | _files_below(self.path(_BESIDE))
            for path in others.values():
                _sync(path)
            if index is not None:
                self.write(self._index_name, index)
            names = [*sorted(others), *_in_order(shards, None if index is None else self._index_name)]
            paths = {name: others.get(name) or self.found(name) for name in names}
            placed = {name: [*system.identity(paths[name])] for name in names}  # fails if one is in neither place
            system.sync_directory(self.staging)
            self.placed = placed
            system.write_end(self._journal, _line({"placing": placed}))
            if CHECKSUMS_NAME not in others and system.exists(os.path.join(self.directory, CHECKSUMS_NAME)):
                system.remove(os.path.join(self.directory, CHECKSUMS_NAME))  # of what was there before
            folders = _folders_of(names, self.directory)
            for folder in reversed(folders):
                system.make_directory(folder)
            for name in names:
                if name == names[-1]:  # what makes it a checkpoint comes after all else is on the disk
                    for folder in (*folders, self.directory):
                        system.sync_directory(folder)
                place = _inside(self.directory, name)
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


def _inside(directory: str, name: str) -> str:
    """The path of a file that a directory or its folders hold."""
    return os.path.join(directory, *name.split("/"))


def _folders_of(names: Iterable[str], directory: str) -> list[str]:
    """The folders of a directory that hold these files, inner ones first."""
    parts = [name.split("/")[:-1] for name in names]
    folders = {os.path.join(directory, *folder[:depth]) for folder in parts for depth in range(1, len(folder) + 1)}
    return sorted(folders, key=len, reverse=True)


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


def staged_path(directory: str, name: str) -> str:
    """Where a file of a directory that is written to lies until all are there."""
    return os.path.join(directory, STAGING_NAME, name)


def holds_work(directory: str) -> bool:
    """Whether a directory holds unfinished work, which its journal tells."""
    return system.exists(os.path.join(directory, STAGING_NAME, _JOURNAL))


def remove_remains(directory: str) -> None:
    """Remove what is left of a work that was killed after all of it was done.

    Raises:
        DestinationError: another process writes to the directory.
    """
    staging = os.path.join(directory, STAGING_NAME)
    if system.exists(staging):
        with telling(directory):
            lock = _locked(staging, directory)
        _remove(staging)
        system.close(lock)


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
    with telling(directory):
        lock = _locked(staging, directory)
    try:
        with telling(directory):
            journal = system.open_append(os.path.join(staging, _JOURNAL))
        keeps = True
        try:
            with telling(directory):
                earlier = _read(journal)
                keeps = earlier.work is not None  # and so may go on
                finished = _taken_over(earlier, journal, directory, shards, work, resume, index_name)
            keeps = work is not None
            destination = Destination(directory, journal, shards, finished, earlier.verified, index_name)
            try:
                yield destination
            except BaseException:
                if not keeps:
                    _take_back(directory, destination.placed)
                raise
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
    earlier: _Earlier,
    journal: int,
    directory: str,
    shards: Sequence[Shard],
    work: Mapping[str, Any] | None,
    resume: bool,
    index_name: str,
) -> set[str]:
    """Names of the shards that an earlier work has finished; what cannot be used of it is thrown away.

    Raises:
        DestinationError: see ``open_destination``.
    """
    staging = os.path.join(directory, STAGING_NAME)
    work = None if work is None else json.loads(json.dumps(work))
    finished: set[str] = set()
    if earlier.work is not None and (resume or work is None):
        if earlier.work != work:
            _refuse_other_work(directory, earlier.work, work or {})
        finished = {shard.name for shard in shards if shard.name in earlier.finished and _is_whole(shard, directory)}
    placing = earlier.placing
    if not finished and not any(_is_placed(directory, name, placing[name]) for name in list(placing)[-1:]):
        _take_back(directory, placing)
    complete = len(finished) == len(shards)
    allowed = finished | ({index_name} if complete else set())
    present = [name for name in system.list_names(directory) if is_checkpoint(name) and name not in allowed]
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
        system.truncate(journal, 0)
        system.write_end(journal, _line({"work": work}))
    for name in sorted(earlier.finished - finished) if finished else ():
        system.write_end(journal, _line({"again": name}))  # before it has its size again, but not its bytes
    for name in system.list_names(staging):
        if name not in (_LOCK, _JOURNAL, *finished):
            _remove_all(os.path.join(staging, name))
    return finished


def _refuse_other_work(directory: str, begun: Mapping[str, Any], work: Mapping[str, Any]) -> None:
    differences = list(_differences("", begun, work))
    raise DestinationError(
        message(
            "the directory holds an unfinished work that is not this one",
            where=os.path.join(directory, STAGING_NAME),
            expected="\n" + listing(f"{key}: {_short(was)}" for key, was, _ in differences),
            found="\n" + listing(f"{key}: {_short(now)}" for key, _, now in differences),
            do=["finish it as it was begun", "start anew with {resume=False}", "remove that folder"],
        )
    )


def _differences(key: str, was: Any, now: Any) -> Iterator[tuple[str, Any, Any]]:
    """Keys of objects, and of objects in them, whose values differ."""
    if isinstance(was, dict) and isinstance(now, dict):
        for inner in sorted({*was, *now}):
            yield from _differences(f"{key}, {inner}" if key else inner, was.get(inner), now.get(inner))
    elif was != now:
        yield key, was, now


def _short(value: object, limit: int = 200) -> str:
    text = str(value)
    return text if len(text) <= limit else text[:limit] + "..."


class _Earlier(NamedTuple):
    """What a journal says; nothing, if it is no journal."""

    work: dict[str, Any] | None
    finished: set[str]
    verified: set[str]
    placing: dict[str, list[int]]


_NOTHING = _Earlier(None, set(), set(), {})


def _read(journal: int) -> _Earlier:
    """What the whole lines say; what a crash left of another one is cut off."""
    nbytes = system.size(journal)
    if nbytes > _MOST_JOURNAL_BYTES:
        return _NOTHING
    data = bytearray(nbytes)
    system.read_exactly(journal, [memoryview(data)], 0, _JOURNAL)
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        system.truncate(journal, whole)
    work, finished, verified, placing = None, set(), set(), {}
    try:
        for line in data[:whole].splitlines():
            match record := json.loads(line):
                case {"work": dict(value)}:
                    work = value
                case {"work": None}:
                    pass
                case {"finished": str(name)}:
                    finished.add(name)
                    (verified.add if record.get("verified") is True else verified.discard)(name)
                case {"again": str(name)}:
                    finished.discard(name)
                    verified.discard(name)
                case {"placing": dict(value)} if all(map(_is_inside, value)):
                    placing = value
                case _:
                    return _NOTHING
    except (ValueError, RecursionError):
        return _NOTHING
    return _Earlier(work, finished, verified, placing)


def _is_inside(name: str) -> bool:
    """Whether it names something in a directory or in its folders, and not above them."""
    return all(os.path.basename(part) == part and part not in ("", ".", "..") for part in name.split("/"))


def _is_placed(directory: str, name: str, identity: list[int]) -> bool:
    """Whether a file is in its place, and is the one that was put there."""
    path = _inside(directory, name)
    return system.exists(path) and [*system.identity(path)] == identity


def _take_back(directory: str, placed: Mapping[str, list[int]]) -> None:
    """Remove what a commit that failed has put in its place; first what makes it a checkpoint."""
    with suppress(OSError):
        for name in reversed(list(placed)):
            if _is_placed(directory, name, placed[name]):
                system.remove(_inside(directory, name))
    for folder in _folders_of(placed, directory):
        with suppress(OSError):  # others have files in it too
            system.remove_directory(folder)


def _is_whole(shard: Shard, directory: str) -> bool:
    places = (os.path.join(directory, STAGING_NAME, shard.name), os.path.join(directory, shard.name))
    return any(system.is_file(path) and system.identity(path)[0] == shard.nbytes for path in places)


def _remove(staging: str) -> None:
    """Remove what is no longer needed; the next work removes what cannot be removed now."""
    with suppress(OSError):
        for name in sorted(system.list_names(staging), key=lambda name: name == _LOCK):  # which others look at, last
            _remove_all(os.path.join(staging, name))
        system.remove_directory(staging)


def _remove_all(path: str) -> None:
    """Remove a file, or a folder with all that is in it; of a link, the link."""
    if system.is_directory(path) and not system.is_link(path):
        for name in system.list_names(path):
            _remove_all(os.path.join(path, name))
        system.remove_directory(path)
    else:
        system.remove(path)


def _line(record: Mapping[str, Any]) -> bytes:
    return json.dumps(record).encode() + b"\n"


@contextmanager
def telling(directory: str) -> Iterator[None]:
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
