"""A folder of a store that becomes a checkpoint once all of its files are uploaded.

Each file is written to a staging folder on this machine, uploaded and removed. A file is uploaded while the next one is
written, so the disk holds two files at a time. Uploads become visible at the end: a loader sees either all files or no
index (or no ``model.safetensors``). After a crash, the journal in the staging folder records which work was under way,
and what the store has of it.
"""

from __future__ import annotations

import json
import os
import threading
import uuid
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from typing import Any, Protocol

from automodel_conv.errors import ConversionError
from automodel_conv.files import system
from automodel_conv.files.destination import Destination, weights_in_order
from automodel_conv.files.journal import append_record, read_records
from automodel_conv.files.resuming import occupied_error, refuse_other_work
from automodel_conv.files.shards import CHECKSUMS_NAME, DEFAULT_NAMING, Shard, is_checkpoint
from automodel_conv.files.source import ByteSource
from automodel_conv.files.staging import JOURNAL_NAME, LOCK_NAME, STAGING_NAME, locked, remove_all, remove_staging
from automodel_conv.files.uploads.upload_journal import Record, Upload, UploadState, upload_state
from automodel_conv.files.write_errors import write_errors

_SECONDS_BETWEEN_SIGNALS = 0.5


class Store(Protocol):
    """A folder of a store that files are uploaded to; its errors are WriteErrors."""

    @property
    def url(self) -> str:
        """URL of the folder without credentials."""
        ...

    @property
    def resumes(self) -> bool:
        """Whether uploads of a process that was killed can be continued."""
        ...

    @property
    def most_bytes(self) -> int:
        """Memory of an upload in bytes."""
        ...

    @property
    def most_at_once(self) -> int:
        """Size in bytes of the largest file that ``publish`` sends without ``upload``."""
        ...

    def prepare(self) -> None:
        """Create the folder if the store needs that, before the first upload."""
        ...

    def names(self) -> list[str]:
        """Return the names of the files in the folder, sorted; none if it does not exist."""
        ...

    def size(self, name: str) -> int | None:
        """Return the size of a file in bytes; None if it does not exist."""
        ...

    def source(self, name: str) -> ByteSource:
        """Return a file of the folder, to be read."""
        ...

    def is_marked(self, name: str, mark: str) -> bool:
        """Return whether a file exists and has a mark."""
        ...

    def has_parts(self, name: str, upload: Upload, nbytes: int) -> bool:
        """Return whether the store still has all parts of an upload."""
        ...

    def upload(
        self,
        name: str,
        path: str,
        nbytes: int,
        upload: Upload,
        mark: str,
        record: Record,
        stop: threading.Event,
    ) -> bool:
        """Upload a file and leave it invisible, or return earlier if another thread sets ``stop``.

        Returns:
            Whether the file on this machine is no longer needed.
        """
        ...

    def publish(
        self,
        names: Sequence[str],
        paths: Mapping[str, str],
        uploads: Mapping[str, Upload],
        mark: str,
        obsolete: Sequence[str] = (),
    ) -> None:
        """Make files visible in this order, and remove obsolete ones."""
        ...

    def remove(self, names: Sequence[str], mark: str | None = None) -> None:
        """Remove files one after another, with a mark only those that have it."""
        ...

    def abort(self, uploads: Mapping[str, Upload]) -> None:
        """Remove all parts of uploads that are not visible."""
        ...


