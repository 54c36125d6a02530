"""Repositories of the Hub: list their files, and download the small ones.

The cache, tokens, mirrors (``HF_ENDPOINT``) and the offline mode are those of huggingface_hub.
"""

from __future__ import annotations

import glob
import logging
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType
from typing import NamedTuple
from urllib.parse import unquote

from automodel_conv.files import system
from automodel_conv.files.config import CONFIG_NAME, MODELOPT_NAME
from automodel_conv.files.header import checkpoint_error
from automodel_conv.files.remote.urls import without_secrets
from automodel_conv.files.shards import CHECKSUMS_NAME
from automodel_conv.files.source_options import SourceSettings

_LOG = logging.getLogger(__name__)

_SMALL = ("*.safetensors.index.json", CONFIG_NAME, MODELOPT_NAME, CHECKSUMS_NAME)
"""Patterns of the files that are downloaded from any repository. They list and describe the weights."""
_REQUIREMENT = "huggingface_hub>=1.23"  # as in pyproject.toml
_HUB_URL = re.compile(
    r"hf://(?:models/)?(?P<name>[^/@]+/[^/@]+)(?:@(?P<revision>refs/(?:pr|convert)/[^/]+|[^/]+))?(?P<path>/.*)?",
    re.IGNORECASE,
)
_LINE_END = "\n"
# Source: huggingface_hub 1.33.0, ``repo_folder_name``. Names of repositories have no "--".
_SNAPSHOT = re.compile(r".*[/\\]models--(.+?)--(.+)[/\\]snapshots[/\\][0-9a-f]{40}", re.DOTALL)


class Repository(NamedTuple):
    """One commit of a repository."""

    name: str
    """``org/name``."""
    folder: str
    """Path of the local snapshot, which holds the cached files under their paths in the repository."""
    token: str | bool | None = None

    @property
    def commit(self) -> str:
        """Hash of the commit."""
        return os.path.basename(self.folder)

    def url(self, file: str) -> str:
        """Return the URL of a file, given its path in the repository."""
        from huggingface_hub import hf_hub_url

        return hf_hub_url(self.name, file, revision=self.commit)

    def headers(self) -> dict[str, str]:
        """Return the headers of a request for a file: the token, and the name of this library."""
        from huggingface_hub.utils import build_hf_headers

        return build_hf_headers(token=self.token, library_name="automodel_conv")


def with_repository(path: str) -> str:
    """Return a path for an error text; if it is a snapshot in the cache, after the name of its repository."""
    match = _SNAPSHOT.fullmatch(path)
    return path if match is None else f"{match[1]}/{match[2]} in {path}"


def repository_of_url(url: str) -> tuple[str, str | None, str]:
    """Return the name, the revision and the path within the repository of an ``hf://`` URL.

    Source: huggingface_hub 1.33.0, ``HfFileSystem.resolve_path``: ``hf://org/name@revision/path``; slashes in a
    revision are escaped, except those of ``refs/pr/1`` and ``refs/convert/name``.

    Raises:
        CheckpointError: the URL names no repository of a model.
    """
    match = _HUB_URL.fullmatch(url)
    if match is None or match["name"].split("/")[0] in ("datasets", "spaces", "buckets"):
        expected = "hf://org/name, hf://org/name@revision or hf://org/name/folder"
        raise checkpoint_error("not the URL of a repository of a model", where=without_secrets(url), expected=expected)
    revision = match["revision"]
    return match["name"], None if revision is None else unquote(revision), (match["path"] or "").strip("/")


