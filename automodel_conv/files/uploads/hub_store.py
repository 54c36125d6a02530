"""Files of a repository of the Hub: uploads that become visible in one commit.

Each large file is uploaded when it is written, and one commit at the end adds all files. The Hub knows large files by
their hashes, and does not receive again what it has. So a call that continues computes all files, and uploads only
those that are missing.

Source: huggingface_hub 1.33.0, ``preupload_lfs_files`` and ``create_commit`` in ``hf_api.py``; the form of URLs,
``hf_file_system.py``.
"""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote, unquote

from automodel_conv.errors import UnsupportedError, WriteError, listing, message
from automodel_conv.files.remote.fsspec_files import FsspecFile
from automodel_conv.files.remote.urls import secrets_of
from automodel_conv.files.source import ByteSource
from automodel_conv.files.uploads.store_errors import occupied_by_other, store_errors
from automodel_conv.files.uploads.upload_journal import Record, Upload

_URL = re.compile(
    r"hf://(?:models/)?(?P<name>[^/@]+/[^/@]+)(?:@(?P<revision>refs/(?:pr|convert)/[^/]+|[^/]+))?(?:/(?P<folder>.+))?",
    re.IGNORECASE,
)
_OTHER_KINDS = ("datasets/", "spaces/", "buckets/", "kernels/")
_MESSAGE = "Add a checkpoint written by automodel_conv"


def hub_store(url: str, token: str | bool | None) -> HubStore:
    """Return the folder of a repository that a URL names; send no request.

    Args:
        url: ``hf://org/name``, maybe with ``@revision`` and with ``/folder``.
        token: token of the Hub; see ``HfApi``.

    Raises:
        UnsupportedError: the URL names no repository of a model, or huggingface_hub is not installed.
    """
    match = _URL.fullmatch(url)
    if match is None or url.removeprefix("hf://").startswith(_OTHER_KINDS):
        expected = "hf://org/name, hf://org/name@revision or hf://org/name/folder"
        raise UnsupportedError(message("not a URL of a model's repository", where=url, expected=expected))
    try:
        from huggingface_hub import HfApi, HfFileSystem
    except ImportError as error:
        do = 'pip install "automodel-conv[hub]"'
        raise UnsupportedError(message("huggingface_hub is not installed", where=url, found=error, do=do)) from error
    revision, folder = match["revision"], match["folder"]
    system = HfFileSystem(token=token, use_listings_cache=False, skip_instance_cache=True)
    return HubStore(
        HfApi(token=token),
        system,
        match["name"],
        None if revision is None else unquote(revision),
        f"{folder}/" if folder else "",
        url,
        secrets_of(None, token),
    )


