"""Repositories of the Hub: which files they hold, the small ones on this machine, and headers of the large ones.

The cache, tokens, mirrors (``HF_ENDPOINT``) and the offline mode are huggingface_hub's. What is read of a file that is
not in the cache is its header, by range. Source: huggingface_hub 1.33.0, ``parse_safetensors_file_metadata`` in
``hf_api.py``.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import NamedTuple

from automodel_conv.files import system
from automodel_conv.files.config import CONFIG_NAME, MODELOPT_NAME
from automodel_conv.files.header import checkpoint_error
from automodel_conv.files.shards import CHECKSUMS_NAME
from automodel_conv.files.source import Identity, OpenSource

_SMALL = ("*.safetensors.index.json", CONFIG_NAME, MODELOPT_NAME, CHECKSUMS_NAME)
"""These files are downloaded of any repository: they say which weights there are, and what they are."""
_SECONDS_WITHOUT_A_BYTE = 60
_SIZE = re.compile(r"bytes .*/(\d+)")


class Repository(NamedTuple):
    """One commit of a repository."""

    name: str
    """``org/name``."""
    folder: str
    """Where the cache has its files, those that it has, by their paths in the repository."""

    @property
    def commit(self) -> str:
        return os.path.basename(self.folder)

    def url(self, file: str) -> str:
        from huggingface_hub import hf_hub_url

        return hf_hub_url(self.name, file, revision=self.commit)


def find_repository(name: str, revision: str | None) -> Repository:
    """The commit that a revision stands for, with its configs and indexes on this machine.

    Raises:
        CheckpointError: there is no such repository, we may not read it, or the Hub cannot be reached and the cache
            does not have it.
    """
    where = name if revision is None else f"{name}, revision {revision}"
    with _told("neither a local path nor a repository that can be downloaded", where):
        from huggingface_hub import snapshot_download

        folder = snapshot_download(name, revision=revision, allow_patterns=list(_SMALL), ignore_patterns=["*/*"])
    return Repository(name, os.path.abspath(folder))


def names_in(repository: Repository) -> list[str]:
    """Paths of all files of a repository; those in the cache where nothing tells and the Hub cannot be reached."""
    kept = _kept_list(repository)
    if kept is not None:
        return kept
    with _told("the files of a repository cannot be listed", repository.name):
        import httpx
        from huggingface_hub import HfApi
        from huggingface_hub.errors import OfflineModeIsEnabled

        try:
            return HfApi().list_repo_files(repository.name, revision=repository.commit)
        except (httpx.TransportError, OfflineModeIsEnabled):
            return list(_files_below(repository.folder, ""))


def download(repository: Repository, files: Iterable[str]) -> None:
    """Bring files of a repository into the cache, those that are not there yet.

    Raises:
        CheckpointError: that fails.
    """
    absent = [file for file in files if not system.is_file(os.path.join(repository.folder, *file.split("/")))]
    if absent:
        with _told("files of a repository cannot be downloaded", f"{repository.name}, commit {repository.commit}"):
            from huggingface_hub import snapshot_download

            snapshot_download(
                repository.name, revision=repository.commit, allow_patterns=[glob.escape(file) for file in absent]
            )


class HubFile(NamedTuple):
    """A file of a repository that is not on this machine; one or two requests read its header.

    ``guess`` is how many bytes it is expected to begin with before its data.
    """

    url: str
    guess: int

    def describe(self) -> str:
        return self.url

    def identity(self) -> Identity:
        return self.url  # which names the commit

    def open(self) -> OpenSource:
        """Ask for its size and its first bytes.

        Raises:
            CheckpointError: it cannot be read.
        """
        return _OpenHubFile(self.url, *_fetch(self.url, 0, max(8, self.guess)))


class _OpenHubFile(NamedTuple):
    """For headers, which one thread reads."""

    url: str
    start: bytearray
    nbytes: int

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
    """Bytes of a remote file, fewer only at its end, and the size of the whole."""
    with _told("a remote file cannot be read", url):
        import httpx
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff

        asked = {"Range": f"bytes={offset}-{offset + nbytes - 1}", "Accept-Encoding": "identity"}
        headers, data = build_hf_headers(headers=asked), bytearray()
        with http_stream_backoff("GET", url, headers=headers, timeout=_SECONDS_WITHOUT_A_BYTE) as response:
            hf_raise_for_status(response)
            ranged = _SIZE.fullmatch(response.headers.get("Content-Range", ""))
            size = ranged[1] if ranged else response.headers.get("Content-Length", "")
            if not size.isdecimal() or (response.status_code == 206) != bool(ranged):
                raise ValueError(f"the answer does not say how long the file is: {dict(response.headers)}")
            skipped = 0 if ranged else offset  # a server that takes no ranges sends all
            with suppress(httpx.TransportError):  # after which too little is there
                for part in response.iter_raw():
                    data += part
                    if len(data) >= skipped + nbytes:
                        break
        data = data[skipped : skipped + nbytes]
        if len(data) < min(nbytes, int(size) - offset):
            raise ValueError(f"{len(data)} bytes of {nbytes} from byte {offset}")
        return data, int(size)


@contextmanager
def _told(what: str, where: str) -> Iterator[None]:
    """Tell as CheckpointError what goes wrong between the Hub and us."""
    try:
        import httpx
        import huggingface_hub  # noqa: F401
    except ImportError as error:
        raise checkpoint_error(
            "no such directory, and huggingface_hub, which could download it, is not installed",
            where=where,
            do="check the path, or: pip install huggingface_hub",
        ) from error
    try:
        yield
    except (OSError, ValueError, httpx.HTTPError) as error:
        raise checkpoint_error(
            what,
            where=where,
            found=f"{type(error).__name__}: {error}",
            do="check the path, the network and the access rights",
        ) from error


def _kept_list(repository: Repository) -> list[str] | None:
    """What newer versions of ``snapshot_download`` keep in the cache; None if there is nothing."""
    try:
        from huggingface_hub import get_cached_repo_tree
        from huggingface_hub.errors import CachedRepoTreeNotFoundError
    except ImportError:
        return None
    try:
        return [file.path for file in get_cached_repo_tree(repository.name, revision=repository.commit)]
    except CachedRepoTreeNotFoundError:
        return None


def _files_below(folder: str, start: str) -> Iterator[str]:
    for name in system.list_names(folder):
        path = os.path.join(folder, name)
        if system.is_directory(path):
            yield from _files_below(path, f"{start}{name}/")
        else:
            yield start + name