class Uploading(Destination):
    """A folder of a store that is being written to, as opened by ``open_uploads``."""

    def __init__(
        self, store: Store, directory: str, journal: int, shards: Sequence[Shard], state: UploadState, index_name: str
    ):
        super().__init__(directory, journal, shards, set(state.uploaded), state.verified, index_name)
        self.state = state
        self._store = store
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="automodel_conv-upload")
        self._pending: tuple[Shard, Future[bool]] | None = None
        """The file that is being uploaded."""
        self.checksums |= {name: state.checksums[name] or {} for name in state.uploaded}

    def finish(self, shard: Shard, *, verified: bool = False, checksums: dict[str, str] | None = None) -> None:
        """Begin to upload a shard that is complete on this machine; for the arguments see ``Destination``.

        Waits for the upload of the shard before.

        Raises:
            WriteError: the store refuses the shard before, or cannot be reached.
        """
        self._record({"written": shard.name, "verified": verified, "checksums": checksums})
        if checksums is not None:
            self.checksums[shard.name] = checksums
        self._wait()
        self._begin(shard)

    def continue_uploads(self) -> None:
        """Upload the shards that were complete on this machine when an earlier call was interrupted."""
        for shard in self._shards:
            if shard.name in self.state.written and shard.name in self.unfinished:
                self.checksums[shard.name] = self.state.checksums[shard.name] or {}
                begun = self.state.uploads.get(shard.name)
                if begun is not None and begun.id is None:
                    self._store.abort({shard.name: begun})
                self._begin(shard)
                self._wait()
                self.verified |= self.state.verified & {shard.name}

    def close(self) -> None:
        """End all threads; an upload that is not complete continues in a later call."""
        self._stop.set()
        self._pool.shutdown(cancel_futures=True)

    def _begin(self, shard: Shard) -> None:
        future = self._pool.submit(self._upload, shard.name, self.path(shard.name), shard.nbytes)
        self._pending = shard, future

    def _wait(self) -> None:
        """Wait until the last shard is uploaded, and remove it from this machine."""
        if self._pending is None:
            return
        (shard, future), self._pending = self._pending, None
        while not wait([future], _SECONDS_BETWEEN_SIGNALS).done:
            pass  # a signal that another thread receives ends no wait: the main thread looks for signals now and then
        is_obsolete = future.result()
        self._record({"uploaded": shard.name})
        self._finished.add(shard.name)
        self.on_upload(shard.nbytes)
        if is_obsolete:
            with write_errors(self.directory):
                system.remove(self.path(shard.name))

    def _upload(self, name: str, path: str, nbytes: int) -> bool:
        upload = self.state.uploads.setdefault(name, Upload())
        return self._store.upload(name, path, nbytes, upload, self.state.mark, self._record, self._stop)

    def commit(self, index: bytes | None) -> None:
        """Make the files visible once all shards are uploaded; see ``Destination``.

        The first file is one that must not exist yet. So of two processes that write to the same place, one makes
        nothing visible. Only a checkpoint of a single file begins with the files next to it.

        Raises:
            DestinationError: another process has written to this place.
            WriteError: the store refuses a file, or cannot be reached.
        """
        self._wait()
        with write_errors(self.directory):
            others = self._others()
            sizes = {name: system.identity(path)[0] for name, path in others.items()}
        paths = {**others, **{shard.name: self.path(shard.name) for shard in self._shards}}
        if index is not None:
            self.write(self._index_name, index)
            paths[self._index_name] = self.path(self._index_name)
        for name, nbytes in sizes.items():
            if nbytes > self._store.most_at_once:
                self._upload(name, others[name], nbytes)
        weights = weights_in_order([shard.name for shard in self._shards], None if index is None else self._index_name)
        names = (*weights[:-1], *sorted(others), weights[-1])
        self._record({"publishing": names})
        self.state.publishing = names
        obsolete = [CHECKSUMS_NAME] if CHECKSUMS_NAME not in others and CHECKSUMS_NAME in self._store.names() else []
        self._store.publish(names, paths, self.state.uploads, self.state.mark, obsolete)

    def _record(self, record: Mapping[str, Any]) -> None:
        with self._lock, write_errors(self.directory):
            append_record(self._journal, record)