@dataclass(frozen=True)
class HubStore:
    """A folder of a repository that files are uploaded to."""

    api: Any = field(repr=False)
    """The client of huggingface_hub."""
    system: Any = field(repr=False)
    """The file system of huggingface_hub, which reads files by range."""
    repository: str
    """``org/name``."""
    revision: str | None
    """Branch that the commit goes to; None for the main one."""
    prefix: str
    """Start of the paths of all files in the repository; empty, or with a slash at its end."""
    url: str
    secrets: tuple[str, ...] = field(default=(), repr=False)
    _head: list[str] = field(default_factory=list, repr=False)
    """Hash of the last commit when the work began."""
    _additions: dict[str, Any] = field(default_factory=dict, repr=False)
    """Objects of huggingface_hub for the files that have been uploaded, by name."""

    resumes = False
    most_bytes = 5 * (16 << 20)
    """Memory of an upload in bytes: huggingface_hub sends files in 5 threads, in parts of 16 MiB."""
    most_at_once = sys.maxsize
    """No limit, as the commit uploads large files in parts too."""

    def prepare(self) -> None:
        """Create the repository if it does not exist, and note its last commit.

        Raises:
            WriteError: the repository or the revision does not exist and cannot be created.
        """
        from huggingface_hub.errors import RepositoryNotFoundError

        self._additions.clear()
        with self._errors():
            try:
                head = self._info().sha
            except RepositoryNotFoundError:
                self.api.create_repo(self.repository, repo_type="model", exist_ok=True)
                head = self._info().sha
            self._head[:] = [head]

    def names(self) -> list[str]:
        """Return the names of the files in the folder, sorted; none if the repository does not exist."""
        return sorted(name for name in self._sizes() if "/" not in name)

    def size(self, name: str) -> int | None:
        """Return the size of a file in bytes; None if it does not exist."""
        return self._sizes().get(name)

    def source(self, name: str) -> ByteSource:
        """Return a file of the folder, to be read."""
        revision = "" if self.revision is None else f"@{quote(self.revision, safe='')}"
        path = f"{self.repository}{revision}/{self.prefix}{name}"
        return FsspecFile(self.system, path, f"{self.url}/{name}", secrets=self.secrets)

    def is_marked(self, name: str, mark: str) -> bool:
        """Return False, as all files become visible at once and no file does before."""
        return False

    def has_parts(self, name: str, upload: Upload, nbytes: int) -> bool:
        """Return False, as the Hub cannot be asked for a file that no commit has."""
        return False

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
        """Upload a file, unless the Hub has it or would store it in git itself.

        Returns:
            Whether the file on this machine is no longer needed. The commit sends those that git itself stores.

        Raises:
            WriteError: the Hub refuses the upload, or cannot be reached.
        """
        from huggingface_hub import CommitOperationAdd

        with self._errors(name):
            addition = CommitOperationAdd(path_in_repo=self.prefix + name, path_or_fileobj=path)
            self.api.preupload_lfs_files(self.repository, [addition], revision=self.revision)
        self._additions[name] = addition
        return addition.path_or_fileobj == b""

    def publish(
        self,
        names: Sequence[str],
        paths: Mapping[str, str],
        uploads: Mapping[str, Upload],
        mark: str,
        obsolete: Sequence[str] = (),
    ) -> None:
        """Add all files in one commit.

        Args:
            names: names of the files.
            paths: paths of the files on this machine, by name; those that were uploaded need not exist any more.
            uploads, mark: not used.
            obsolete: names of files that the commit removes.

        Raises:
            DestinationError: another process has made a commit since the work began.
            WriteError: the Hub refuses the commit or leaves out a file, or cannot be reached.
        """
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        with self._errors():
            operations: list[Any] = [
                self._additions.get(name)
                or CommitOperationAdd(path_in_repo=self.prefix + name, path_or_fileobj=paths[name])
                for name in names
            ]
            operations += [CommitOperationDelete(path_in_repo=self.prefix + name) for name in obsolete]
            try:
                self.api.create_commit(
                    self.repository,
                    operations,
                    commit_message=_MESSAGE,
                    revision=self.revision,
                    parent_commit=self._head[0],
                )
            except OSError as error:
                if getattr(getattr(error, "response", None), "status_code", None) == 412:
                    raise occupied_by_other(self.url, "a commit") from None
                raise
        self._refuse_left_out(names)

    def remove(self, names: Sequence[str], mark: str | None = None) -> None:
        """Do nothing, as no file is visible before the commit."""

    def abort(self, uploads: Mapping[str, Upload]) -> None:
        """Do nothing, as the Hub itself removes files that no commit has."""

    def _info(self) -> Any:
        return self.api.repo_info(self.repository, revision=self.revision, repo_type="model")

    def _sizes(self) -> dict[str, int]:
        """Return the sizes of all files in the folder and below, by their paths relative to it."""
        from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError

        with self._errors():
            try:
                entries = self.api.list_repo_tree(
                    self.repository, self.prefix.rstrip("/") or None, recursive=True, revision=self.revision
                )
                files = [one for one in entries if hasattr(one, "size") and one.path.startswith(self.prefix)]
                return {file.path.removeprefix(self.prefix): file.size for file in files}
            except (RepositoryNotFoundError, EntryNotFoundError):
                return {}

    def _refuse_left_out(self, names: Collection[str]) -> None:
        present = self._sizes()
        left_out = [name for name in names if name not in present]
        if left_out:
            raise WriteError(
                message(
                    "the commit lacks files",
                    where=self.url,
                    found="\n" + listing(left_out),
                    do="remove their names from .gitignore of the repository, then repeat the call",
                )
            )

    def _errors(self, name: str | None = None) -> Any:
        return store_errors(self.url if name is None else f"{self.url}/{name}", self.secrets)