def find_repository(name: str, revision: str | None, subfolder: str, settings: SourceSettings) -> Repository:
    """Resolve a revision to a commit, and download its configs and indexes.

    Args:
        name: ``org/name``.
        revision: branch, tag or commit; None for the default branch.
        subfolder: folder of the checkpoint in the repository; empty for its root.
        settings: token, cache, and whether only the cache is used.

    Raises:
        CheckpointError: the repository does not exist, access is denied, or the Hub cannot be reached and the cache
            does not hold the repository.
    """
    where = name if revision is None else f"{name}, revision {revision}"
    prefix = f"{glob.escape(subfolder)}/" if subfolder else ""
    with _hub_errors("neither a local path nor a repository that can be read", where):
        from huggingface_hub import snapshot_download

        folder = snapshot_download(
            name,
            revision=revision,
            allow_patterns=[prefix + pattern for pattern in _SMALL],
            ignore_patterns=[f"{prefix}*/*"],
            token=settings.token,
            cache_dir=settings.hub_cache,
            local_files_only=settings.local_files_only,
        )
    return Repository(name, os.path.abspath(folder), settings.token)


def names_in(repository: Repository, settings: SourceSettings) -> list[str]:
    """Return the paths of all files in a repository, or of the cached files if the Hub cannot be reached.

    Raises:
        CheckpointError: the Hub refuses to list the files.
    """
    cached = _cached_list(repository, settings)
    if cached is not None:
        return cached
    if settings.local_files_only:
        return list(_files_below(repository.folder, ""))
    with _hub_errors("the files of a repository cannot be listed", repository.name):
        from huggingface_hub import HfApi
        from huggingface_hub.errors import OfflineModeIsEnabled

        try:
            api = HfApi(token=settings.token)
            return api.list_repo_files(repository.name, revision=repository.commit)
        except (_http_client().TransportError, OfflineModeIsEnabled):
            return list(_files_below(repository.folder, ""))


def is_offline() -> bool:
    """Return whether huggingface_hub is told to send no requests (``HF_HUB_OFFLINE``)."""
    from huggingface_hub.constants import is_offline_mode

    return is_offline_mode()


def download(repository: Repository, files: Iterable[str], settings: SourceSettings) -> None:
    """Download the files of a repository that are not in the cache yet.

    Raises:
        CheckpointError: the download fails.
    """
    absent = [file for file in files if not system.is_file(os.path.join(repository.folder, *file.split("/")))]
    if absent:
        _LOG.info("downloading %d files of %s", len(absent), repository.name)
        with _hub_errors(
            "files of a repository cannot be downloaded", f"{repository.name}, commit {repository.commit}"
        ):
            from huggingface_hub import snapshot_download

            snapshot_download(
                repository.name,
                revision=repository.commit,
                allow_patterns=[glob.escape(file) for file in absent],
                token=settings.token,
                cache_dir=settings.hub_cache,
                local_files_only=settings.local_files_only,
            )


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
            _reason(error) or what,
            where=where,
            found=f"{type(error).__name__}: {str(error).strip().partition(_LINE_END)[0]}",
            do=_advice(error),
        ) from error


def _reason(error: Exception) -> str | None:
    """Return what is wrong with a repository that exists; None if it does not, or if something else is wrong."""
    from huggingface_hub.errors import GatedRepoError, RevisionNotFoundError

    if isinstance(error, GatedRepoError):
        return "this repository is gated, and access to it is not granted"
    return "the repository has no such revision" if isinstance(error, RevisionNotFoundError) else None


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


def _cached_list(repository: Repository, settings: SourceSettings) -> list[str] | None:
    """Return the paths that newer versions of ``snapshot_download`` store in the cache; None if they are not stored."""
    try:
        from huggingface_hub import get_cached_repo_tree
        from huggingface_hub.errors import CachedRepoTreeNotFoundError
    except ImportError:
        return None
    try:
        tree = get_cached_repo_tree(repository.name, revision=repository.commit, cache_dir=settings.hub_cache)
        return [file.path for file in tree]
    except CachedRepoTreeNotFoundError:
        return None


def _files_below(folder: str, prefix: str) -> Iterator[str]:
    for name in system.list_names(folder):
        path = os.path.join(folder, name)
        if system.is_directory(path):
            yield from _files_below(path, f"{prefix}{name}/")
        else:
            yield prefix + name
