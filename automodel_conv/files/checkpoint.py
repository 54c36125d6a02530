"""Open a safetensors checkpoint by reading its index and the headers of its files.

Files that are not on this machine are read by range: first their headers, and then the bytes that a load needs.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import accumulate, chain
from typing import Any

from typing_extensions import Unpack

from automodel_conv.doors import door, keyword_options
from automodel_conv.errors import count_of, listing
from automodel_conv.files import system
from automodel_conv.files.checkpoint_text import line_of, rows_of
from automodel_conv.files.choosing import Chosen, refuse_absent
from automodel_conv.files.header import Header, Item, checkpoint_error, read_header, short, take
from automodel_conv.files.located import SMALL_NAMES, Located, locate
from automodel_conv.files.paths import text_of_path
from automodel_conv.files.remote.connections import Connections, Traffic
from automodel_conv.files.remote.urls import is_url
from automodel_conv.files.shards import LAYOUT_KEY
from automodel_conv.files.source import ByteSource, LocalFile
from automodel_conv.files.source_options import SourceOptions, SourceSettings
from automodel_conv.pictures.page import table

_LOG = logging.getLogger(__name__)

_READERS = 16


@dataclass(frozen=True, eq=False, repr=False)
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
        sources: source of the bytes of each file. Defaults to the files on this machine.
        traffic: counts of the requests for bytes that are not on this machine; None if all are.
        headers_only: whether plans of it read no tensor data, because that would need further requests.

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
    names: list[str]
    dtypes: list[str]
    shapes: list[tuple[int, ...]]
    file_ids: list[int]
    offsets: list[int]
    nbytes: list[int]
    metadata: dict[str, str]
    position: dict[str, int]
    index_metadata: dict[str, Any] | None = None
    layouts: tuple[str, ...] = ()
    unindexed: tuple[tuple[str, str], ...] = ()
    sources: tuple[ByteSource, ...] = ()
    traffic: Traffic | None = None
    headers_only: bool = False

    def __post_init__(self) -> None:
        if not self.sources:
            object.__setattr__(self, "sources", tuple(map(LocalFile, self.files)))

    def __repr__(self) -> str:
        return line_of(self.path, self.files, self.nbytes)

    def _repr_html_(self) -> str:
        """Return a table of what the checkpoint has, for a notebook."""
        others = len(self.unindexed)
        return table(rows_of(self.path, self.files, self.dtypes, self.nbytes, self.layouts, others))

    @property
    def is_remote(self) -> bool:
        """Whether the bytes of some files come by requests over a network."""
        return any(source.is_remote for source in self.sources)

    def left_out(self, rows: Iterable[int]) -> tuple[str, ...]:
        """Return the names of the tensors in ``rows``, followed by the names in ``unindexed``."""
        unindexed = dict.fromkeys(name for name, _ in self.unindexed if name not in self.position)
        return (*(self.names[row] for row in rows), *unindexed)


@door("opening a checkpoint")
@keyword_options(SourceOptions, SourceSettings)
def open_checkpoint(path: str | os.PathLike[str], **options: Unpack[SourceOptions]) -> Checkpoint:
    """Read and check the headers of a safetensors checkpoint, without reading tensor data.

    The checkpoint consists of the tensors that the index assigns to a file. Other tensors in that file are listed in
    ``unindexed`` of the result. Without an index, all tensors of the single file belong to the checkpoint.

    Args:
        path: a directory, an index file or one ``.safetensors`` file. If no such path exists, ``org/name`` on the Hub.
            In a directory an index takes precedence over a single file, and files that it does not name are not opened.
            Or a URL of a folder, an index or a file: ``hf://org/name@revision``, ``s3://``, ``gs://``, ``https://`` or
            another one that fsspec opens. Files that are not on this machine, or in the Hub's cache, are read by range.
            Only small files, such as the config and the index, are copied: those of a repository to the Hub's cache,
            others to a temporary folder.
        **options: see ``SourceOptions``.

    Returns:
        Names, dtypes, shapes and byte offsets of all tensors, as columns.

    Raises:
        CheckpointError: a file is missing, unreadable or malformed, or the files contradict each other.
        UnsupportedError: the weights are in another format than safetensors, or an option does not fit the path.

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
    checkpoint = open_source(path, SourceSettings(**options))
    return replace(checkpoint, headers_only=checkpoint.is_remote)


