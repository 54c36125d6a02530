"""Find the files of a checkpoint: on this machine, in a repository of the Hub, or behind a URL."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Sequence
from typing import NamedTuple

from automodel_conv.errors import CheckpointError, UnsupportedError, listing, message
from automodel_conv.files import system
from automodel_conv.files.choosing import (
    ADVICE,
    INDEX_SUFFIX,
    MAX_INDEX_BYTES,
    Chosen,
    choose_files,
    choose_in_folder,
    choose_name,
    names_of_variant,
    refuse_absent,
)
from automodel_conv.files.companions import WELL_KNOWN, is_companion
from automodel_conv.files.config import CONFIG_NAME, MODELOPT_NAME
from automodel_conv.files.header import checkpoint_error, too_large
from automodel_conv.files.hub import download, find_repository, is_offline, names_in, repository_of_url
from automodel_conv.files.remote.connections import Connections, Traffic
from automodel_conv.files.remote.folders import Folder, find_folder
from automodel_conv.files.remote.node_cache import CachedFile, PinnedSource, cache_directory
from automodel_conv.files.remote.requests import Address
from automodel_conv.files.remote.small_files import SmallFiles
from automodel_conv.files.remote.urls import is_url, protocol_of, text_of, without_secrets
from automodel_conv.files.remote.web_files import WebFile
from automodel_conv.files.shards import CHECKSUMS_NAME, PAGE_BYTES
from automodel_conv.files.source import ByteSource, LocalFile
from automodel_conv.files.source_options import SourceSettings

# Estimated bytes of a header without tensors, and bytes that each tensor adds to its name. Both err on the large side.
_HEADER_GUESS = 2048
_ENTRY_GUESS = 110
# First bytes of a file that no index describes. Headers of most single files are smaller.
_UNKNOWN_HEADER_GUESS = 64 << 10
_REPOSITORY = re.compile(r"[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*", re.ASCII)
SMALL_NAMES = (CONFIG_NAME, MODELOPT_NAME, CHECKSUMS_NAME)
"""Names of the small files that describe weights."""
_ABSENT = (401, 403, 404, 410)
"""Answers of web servers for a file that does not exist. Stores deny it if the caller may not list the names."""


class Located(NamedTuple):
    """The files of a checkpoint."""

    chosen: Chosen
    sources: tuple[ByteSource, ...]
    """The bytes of each file."""
    connections: Connections | None = None
    """Connections to the servers that have bytes that are not on this machine; None if all are."""

    @property
    def traffic(self) -> Traffic | None:
        """Counts of the requests over these connections."""
        return None if self.connections is None else self.connections.traffic


def may_be_repository(path: str) -> bool:
    """Return whether a path can be the name of a repository of the Hub."""
    return _REPOSITORY.fullmatch(path) is not None and not path.endswith((".safetensors", ".json", *ADVICE))


def locate(
    path: str,
    settings: SourceSettings,
    *,
    companions: bool = False,
    whole: bool = False,
    weights: str = "",
    small: Sequence[str] = SMALL_NAMES,
) -> Located:
    """Find the files of a checkpoint; see ``open_checkpoint`` for the path and the settings.

    Args:
        path: path, URL or name of a repository.
        settings: how to reach the files.
        companions: whether files that accompany the weights must be on this machine too.
        whole: whether the weights must be on this machine. Those of a repository are downloaded to the Hub's cache.
        weights: name of the only file of weights in a folder; empty if an index or the names in the folder decide.
        small: names of the files that must be on this machine if they exist.

    Raises:
        CheckpointError: there is no checkpoint, or it cannot be reached.
        UnsupportedError: the weights are in another format than safetensors, or an option does not fit the path.
    """
    path, wanted = os.path.expanduser(path), _Wanted(companions, whole, weights, small)
    if is_url(path) and protocol_of(path) == "hf":
        name, revision, inner = repository_of_url(path)
        if revision is not None and settings.revision not in (None, revision):
            raise _contradiction("revision", path, revision, settings.revision)
        return _in_repository(name, revision or settings.revision, inner, settings, wanted)
    if is_url(path):
        _refuse_hub_options(path, settings)
        return _behind_url(path, settings, wanted)
    if system.exists(path):
        directory = os.path.join(path, *settings.subfolder.split("/")) if settings.subfolder else path
        if not system.exists(directory):
            do = "check the path and {subfolder=}, which is below it"
            raise checkpoint_error("no such checkpoint", where=directory, do=do)
        return _on_this_machine(choose_files(os.path.abspath(os.path.join(directory, weights)), settings.variant))
    try:
        if not may_be_repository(path):
            do = "check the path; a repository of the Hub is named org/name"
            raise checkpoint_error("no such checkpoint", where=path, do=do)
        return _in_repository(path, settings.revision, "", settings, wanted)
    except CheckpointError as error:
        similar = _similar_paths(path)
        if similar:
            error.add("  similar:\n" + listing(similar))
        raise


class _Wanted(NamedTuple):
    """The files that a call needs; see ``locate``."""

    companions: bool
    whole: bool
    weights: str
    small: Sequence[str]


def _on_this_machine(chosen: Chosen) -> Located:
    absent = [shard for shard, file in zip(chosen.shards, chosen.files, strict=True) if not system.is_file(file)]
    refuse_absent(absent, chosen, chosen.directory)
    return Located(chosen, tuple(map(LocalFile, chosen.files)))


def _similar_paths(path: str) -> list[str]:
    """Return up to three paths with similar last names in the parent directory of a path that does not exist."""
    parent, name = os.path.split(path.rstrip("/"))
    try:
        names = system.list_names(parent or os.curdir)
    except (OSError, ValueError):  # there is no such directory, or no directory can have this name
        return []
    return [os.path.join(parent, other) for other in difflib.get_close_matches(name, names, 3)]


def _contradiction(option: str, path: str, inner: object, given: object) -> UnsupportedError:
    return UnsupportedError(
        message(f"{option} contradicts the URL", where=without_secrets(path), expected=inner, found=given)
    )


def _refuse_hub_options(url: str, settings: SourceSettings) -> None:
    given = {
        "revision": settings.revision,
        "token": settings.token,
        "cache_dir": settings.cache_dir,
        "local_files_only": settings.local_files_only or None,
    }
    named = [name for name, value in given.items() if value is not None]
    if named:
        text = f"{', '.join(named)}: for the Hub only"
        do = "pass credentials in {storage_options=}"
        raise UnsupportedError(message(text, where=without_secrets(url), expected="org/name or hf://org/name", do=do))


def _in_repository(name: str, revision: str | None, inner: str, settings: SourceSettings, wanted: _Wanted) -> Located:
    """Find the files of a repository: in the Hub's cache, and by range the files that it lacks.

    Args:
        inner: path within the repository, of a folder, an index or a file; empty for its root.
    """
    file = ""
    if inner.endswith((".safetensors", ".json", *ADVICE)):
        inner, _, file = inner.rpartition("/")
    subfolder = "/".join(filter(None, [inner, settings.subfolder]))
    repository = find_repository(name, revision, subfolder, settings)
    names = names_in(repository, settings)
    prefix = f"{subfolder}/" if subfolder else ""
    present = [path[len(prefix) :] for path in names if path.startswith(prefix)]
    here = sorted(path for path in present if "/" not in path)
    shown = name + (f"/{subfolder}" if subfolder else "")
    folder = os.path.join(repository.folder, *filter(None, subfolder.split("/")))
    file = file or wanted.weights or choose_name(shown, here, settings.variant)
    copy = os.path.join(folder, file) if file.endswith(".json") else None
    if copy is not None and not system.is_file(copy):
        download(repository, [prefix + file], settings)
    chosen = choose_in_folder(folder, file, copy)
    refuse_absent([shard for shard in chosen.shards if shard not in present], chosen, shown)
    small = [path for path in present if path in wanted.small or (wanted.companions and is_companion(path))]
    weights = chosen.shards if wanted.whole else ()
    download(repository, [prefix + path for path in (*weights, *small)], settings)
    connections = Connections(Traffic())

    def source(shard: str, first_bytes: int) -> ByteSource:
        path = os.path.join(chosen.directory, *shard.split("/"))
        if system.is_file(path):
            return LocalFile(path)
        url = repository.url(prefix + shard)
        file = WebFile(without_secrets(url), lambda: Address(url, repository.headers()), connections, first_bytes)
        return _kept_on_node(file, settings)

    sources = tuple(map(source, chosen.shards, _first_bytes(chosen)))
    absent = [shard for shard, one in zip(chosen.shards, sources, strict=True) if not isinstance(one, LocalFile)]
    if settings.local_files_only or is_offline():
        refuse_absent(absent, chosen, shown)
    return Located(chosen, sources, connections if absent else None)


def _behind_url(url: str, settings: SourceSettings, wanted: _Wanted) -> Located:
    folder = find_folder(url, settings.subfolder, settings.storage_options, tuple(ADVICE))
    index, single = names_of_variant(settings.variant)
    weights = folder.name or wanted.weights
    try:
        names = [folder.name] if folder.is_one_file else folder.names() if folder.lists_names else None
    except OSError as error:
        raise _unreadable(folder.url, error) from None
    named = [folder.name] if folder.name.endswith(".json") else []
    if names is not None:
        copied = [*named, *(name for name in names if name in wanted.small or _is_index(name, settings.variant))]
    else:
        copied = [*named, *([] if weights else [index]), *wanted.small, *(WELL_KNOWN if wanted.companions else ())]
    files = _fetch(folder, list(dict.fromkeys(copied)), wanted.weights or single)
    if wanted.companions and folder.lists_names and not folder.is_one_file:
        try:
            others = [name for name in folder.names(below=True) if is_companion(name) and name not in files]
        except OSError as error:
            raise _unreadable(folder.url, error) from None
        files |= _fetch(folder, others, single)
    present = names if names is not None else [*files, single]
    name = weights or choose_name(folder.url, sorted(present), settings.variant)
    small = SmallFiles(files)
    copy = os.path.join(small.folder, name) if name in files else None
    chosen = choose_in_folder(folder.url, name, copy)
    sources = tuple(
        _kept_on_node(folder.file(shard, first_bytes, small), settings)
        for shard, first_bytes in zip(chosen.shards, _first_bytes(chosen), strict=True)
    )
    return Located(chosen._replace(directory=small.folder), sources, folder.connections)


def _kept_on_node(file: PinnedSource, settings: SourceSettings) -> ByteSource:
    """Return a remote file that is read through the directory of ``node_cache``, if there is one."""
    return file if settings.node_cache is None else CachedFile(file, cache_directory(settings.node_cache))


def _is_index(name: str, variant: str | None) -> bool:
    return name.endswith(INDEX_SUFFIX) if variant is None else name == names_of_variant(variant)[0]


def _first_bytes(chosen: Chosen) -> list[int]:
    """Return the bytes of each file to request first; they should hold its header."""
    if chosen.index is None:
        return [_UNKNOWN_HEADER_GUESS] * len(chosen.shards)
    guesses = dict.fromkeys(chosen.shards, _HEADER_GUESS)
    for name, shard in chosen.index.weight_map.items():
        guesses[shard] += len(name) + _ENTRY_GUESS
    return [-(-guess // PAGE_BYTES) * PAGE_BYTES for guess in guesses.values()]  # our own headers fill whole pages


def _fetch(folder: Folder, names: Sequence[str], single: str) -> dict[str, bytes]:
    """Return the small files of a folder that exist, by name.

    Raises:
        CheckpointError: a file cannot be read, or is too large.
    """
    try:
        results = folder.fetch(names, MAX_INDEX_BYTES)
    except OSError as error:
        raise _unreadable(folder.url, error) from None
    files: dict[str, bytes] = {}
    denied: dict[str, OSError] = {}
    for name, result in zip(names, results, strict=True):
        if isinstance(result, bytes):
            if len(result) > MAX_INDEX_BYTES:
                raise too_large(f"{folder.url}/{name}", MAX_INDEX_BYTES, f"more than {MAX_INDEX_BYTES}")
            files[name] = result
        elif name != folder.name and not folder.lists_names and getattr(result, "status", None) in _ABSENT:
            denied[name] = result
        elif not isinstance(result, FileNotFoundError) or name == folder.name:
            raise _unreadable(f"{folder.url}/{name}", result) from None
    if denied and not files and not folder.name:
        _refuse_denied(folder, denied, single)
    return files


def _refuse_denied(folder: Folder, denied: dict[str, OSError], single: str) -> None:
    """Raise the first error of files that may be absent, unless the single file that needs none of them exists."""
    name, error = next(iter(denied.items()))
    try:
        folder.file(single, 8, None).identity()
    except OSError:
        raise _unreadable(f"{folder.url}/{name}", error) from None


def _unreadable(where: str, error: OSError) -> CheckpointError:
    # The text of a library's error may contain credentials, so no traceback must show it.
    do = "check the URL, the network and the access rights"
    return checkpoint_error("a checkpoint behind a URL cannot be read", where=where, found=text_of(error), do=do)
