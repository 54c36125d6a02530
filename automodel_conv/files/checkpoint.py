"""Open a safetensors checkpoint by reading its index and the headers of its files.

If the cache holds all files of a Hub repository, they are opened from there. Otherwise only their headers are fetched.
Callers that read tensor data use ``open_downloaded``, which downloads the files first. Files behind a URL are never
downloaded: their headers and their data are read by range.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

from automodel_conv.doors import door
from automodel_conv.errors import CheckpointError, listing
from automodel_conv.files import system
from automodel_conv.files.choosing import (
    ADVICE,
    Chosen,
    absent_files,
    choose_behind_url,
    choose_files,
    choose_in_repository,
    refuse_absent,
)
from automodel_conv.files.companions import is_companion
from automodel_conv.files.header import (
    Header,
    Item,
    checkpoint_error,
    read_header,
    short,
    take,
)
from automodel_conv.files.hub import HubFile, Repository, download, find_repository, names_in
from automodel_conv.files.remote import RemoteFolder, fetch_small_files, find_folder, is_url, refuse_url
from automodel_conv.files.shards import LAYOUT_KEY, PAGE_BYTES
from automodel_conv.files.source import ByteSource, LocalFile

_READERS = 16
# Estimated bytes of a header without tensors, and bytes that each tensor adds to its name. Both err on the large side.
_HEADER_GUESS = 2048
_ENTRY_GUESS = 110
_REPOSITORY = re.compile(r"[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*", re.ASCII)


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """The headers of a checkpoint as columns, with one row per tensor, sorted by file and then by offset.

    In a checkpoint of ``open_files`` the rows are sorted by file and then by name.

    Attributes:
        path: absolute path that was opened. For a repository, the path of its local snapshot. For a URL, the URL of the
            folder, without credentials and query.
        directory: absolute path of the directory of its ``config.json``. For a URL, a temporary folder with a copy of
            it, which is removed with the checkpoint.
        files: absolute paths of the files that the index names, sorted by name, or of the single file. URLs if some
            files of a repository are not on this machine, or if a URL was opened.
        names: name of each tensor.
        dtypes: safetensors dtype code of each tensor, a key of ``dtypes.BITS``.
        shapes: shape of each tensor as torch reports it. torch counts F4 values in pairs, so the last dimension of an
            F4 tensor is half the header's.
        file_ids: index of each tensor's file in ``files``.
        offsets: offset in bytes of each tensor's data from the start of its file.
        nbytes: size in bytes of each tensor's data.
        metadata: ``__metadata__`` of all files, merged. If two files share a key, the value of the later file is kept.
        position: row of each tensor name.
        index_metadata: ``metadata`` of the index; None without an index.
        layouts: expert layouts that the files and the index name, without duplicates; see ``compiling/marks.py``.
        unindexed: name and file name of each tensor that is stored in a file to which the index does not assign it,
            sorted by file and then by name. These tensors are not part of the checkpoint. Empty without an index.
        is_remote: whether only headers can be read: a URL was opened, or some files of a repository are not on this
            machine. Such a checkpoint can be planned for; loads open it again by its URL or name.
        sources: source of the bytes of each file. Defaults to the files on this machine.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> import torch
        >>> from safetensors.torch import save_file
        >>> with TemporaryDirectory() as directory:
        ...     save_file({"bias": torch.ones(2), "weight": torch.ones(2, 3)}, f"{directory}/model.safetensors")
        ...     checkpoint = open_checkpoint(directory)
        >>> row = checkpoint.position["weight"]
        >>> checkpoint.dtypes[row], checkpoint.shapes[row], checkpoint.nbytes[row]
        ('F32', (2, 3), 24)
    """

    path: str
    directory: str
    files: tuple[str, ...]
    names: list[str] = field(repr=False)
    dtypes: list[str] = field(repr=False)
    shapes: list[tuple[int, ...]] = field(repr=False)
    file_ids: list[int] = field(repr=False)
    offsets: list[int] = field(repr=False)
    nbytes: list[int] = field(repr=False)
    metadata: dict[str, str] = field(repr=False)
    position: dict[str, int] = field(repr=False)
    index_metadata: dict[str, Any] | None = field(default=None, repr=False)
    layouts: tuple[str, ...] = field(repr=False, default=())
    unindexed: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    is_remote: bool = False
    sources: tuple[ByteSource, ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        if not self.sources:
            object.__setattr__(self, "sources", tuple(map(LocalFile, self.files)))

    def left_out(self, rows: Iterable[int]) -> tuple[str, ...]:
        """Return the names of the tensors in ``rows``, followed by the names in ``unindexed``."""
        unindexed = dict.fromkeys(name for name, _ in self.unindexed if name not in self.position)
        return (*(self.names[row] for row in rows), *unindexed)


@door("opening a checkpoint")
def open_checkpoint(path: str | os.PathLike[str], *, revision: str | None = None) -> Checkpoint:
    """Read and check the headers of a safetensors checkpoint, without reading tensor data.

    The checkpoint consists of the tensors that the index assigns to a file. Other tensors in that file are listed in
    ``unindexed`` of the result. Without an index, all tensors of the single file belong to the checkpoint.

    Args:
        path: a directory, an index file or one ``.safetensors`` file. If no such path exists, ``org/name`` on the Hub.
            In a directory an index takes precedence over a single file, and files that it does not name are not opened.
            If the cache holds only a part of a repository, the config and the index are downloaded and the headers are
            read by range requests. Or a URL of a folder, an index or a file that fsspec reads, such as ``s3://``,
            ``gs://`` or ``https://``; the headers are read by range requests.
        revision: branch, tag or commit of a repository. None: its default branch.

    Returns:
        Names, dtypes, shapes and byte offsets of all tensors, as columns.

    Raises:
        CheckpointError: a file is missing, unreadable or malformed, or the files contradict each other.
        UnsupportedError: the weights are in another format than safetensors.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> import torch
        >>> from safetensors.torch import save_file
        >>> with TemporaryDirectory() as directory:
        ...     save_file({"weight": torch.ones(2, 3)}, f"{directory}/model.safetensors")
        ...     checkpoint = open_checkpoint(directory)
        >>> checkpoint.names, checkpoint.dtypes, checkpoint.shapes
        (['weight'], ['F32'], [(2, 3)])
    """
    location = _locate(os.fsdecode(path), revision)
    if isinstance(location, str):
        return _open(choose_files(location))
    if isinstance(location, RemoteFolder):
        return replace(_open_by_range(location), is_remote=True)
    chosen = choose_in_repository(location, names_in(location))
    return _open_remote(chosen, location) if absent_files(chosen) else _open(chosen)


@door("opening a checkpoint")
def open_downloaded(
    path: str | os.PathLike[str], *, revision: str | None = None, companions: bool = False, by_range: bool = False
) -> Checkpoint:
    """Open a checkpoint to read its data; first download the files of a repository that the cache lacks.

    Args:
        path, revision: see ``open_checkpoint``.
        companions: whether to download the files that accompany the weights as well.
        by_range: whether a URL is accepted, which is then read by range.

    Raises:
        CheckpointError: see ``open_checkpoint``.
        UnsupportedError: see ``open_checkpoint``; or the path is a URL and ``by_range`` is false.
    """
    if not by_range:
        refuse_url(path)
    location = _locate(os.fsdecode(path), revision)
    if isinstance(location, str):
        return _open(choose_files(location))
    if isinstance(location, RemoteFolder):
        return _open_by_range(location)
    names = names_in(location)
    chosen = choose_in_repository(location, names)
    download(location, [*chosen.shards, *(filter(is_companion, names) if companions else ())])
    return _open(chosen)


def open_files(files: Sequence[tuple[str, str]]) -> Checkpoint:
    """Open safetensors files on this machine as one checkpoint, without an index.

    Tensors are in the order in which safetensors yields them: by file, and then by name. Loading code may depend on it.

    Args:
        files: path of each file, and what comes before the names of its tensors. Of tensors with one name the last
            counts.

    Raises:
        CheckpointError: a file is missing, unreadable or malformed.
    """
    paths = [os.path.abspath(path) for path, _ in files]
    folder = os.path.dirname(paths[0])
    chosen = Chosen(folder, folder, paths, None)
    refuse_absent(absent_files(chosen), chosen, folder)
    sources = tuple(map(LocalFile, paths))
    headers = [
        header._replace(names=[f"{prefix}{name}" for name in header.names]) if prefix else header
        for header, (_, prefix) in zip(_headers(sources), files, strict=True)
    ]
    checkpoint = _merge(chosen, sources, headers)
    last = checkpoint.position.values()
    return _with_rows(checkpoint, sorted(last, key=lambda row: (checkpoint.file_ids[row], checkpoint.names[row])))


def rows_by_file(checkpoint: Checkpoint) -> list[list[int]]:
    """Return the rows of the tensors of each file."""
    rows: list[list[int]] = [[] for _ in checkpoint.files]
    for row, file in enumerate(checkpoint.file_ids):
        rows[file].append(row)
    return rows


def _locate(path: str, revision: str | None) -> str | RemoteFolder | Repository:
    """Return the folder of a URL, the absolute path if it exists, or else the repository of that name."""
    if is_url(path):
        return find_folder(path)
    if system.exists(path):
        return os.path.abspath(path)
    try:
        if path.endswith((".safetensors", ".json", *ADVICE)) or not _REPOSITORY.fullmatch(path):
            do = "check the path; a repository of the Hub is named org/name"
            if path.startswith("~"):
                do = "pass os.path.expanduser(path): a shell expands ~, and this package does not"
            raise checkpoint_error("no such checkpoint", where=path, do=do)
        return find_repository(path, revision)
    except CheckpointError as error:
        similar = _similar_paths(path)
        if similar:
            error.add("  similar:\n" + listing(similar))
        raise


def _similar_paths(path: str) -> list[str]:
    """Return up to three paths with similar last names in the parent directory of a path that does not exist."""
    parent, name = os.path.split(path.rstrip("/"))
    try:
        names = system.list_names(parent or os.curdir)
    except (OSError, ValueError):  # there is no such directory, or no directory can have this name
        return []
    return [os.path.join(parent, other) for other in difflib.get_close_matches(name, names, 3)]


def _open(chosen: Chosen) -> Checkpoint:
    refuse_absent(absent_files(chosen), chosen, chosen.directory)
    sources = tuple(map(LocalFile, chosen.files))
    return _merge(chosen, sources, _headers(sources))


def _headers(sources: Sequence[ByteSource]) -> list[Header]:
    if len(sources) == 1:  # starting a thread would take as long
        return [read_header(sources[0])]
    with ThreadPoolExecutor(max_workers=min(_READERS, len(sources))) as pool:
        return list(pool.map(read_header, sources))


def _open_remote(chosen: Chosen, repository: Repository) -> Checkpoint:
    """Return the checkpoint of files that are not on this machine, from their headers only."""
    guesses = dict.fromkeys(chosen.shards, _HEADER_GUESS)
    for name, shard in chosen.index.weight_map.items() if chosen.index else ():
        guesses[shard] += len(name) + _ENTRY_GUESS
    pages = (-(-guess // PAGE_BYTES) * PAGE_BYTES for guess in guesses.values())  # our own headers fill whole pages
    sources = tuple(map(HubFile, map(repository.url, chosen.shards), pages))
    return replace(_merge(chosen, sources, _headers(sources)), is_remote=True)


def _open_by_range(folder: RemoteFolder) -> Checkpoint:
    """Return the checkpoint behind a URL, after reading the headers of all files at the same time."""
    names, small = fetch_small_files(folder)
    chosen = choose_behind_url(folder.url, folder.name, names, small.folder)
    sources = tuple(folder.file(shard, small) for shard in chosen.shards)
    return _merge(chosen, sources, _headers(sources))


def _merge(chosen: Chosen, sources: tuple[ByteSource, ...], headers: list[Header]) -> Checkpoint:
    root, directory, shards, index = chosen
    names = _chain(header.names for header in headers)
    file_ids = _chain([file_id] * len(header.names) for file_id, header in enumerate(headers))
    dtypes = _chain(header.dtypes for header in headers)
    shapes = _chain(header.shapes for header in headers)
    offsets = _chain(header.offsets for header in headers)
    nbytes = _chain(header.nbytes for header in headers)
    metadata = {key: value for header in headers for key, value in header.metadata.items()}
    unindexed: tuple[tuple[str, str], ...] = ()
    if index is not None:
        assigned = list(map(index.weight_map.get, names))
        holders = take(shards, file_ids)
        if assigned != holders or len(names) != len(index.weight_map):
            _check_index(root if is_url(root) else directory, names, holders, index.weight_map)
            keep = [row for row, holder in enumerate(holders) if assigned[row] == holder]
            dropped = [row for row, holder in enumerate(holders) if assigned[row] != holder]
            unindexed = tuple(sorted(((names[row], holders[row]) for row in dropped), key=lambda pair: pair[::-1]))
            names, dtypes, shapes = take(names, keep), take(dtypes, keep), take(shapes, keep)
            file_ids, offsets, nbytes = take(file_ids, keep), take(offsets, keep), take(nbytes, keep)
    position = dict(zip(names, range(len(names)), strict=True))
    index_metadata = None if index is None else index.metadata
    stated = [header.metadata.get(LAYOUT_KEY) for header in headers] + [(index_metadata or {}).get(LAYOUT_KEY)]
    layouts = tuple(dict.fromkeys(layout for layout in stated if isinstance(layout, str)))
    return Checkpoint(
        root,
        directory,
        tuple(source.describe() for source in sources),
        names,
        dtypes,
        shapes,
        file_ids,
        offsets,
        nbytes,
        metadata,
        position,
        index_metadata,
        layouts,
        unindexed,
        sources=sources,
    )


def _with_rows(checkpoint: Checkpoint, rows: list[int]) -> Checkpoint:
    names = take(checkpoint.names, rows)
    return replace(
        checkpoint,
        names=names,
        dtypes=take(checkpoint.dtypes, rows),
        shapes=take(checkpoint.shapes, rows),
        file_ids=take(checkpoint.file_ids, rows),
        offsets=take(checkpoint.offsets, rows),
        nbytes=take(checkpoint.nbytes, rows),
        position=dict(zip(names, range(len(names)), strict=True)),
    )


def _chain(parts: Iterable[list[Item]]) -> list[Item]:
    return list(chain.from_iterable(parts))


def _check_index(directory: str, names: list[str], holders: list[str], weight_map: dict[str, str]) -> None:
    """Raise CheckpointError if a tensor is not in the file that the index assigns to it.

    Args:
        names: names of the tensors in all files; a name may occur in several files.
        holders: name of the file that holds each of ``names``.
    """
    present = set(zip(names, holders, strict=True))
    absent = {name for name, file in weight_map.items() if (name, file) not in present}
    if absent:
        elsewhere = {name: holder for name, holder in zip(names, holders, strict=True) if name in absent}
        wrong = [
            f"{short(name)} in {weight_map[name]}" + (f", which {elsewhere[name]} holds" if name in elsewhere else "")
            for name in sorted(absent)
        ]
        raise checkpoint_error(
            "index and files disagree: tensors are not in the files that the index names",
            where=directory,
            expected="\n" + listing(wrong),
            do="index and files are of different versions: download or write all of them again",
        )
