"""The folder that a save or a conversion writes to: a directory on this machine, or a folder of a store."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from typing import Any, NamedTuple, Protocol

from automodel_conv.files import system
from automodel_conv.files.destination import Destination, open_destination
from automodel_conv.files.final_files import path_below
from automodel_conv.files.shards import DEFAULT_NAMING, Shard
from automodel_conv.files.source import ByteSource, LocalFile
from automodel_conv.files.staging import remove_leftovers
from automodel_conv.files.uploads.uploading import Store, open_uploads


class OutputFolder(Protocol):
    """A folder that can become a checkpoint."""

    @property
    def name(self) -> str:
        """Path, or URL without credentials, for error texts."""
        ...

    @property
    def directory(self) -> str:
        """Path of the directory on this machine that holds unfinished work."""
        ...

    @property
    def is_remote(self) -> bool:
        """Whether files are uploaded; they are then on this machine only until then."""
        ...

    @property
    def upload_bytes(self) -> int:
        """Memory in bytes that an upload needs; 0 for a directory."""
        ...

    def names(self) -> list[str]:
        """Return the names in the folder, sorted; none if it does not exist."""
        ...

    def size(self, name: str) -> int | None:
        """Return the size of a file in bytes by its relative name; None if it does not exist."""
        ...

    def source(self, name: str) -> ByteSource:
        """Return a file of the folder by its relative name, to be read."""
        ...

    def batches(self, shards: Sequence[Shard]) -> list[Sequence[Shard]]:
        """Divide shards into those that are written at the same time, before the next ones are begun."""
        ...

    def most_on_disk(self, shards: Sequence[Shard]) -> Sequence[Shard]:
        """Return those of the shards to write that need the most room on the disk at the same time."""
        ...

    def remove_leftovers(self) -> None:
        """Remove what a process left on this machine because it was killed after its work was complete.

        Raises:
            DestinationError: another process of this machine writes to the folder.
        """
        ...

    def open(
        self,
        shards: Sequence[Shard],
        work: Mapping[str, Any] | None,
        *,
        resume: bool = False,
        index_name: str = DEFAULT_NAMING.index_name,
        verify: bool = False,
        checksums: bool = False,
    ) -> AbstractContextManager[Destination]:
        """Lock the folder for the length of a block that ends with ``commit``; see ``open_uploads``."""
        ...


class LocalFolder(NamedTuple):
    """A directory on this machine."""

    directory: str

    @property
    def is_remote(self) -> bool:
        return False

    @property
    def upload_bytes(self) -> int:
        return 0

    @property
    def name(self) -> str:
        return self.directory

    def names(self) -> list[str]:
        return system.list_names(self.directory) if system.is_directory(self.directory) else []

    def size(self, name: str) -> int | None:
        path = path_below(self.directory, name)
        return system.identity(path)[0] if system.is_file(path) else None

    def source(self, name: str) -> ByteSource:
        return LocalFile(path_below(self.directory, name))

    def batches(self, shards: Sequence[Shard]) -> list[Sequence[Shard]]:
        return [shards]

    def most_on_disk(self, shards: Sequence[Shard]) -> Sequence[Shard]:
        return shards

    def remove_leftovers(self) -> None:
        remove_leftovers(self.directory)

    def open(
        self,
        shards: Sequence[Shard],
        work: Mapping[str, Any] | None,
        *,
        resume: bool = False,
        index_name: str = DEFAULT_NAMING.index_name,
        verify: bool = False,
        checksums: bool = False,
    ) -> AbstractContextManager[Destination]:
        # A file on this machine can be compared at any time, and its checksums be computed.
        return open_destination(self.directory, shards, work, resume=resume, index_name=index_name)


class UploadedFolder(NamedTuple):
    """A folder of a store."""

    store: Store
    directory: str

    @property
    def name(self) -> str:
        return self.store.url

    @property
    def is_remote(self) -> bool:
        return True

    @property
    def upload_bytes(self) -> int:
        return self.store.most_bytes

    def names(self) -> list[str]:
        return self.store.names()

    def size(self, name: str) -> int | None:
        return self.store.size(name)

    def source(self, name: str) -> ByteSource:
        return self.store.source(name)

    def batches(self, shards: Sequence[Shard]) -> list[Sequence[Shard]]:
        return [[shard] for shard in shards]

    def most_on_disk(self, shards: Sequence[Shard]) -> Sequence[Shard]:
        # One is uploaded while the next one is written.
        pairs = [shards[start : start + 2] for start in range(max(len(shards) - 1, 1))]
        return max(pairs, key=lambda pair: sum(shard.nbytes for shard in pair))

    def remove_leftovers(self) -> None:
        remove_leftovers(self.directory)
        with suppress(OSError):  # it does not exist
            system.remove_directory(self.directory)

    def open(
        self,
        shards: Sequence[Shard],
        work: Mapping[str, Any] | None,
        *,
        resume: bool = False,
        index_name: str = DEFAULT_NAMING.index_name,
        verify: bool = False,
        checksums: bool = False,
    ) -> AbstractContextManager[Destination]:
        return open_uploads(
            self.store,
            self.directory,
            shards,
            work,
            resume=resume,
            index_name=index_name,
            verify=verify,
            checksums=checksums,
        )