@contextmanager
def open_uploads(
    store: Store,
    directory: str,
    shards: Sequence[Shard],
    work: Mapping[str, Any] | None,
    *,
    resume: bool = False,
    index_name: str = DEFAULT_NAMING.index_name,
    verify: bool = False,
    checksums: bool = False,
) -> Iterator[Uploading]:
    """Lock the staging folder of an upload for the length of a block that ends with ``commit``.

    Args:
        store: folder of the store.
        directory: path of the directory on this machine that the staging folder is in.
        shards, work, resume, index_name: see ``open_destination``.
        verify: whether each shard must have been compared with its sources before it was uploaded. Shards of an earlier
            call that have not been are written and uploaded again.
        checksums: whether the checksums of each shard must be known; see ``verify``.

    Raises:
        DestinationError: the folder is a checkpoint already, another process of this machine writes to it, or there is
            unfinished work of another description.
        WriteError: the staging folder cannot be written to, the store refuses an upload, or cannot be reached.
    """
    stated: dict[str, Any] | None = json.loads(json.dumps(work)) if store.resumes else None
    staging = os.path.join(directory, STAGING_NAME)
    with locked(staging, store.url):
        keeps_staging = True
        try:
            with write_errors(directory):
                file = system.open_append(os.path.join(staging, JOURNAL_NAME))
            with file:
                journal = file.fileno()
                with write_errors(directory):
                    state = upload_state(read_records(journal))
                keeps_staging = state.work is not None
                if state.work is not None and (resume or stated is None):
                    refuse_other_work(staging, state.work, stated)
                    lost = _lost(store, state, staging, shards, verify, checksums)
                    _refuse_occupied(store, state)
                    with write_errors(directory):
                        for name in lost:
                            append_record(journal, {"again": name})
                            store.abort({name: state.uploads[name]} if name in state.uploads else {})
                            state.forget(name)
                else:
                    _discard(store, state)
                    _refuse_occupied(store, UploadState())
                    state = UploadState(stated, uuid.uuid4().hex)
                    with write_errors(directory):
                        system.truncate(journal, 0)
                        append_record(journal, {"work": stated, "mark": state.mark})
                with write_errors(directory):
                    for name in system.list_names(staging):
                        if name not in (LOCK_NAME, JOURNAL_NAME, *(state.written - state.uploaded)):
                            remove_all(os.path.join(staging, name))
                keeps_staging = stated is not None
                store.prepare()
                place = Uploading(store, directory, journal, shards, state, index_name)
                try:
                    place.continue_uploads()
                    yield place
                except BaseException as error:
                    place.close()
                    if not keeps_staging:
                        _discard_after(error, store, state)
                    raise
                finally:
                    place.close()
            keeps_staging = False
        finally:
            if not keeps_staging:
                remove_staging(staging)
                with suppress(OSError):  # another process has just begun to write to this folder
                    system.remove_directory(directory)


def _lost(
    store: Store, state: UploadState, staging: str, shards: Sequence[Shard], verify: bool, checksums: bool
) -> list[str]:
    """Return the names of files that must be written again: neither the store nor this machine has all of their bytes.

    Files that lack a comparison or checksums must be written again too.
    """
    nbytes = {shard.name: shard.nbytes for shard in shards}

    def is_kept(name: str) -> bool:
        if name not in nbytes or name not in state.written:
            return False
        if (verify and name not in state.verified) or (checksums and state.checksums[name] is None):
            return False
        if name not in state.uploaded:
            path = os.path.join(staging, name)
            return system.is_file(path) and system.identity(path)[0] == nbytes[name]
        is_there = name in state.uploads and store.has_parts(name, state.uploads[name], nbytes[name])
        return is_there or (name in state.publishing and store.is_marked(name, state.mark))

    return [name for name in sorted(state.written | {*state.uploads}) if not is_kept(name)]


def _refuse_occupied(store: Store, state: UploadState) -> None:
    """Raise DestinationError if the folder has weights or an index that this work has not made visible."""
    own = {name for name in state.publishing if is_checkpoint(name) and store.is_marked(name, state.mark)}
    present = [name for name in store.names() if is_checkpoint(name) and name not in own]
    if present:
        raise occupied_error(store.url, present)


def _discard(store: Store, state: UploadState, *, even_complete: bool = False) -> None:
    """Remove what unfinished work has uploaded; keep a complete checkpoint, unless told otherwise."""
    store.abort(state.uploads)
    names = state.publishing
    if names and (even_complete or not store.is_marked(names[-1], state.mark)):
        store.remove(names[::-1], state.mark)


def _discard_after(error: BaseException, store: Store, state: UploadState) -> None:
    """Remove what work that failed has uploaded, and say so in its error if that fails too."""
    try:
        _discard(store, state, even_complete=True)
    except ConversionError as second:
        if isinstance(error, ConversionError):
            error.add(f"  also:     what was uploaded cannot be removed: {second.reason()}")
