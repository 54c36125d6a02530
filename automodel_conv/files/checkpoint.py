"""Open a safetensors checkpoint: its index and the headers of its files, and nothing else.

A repository of the Hub is opened where the cache has all of its files, otherwise from its headers alone; who reads the
data downloads them first (``open_downloaded``).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

from automodel_conv.doors import door
from automodel_conv.errors import listing
from automodel_conv.files import system
from automodel_conv.files.choosing import ADVICE, Chosen, absent_files, refuse_absent, select, select_in
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
from automodel_conv.files.shards import LAYOUT_KEY, PAGE_BYTES
from automodel_conv.files.source import ByteSource, LocalFile

_READERS = 16
# Bytes of a header without its tensors, and bytes that a tensor adds to it beside its name; both are rather too large.
_HEADER_GUESS = 2048
_ENTRY_GUESS = 110
_REPOSITORY = re.compile(r"[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*", re.ASCII)


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """What the headers of a checkpoint say, in columns: a row per tensor, by file, then offset."""

    path: str
    """What was opened, as an absolute path; the local snapshot of a repository."""
    directory: str
    """Absolute path of the directory of its ``config.json``."""
    files: tuple[str, ...]
    """Absolute paths of the files that the index names, sorted by name; or of the one file. URLs, where not all files
    of a repository are on this machine."""
    names: list[str] = field(repr=False)
    dtypes: list[str] = field(repr=False)
    """safetensors codes, the keys of ``dtypes.BITS``."""
    shapes: list[tuple[int, ...]] = field(repr=False)
    """As torch sees them: torch counts F4 in pairs, so its last dimension is half the header's."""
    file_ids: list[int] = field(repr=False)
    """Position in ``files``."""
    offsets: list[int] = field(repr=False)
    """First byte of the tensor's data, from the start of its file."""
    nbytes: list[int] = field(repr=False)
    metadata: dict[str, str] = field(repr=False)
    """``__metadata__`` of all files; where two files share a key, the later file's value."""
    position: dict[str, int] = field(repr=False)
    """Row of each name."""
    index_metadata: dict[str, Any] | None = field(default=None, repr=False)
    """``metadata`` of the index; None without an index."""
    layouts: tuple[str, ...] = field(repr=False, default=())
    """Layouts of experts that files and index name, each once; see ``compiling/marks.py``."""
    unindexed: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    """Name and file name of each tensor that lies in a file of the index without being given to that file, sorted by
    file, then name. They are no part of the checkpoint. Empty without an index."""
    is_remote: bool = False
    """Whether the data is not on this machine: such a checkpoint can be planned for, but not read."""
    sources: tuple[ByteSource, ...] = field(default=(), repr=False)
    """Of each file, where its bytes come from. Not given: from the files on this machine."""

    def __post_init__(self) -> None:
        if not self.sources:
            object.__setattr__(self, "sources", tuple(map(LocalFile, self.files)))

    def left_out(self, rows: Iterable[int]) -> tuple[str, ...]:
        """Names of the tensors of these rows, and of those that lie in its files and are in no row."""
        unindexed = dict.fromkeys(name for name, _ in self.unindexed if name not in self.position)
        return (*(self.names[row] for row in rows), *unindexed)


@door("opening a checkpoint")
def open_checkpoint(path: str | os.PathLike[str], *, revision: str | None = None) -> Checkpoint:
    """Read and check the headers of a safetensors checkpoint; no tensor data is touched.

    Args:
        path: a directory, an index file, one ``.safetensors`` file, or where no such path exists
            ``org/name`` on the Hub. In a directory an index wins over a single file, and files that
            it does not name are not opened. Of a repository that is not whole in the cache only the
            config and the index are downloaded, and the headers are read by range.
        revision: branch, tag or commit of a repository.

    The tensors that the index gives to a file belong to the checkpoint. What else lies in that file does not: it is
    in ``unindexed`` of the result. Without an index all tensors of the one file belong to it.

    Raises:
        CheckpointError: something is missing, unreadable, malformed, or contradicts itself.
        UnsupportedError: the weights are in another format than safetensors.
    """
    place = _find(os.fsdecode(path), revision)
    if isinstance(place, str):
        return _open(select(place))
    chosen = select_in(place, names_in(place))
    return _open_remote(chosen, place) if absent_files(chosen) else _open(chosen)


