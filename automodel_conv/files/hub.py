"""Repositories of the Hub: list their files, download the small ones, and read headers of the large ones.

The cache, tokens, mirrors (``HF_ENDPOINT``) and the offline mode are those of huggingface_hub. If a file is not in the
cache, its header is read by range requests. Source: huggingface_hub 1.33.0, ``parse_safetensors_file_metadata`` in
``hf_api.py``.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from types import ModuleType
from typing import NamedTuple

from automodel_conv.files import system
from automodel_conv.files.config import CONFIG_NAME, MODELOPT_NAME
from automodel_conv.files.header import checkpoint_error
from automodel_conv.files.shards import CHECKSUMS_NAME
from automodel_conv.files.source import Identity, OpenSource

_SMALL = ("*.safetensors.index.json", CONFIG_NAME, MODELOPT_NAME, CHECKSUMS_NAME)
"""Patterns of the files that are downloaded from any repository. They list and describe the weights."""
_REQUIREMENT = "huggingface_hub>=1.23"  # as in pyproject.toml
_SECONDS_WITHOUT_A_BYTE = 60
_SIZE = re.compile(r"bytes .*/(\d+)")
_LINE_END = "\n"
# Source: huggingface_hub 1.33.0, ``repo_folder_name``. Names of repositories have no "--".
_SNAPSHOT = re.compile(r".*[/\\]models--(.+?)--(.+)[/\\]snapshots[/\\][0-9a-f]{40}", re.DOTALL)


class Repository(NamedTuple):
    """One commit of a repository."""

    name: str
    """``org/name``."""
    folder: str
    """Path of the local snapshot, which holds the cached files under their paths in the repository."""

    @property
    def commit(self) -> str:
        """Hash of the commit."""
        return os.path.basename(self.folder)

    def url(self, file: str) -> str:
        """Return the URL of a file, given its path in the repository."""
        from huggingface_hub import hf_hub_url

        return hf_hub_url(self.name, file, revision=self.commit)


def with_repository(path: str) -> str:
    """Return a path for an error text; if it is a snapshot in the cache, after the name of its repository."""
    match = _SNAPSHOT.fullmatch(path)
    return path if match is None else f"{match[1]}/{match[2]} in {path}"


def find_repository(name: str, revision: str | None) -> Repository:
    """Resolve a revision to a commit, and download its configs and indexes.

    Raises:
        CheckpointError: the repository does not exist, access is denied, or the Hub cannot be reached and the cache
            does not hold the repository.
    """
    where = name if revision is None else f"{name}, revision {revision}"
    with _hub_errors("neither a local path nor a repository that can be downloaded", where):
        from huggingface_hub import snapshot_download

        folder = snapshot_download(name, revision=revision, allow_patterns=list(_SMALL), ignore_patterns=["*/*"])
    return Repository(name, os.path.abspath(folder))


def names_in(repository: Repository) -> list[str]:
    """Return the paths of all files in a repository, or of the cached files if the Hub cannot be reached.

    Raises:
        CheckpointError: the Hub refuses to list the files.
    """
    cached = _cached_list(repository)
    if cached is not None:
        return cached
    with _hub_errors("the files of a repository cannot be listed", repository.name):
        from huggingface_hub import HfApi
        from huggingface_hub.errors import OfflineModeIsEnabled

        try:
            return HfApi().list_repo_files(repository.name, revision=repository.commit)
        except (_http_client().TransportError, OfflineModeIsEnabled):
            return list(_files_below(repository.folder, ""))


def download(repository: Repository, files: Iterable[str]) -> None:
    """Download the files of a repository that are not in the cache yet.

    Raises:
        CheckpointError: the download fails.
    """
    absent = [file for file in files if not system.is_file(os.path.join(repository.folder, *file.split("/")))]
    if absent:
        with _hub_errors(
            "files of a repository cannot be downloaded", f"{repository.name}, commit {repository.commit}"
        ):
            from huggingface_hub import snapshot_download

            snapshot_download(
                repository.name, revision=repository.commit, allow_patterns=[glob.escape(file) for file in absent]
            )


class HubFile(NamedTuple):
    """A file of a repository that is not on this machine.

    One or two requests read its header.
    """

    url: str
    guess: int
    """Estimated offset of the data in bytes. The first request reads this many bytes."""

    def describe(self) -> str:
        return self.url

    def identity(self) -> Identity:
        return self.url  # the URL contains the commit

    def open(self) -> OpenSource:
        """Request the size of the file and its first bytes.

        Raises:
            CheckpointError: the file cannot be read.
        """
        return _OpenHubFile(self.url, *_fetch(self.url, 0, max(8, self.guess)))


class _OpenHubFile(NamedTuple):
    """A remote file whose header is read by a single thread."""

    url: str
    start: bytearray
    """The bytes that have been read so far, from the start of the file."""
    nbytes: int
    """Size of the file."""

    def size(self) -> int:
        return self.nbytes

    def read_into(self, views: list[memoryview], offset: int) -> None:
        for view in views:
            stop = offset + len(view)
            if stop > len(self.start):
                self.start.extend(_fetch(self.url, len(self.start), stop - len(self.start))[0])
            view[:] = self.start[offset:stop]
            offset = stop

    def descriptor(self) -> int | None:
        return None

    def close(self) -> None:
        pass


def _fetch(url: str, offset: int, nbytes: int) -> tuple[bytearray, int]:
    """Return bytes of a remote file, fewer only at its end, and the size of the file."""
    with _hub_errors("a remote file cannot be read", url):
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff

        requested = {"Range": f"bytes={offset}-{offset + nbytes - 1}", "Accept-Encoding": "identity"}
        headers, data = build_hf_headers(headers=requested), bytearray()
        with http_stream_backoff("GET", url, headers=headers, timeout=_SECONDS_WITHOUT_A_BYTE) as response:
            hf_raise_for_status(response)
            ranged = _SIZE.fullmatch(response.headers.get("Content-Range", ""))
            size = ranged[1] if ranged else response.headers.get("Content-Length", "")
            if not size.isdecimal() or (response.status_code == 206) != bool(ranged):
                raise ValueError(f"the response does not state the size of the file: {dict(response.headers)}")
            skipped = 0 if ranged else offset  # a server without range support sends the whole file
            with suppress(_http_client().TransportError):  # the check below reports missing bytes
                for part in response.iter_raw():
                    data += part
                    if len(data) >= skipped + nbytes:
                        break
        data = data[skipped : skipped + nbytes]
        if len(data) < min(nbytes, int(size) - offset):
            raise ValueError(f"{len(data)} bytes of {nbytes} from byte {offset}")
        return data, int(size)


@contextmanager
def _hub_errors(what: str, where: str) -> Iterator[None]:
    """Raise errors of the Hub and of the network as CheckpointError."""
    try:
        import huggingface_hub  # noqa: F401

        client = _http_client()
    except ImportError as error:
        raise checkpoint_error(
            f"no such directory, and {_REQUIREMENT} is not installed to download it",
            where=where,
            found=error,
            do=f"check the path, or: pip install '{_REQUIREMENT}'",
        ) from error
    try:
        yield
    except (OSError, ValueError, client.HTTPError) as error:
        raise checkpoint_error(
            what,
            where=where,
            found=f"{type(error).__name__}: {str(error).strip().partition(_LINE_END)[0]}",
            do=_advice(error),
        ) from error


def _advice(error: Exception) -> str:
    """Return advice for an error of the Hub or of the network."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    if isinstance(error, GatedRepoError):
        return "accept the conditions on the page of the repository, and log in with: hf auth login"
    if isinstance(error, RevisionNotFoundError):
        return "check the revision"
    if isinstance(error, RepositoryNotFoundError):
        return "check the path or the name; if the repository is private, log in with: hf auth login"
    return "check the path, the network and HF_HUB_OFFLINE; without a network, pass the path of a folder with the files"