def open_source(
    path: str | os.PathLike[str],
    settings: SourceSettings,
    *,
    companions: bool = False,
    whole: bool = False,
    weights: str = "",
    small: Sequence[str] = SMALL_NAMES,
) -> Checkpoint:
    """Open a checkpoint; see ``open_checkpoint``.

    Args:
        path, settings: see ``open_checkpoint``.
        companions: whether files that accompany the weights must be in ``directory`` of the result.
        whole: whether the weights of a repository are downloaded to the Hub's cache first.
        weights, small: see ``locate``.

    Raises:
        CheckpointError, UnsupportedError: see ``open_checkpoint``.
    """
    located = locate(text_of_path(path), settings, companions=companions, whole=whole, weights=weights, small=small)
    return _read(located)


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
    refuse_absent([path for path in paths if not system.is_file(path)], chosen, folder)
    sources = tuple(map(LocalFile, paths))
    headers = [
        header._replace(names=[f"{prefix}{name}" for name in header.names]) if prefix else header
        for header, (_, prefix) in zip(_headers(sources), files, strict=True)
    ]
    checkpoint = _merge(chosen, sources, headers)
    last = checkpoint.position.values()
    return _with_rows(checkpoint, sorted(last, key=lambda row: (checkpoint.file_ids[row], checkpoint.names[row])))


def joined(parts: Sequence[tuple[Checkpoint, str]]) -> Checkpoint:
    """Return several checkpoints as one.

    Tensors are in the order of ``open_files``. Of tensors with one name the last counts.

    Args:
        parts: each checkpoint, and what comes before the names of its tensors.
    """
    first, _ = parts[0]
    starts = list(accumulate((len(part.files) for part, _ in parts), initial=0))
    whole = replace(
        first,
        files=tuple(_chain(list(part.files) for part, _ in parts)),
        sources=tuple(_chain(list(part.sources) for part, _ in parts)),
        names=[f"{prefix}{name}" for part, prefix in parts for name in part.names],
        dtypes=_chain(part.dtypes for part, _ in parts),
        shapes=_chain(part.shapes for part, _ in parts),
        file_ids=[start + file for (part, _), start in zip(parts, starts, strict=False) for file in part.file_ids],
        offsets=_chain(part.offsets for part, _ in parts),
        nbytes=_chain(part.nbytes for part, _ in parts),
        metadata={key: value for part, _ in parts for key, value in part.metadata.items()},
        traffic=next((part.traffic for part, _ in parts if part.traffic is not None), None),
    )
    last = dict(zip(whole.names, range(len(whole.names)), strict=True)).values()
    return _with_rows(whole, sorted(last, key=lambda row: (whole.file_ids[row], whole.names[row])))


def rows_by_file(checkpoint: Checkpoint) -> list[list[int]]:
    """Return the rows of the tensors of each file."""
    rows: list[list[int]] = [[] for _ in checkpoint.files]
    for row, file in enumerate(checkpoint.file_ids):
        rows[file].append(row)
    return rows


def _read(located: Located) -> Checkpoint:
    checkpoint = _merge(located.chosen, located.sources, _headers(located.sources, located.connections))
    tensors, files = count_of(len(checkpoint.names), "tensor"), count_of(len(checkpoint.files), "file")
    _LOG.info("opened %s: %s in %s", checkpoint.path, tensors, files)
    return replace(checkpoint, traffic=located.traffic)


def _headers(sources: Sequence[ByteSource], connections: Connections | None = None) -> list[Header]:
    if len(sources) == 1:  # starting a thread would take as long
        return [read_header(sources[0])]
    with ThreadPoolExecutor(max_workers=min(_READERS, len(sources))) as pool:
        try:
            return list(pool.map(read_header, sources))
        except BaseException:
            if connections is not None:
                connections.stopped.set()
            raise


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