@door("opening a checkpoint")
def open_downloaded(path: str | os.PathLike[str], *, revision: str | None = None, beside: bool = False) -> Checkpoint:
    """As ``open_checkpoint``, for those who read the data: what the cache lacks of a repository is downloaded.

    Args:
        beside: download the files that go with the weights too.
    """
    place = _find(os.fsdecode(path), revision)
    if isinstance(place, str):
        return _open(select(place))
    names = names_in(place)
    chosen = select_in(place, names)
    download(place, [*chosen.shards, *(filter(is_companion, names) if beside else ())])
    return _open(chosen)


def rows_by_file(checkpoint: Checkpoint) -> list[list[int]]:
    """Of each file, the rows of its tensors."""
    rows: list[list[int]] = [[] for _ in checkpoint.files]
    for row, file in enumerate(checkpoint.file_ids):
        rows[file].append(row)
    return rows


def _find(path: str, revision: str | None) -> str | Repository:
    """The absolute path of what is there, or else the repository of that name."""
    if system.exists(path):
        return os.path.abspath(path)
    if path.endswith((".safetensors", ".json", *ADVICE)) or not _REPOSITORY.fullmatch(path):
        raise checkpoint_error("no such checkpoint", where=path, do="check the path")
    return find_repository(path, revision)


def _open(chosen: Chosen) -> Checkpoint:
    refuse_absent(absent_files(chosen), chosen, chosen.directory)
    sources = tuple(map(LocalFile, chosen.files))
    if len(sources) == 1:  # of which a thread would take as long to start
        return _merge(chosen, sources, [read_header(sources[0])])
    with ThreadPoolExecutor(max_workers=min(_READERS, len(chosen.files))) as pool:
        headers = list(pool.map(read_header, sources))
    return _merge(chosen, sources, headers)


def _open_remote(chosen: Chosen, repository: Repository) -> Checkpoint:
    """From headers alone, of files that are not on this machine."""
    guesses = dict.fromkeys(chosen.shards, _HEADER_GUESS)
    for name, shard in chosen.index.weight_map.items() if chosen.index else ():
        guesses[shard] += len(name) + _ENTRY_GUESS
    pages = (-(-guess // PAGE_BYTES) * PAGE_BYTES for guess in guesses.values())  # which our own headers fill
    sources = tuple(map(HubFile, map(repository.url, chosen.shards), pages))
    with ThreadPoolExecutor(max_workers=min(_READERS, len(sources))) as pool:
        headers = list(pool.map(read_header, sources))
    return replace(_merge(chosen, sources, headers), is_remote=True)


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
        given = list(map(index.weight_map.get, names))
        holders = take(shards, file_ids)
        if given != holders or len(names) != len(index.weight_map):
            _check_index(directory, names, holders, index.weight_map)
            keep = [row for row, holder in enumerate(holders) if given[row] == holder]
            dropped = [row for row, holder in enumerate(holders) if given[row] != holder]
            unindexed = tuple(sorted(((names[row], holders[row]) for row in dropped), key=lambda pair: pair[::-1]))
            names, dtypes, shapes = take(names, keep), take(dtypes, keep), take(shapes, keep)
            file_ids, offsets, nbytes = take(file_ids, keep), take(offsets, keep), take(nbytes, keep)
    position = dict(zip(names, range(len(names)), strict=True))
    of_index = None if index is None else index.metadata
    said = [header.metadata.get(LAYOUT_KEY) for header in headers] + [(of_index or {}).get(LAYOUT_KEY)]
    layouts = tuple(dict.fromkeys(layout for layout in said if isinstance(layout, str)))
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
        of_index,
        layouts,
        unindexed,
        sources=sources,
    )


def _chain(parts: Iterable[list[Item]]) -> list[Item]:
    return list(chain.from_iterable(parts))


def _check_index(directory: str, names: list[str], holders: list[str], weight_map: dict[str, str]) -> None:
    """Raise CheckpointError if a tensor is not in the file that the index gives.

    Args:
        holders: of each of ``names``, the file that it lies in; a name may lie in several.
    """
    there = set(zip(names, holders, strict=True))
    absent = {name for name, file in weight_map.items() if (name, file) not in there}
    if absent:
        elsewhere = {name: holder for name, holder in zip(names, holders, strict=True) if name in absent}
        wrong = [
            f"{short(name)} in {weight_map[name]}" + (f", which {elsewhere[name]} holds" if name in elsewhere else "")
            for name in sorted(absent)
        ]
        raise checkpoint_error(
            "index and files disagree: tensors are not in the files that the index gives",
            where=directory,
            expected="\n" + listing(wrong),
            do="index and files are of different versions: download or write all of them again",
        )