def _http_client() -> ModuleType:
    """Return the package that sends the requests of huggingface_hub: httpx2 from version 2.0 on, httpx before.

    Raises:
        ImportError: the package is another one, as with versions before 1.0.
    """
    from huggingface_hub.errors import HfHubHTTPError

    packages = {base.__module__.partition(".")[0] for base in HfHubHTTPError.__mro__ if base.__name__ == "HTTPError"}
    for package in ("httpx2", "httpx"):
        if package in packages:
            return import_module(package)
    raise ImportError("this version of huggingface_hub sends its requests with neither httpx nor httpx2")


def _cached_list(repository: Repository) -> list[str] | None:
    """Return the paths that newer versions of ``snapshot_download`` store in the cache; None if they are not stored."""
    try:
        from huggingface_hub import get_cached_repo_tree
        from huggingface_hub.errors import CachedRepoTreeNotFoundError
    except ImportError:
        return None
    try:
        return [file.path for file in get_cached_repo_tree(repository.name, revision=repository.commit)]
    except CachedRepoTreeNotFoundError:
        return None


def _files_below(folder: str, prefix: str) -> Iterator[str]:
    for name in system.list_names(folder):
        path = os.path.join(folder, name)
        if system.is_directory(path):
            yield from _files_below(path, f"{prefix}{name}/")
        else:
            yield prefix + name
