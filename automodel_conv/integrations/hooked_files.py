"""Wrappers of the files that transformers opens under the hook.

A slice records its tensor and its file, and a path records the tensors that the index assigns to the file.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from automodel_conv.files.checkpoint import Checkpoint
from automodel_conv.files.header import read_header
from automodel_conv.files.shards import LAYOUT_KEY
from automodel_conv.files.source import LocalFile


class IndexedPath(str):
    """The path of a file in an index, with the tensors that the index assigns to it."""

    assigned: frozenset[str]
    """Names of the tensors that the index assigns to the file."""
    ignored: dict[str, list[str]]
    """Names of the tensors in a file that the index does not assign to it, by file name. All paths of a load share this
    dictionary, and opening a file adds its entry."""


def wrap_index_reader(list_files: Callable[..., Any], is_on: Callable[[], bool]) -> Callable[..., Any]:
    """Wrap transformers' reader of an index, so that its paths record the tensors that the index assigns to them.

    transformers itself loads every tensor in these files, and the later of two with the same name. Source: transformers
    5.24.0, ``utils/hub.py`` and ``_load_pretrained_model`` in ``modeling_utils.py``.
    """

    @functools.wraps(list_files)
    def list_indexed(*args: Any, **kwargs: Any) -> Any:
        paths, metadata = list_files(*args, **kwargs)
        if not is_on():
            return paths, metadata
        assigned: dict[str, set[str]] = {}
        for name, file in metadata["weight_map"].items():
            assigned.setdefault(file, set()).add(name)
        files = [IndexedPath(path) for path in paths]
        ignored: dict[str, list[str]] = {}
        for file, (_, names) in zip(files, sorted(assigned.items()), strict=True):
            file.assigned, file.ignored = frozenset(names), ignored
        return files, metadata

    return list_indexed


class Slice:
    """A lazy slice of safetensors that records its tensor, its file, and the layout of experts that the file states."""

    def __init__(self, lazy: Any, file: OpenFile, name: str):
        self._lazy = lazy
        self.path = file.path
        self.indexed = file.indexed
        self.layout = file.layout
        self.name = name

    def __getitem__(self, index: Any) -> Tensor:
        return self._lazy[index]

    def __getattr__(self, attribute: str) -> Any:
        if attribute == "_lazy":  # a copy does not have the attribute yet
            raise AttributeError(attribute)
        return getattr(self._lazy, attribute)


class OpenFile:
    """An open file of safetensors whose slices record their tensor and file.

    If the path is from an index, only the tensors that the index assigns to the file are listed.
    """

    def __init__(self, file: Any, path: Any):
        self._file = file
        self.path = os.path.abspath(os.fspath(path))
        self.indexed = path if isinstance(path, IndexedPath) else None
        self.layout: str | None = (file.metadata() or {}).get(LAYOUT_KEY)

    def keys(self) -> list[str]:
        names = list(self._file.keys())
        if self.indexed is None:
            return names
        assigned = self.indexed.assigned
        self.indexed.ignored[os.path.basename(self.path)] = sorted(name for name in names if name not in assigned)
        return [name for name in names if name in assigned]

    def get_slice(self, name: str) -> Slice:
        return Slice(self._file.get_slice(name), self, name)

    def __enter__(self) -> OpenFile:
        self._file.__enter__()
        return self

    def __exit__(self, *error: Any) -> Any:
        return self._file.__exit__(*error)

    def __getattr__(self, attribute: str) -> Any:
        if attribute == "_file":
            raise AttributeError(attribute)
        return getattr(self._file, attribute)


class SafeOpen:
    """A replacement of ``safe_open`` that returns ``OpenFile``, and also works in ``isinstance`` checks."""

    def __init__(self, safe_open: Any, is_on: Callable[[], bool]):
        functools.update_wrapper(self, safe_open, updated=())
        self._safe_open = safe_open
        self._is_on = is_on

    def __call__(self, filename: Any, *args: Any, **kwargs: Any) -> Any:
        if not self._is_on():  # uninstalled, but another replacement still calls this one
            return self._safe_open(filename, *args, **kwargs)
        return OpenFile(self._safe_open(filename, *args, **kwargs), filename)

    def __instancecheck__(self, thing: Any) -> bool:
        return isinstance(thing, (OpenFile, self._safe_open))


def unindexed_in(state_dict: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """Return name and file name of each tensor in the files of a load that the index does not assign to its file."""
    indexed = (source.indexed for source in state_dict.values() if isinstance(source, Slice))
    ignored = next((file.ignored for file in indexed if file is not None), {})
    return tuple((name, file) for file, names in sorted(ignored.items()) for name in names)


def checkpoint_of(slices: Mapping[str, Slice]) -> Checkpoint:
    """Return a checkpoint of the tensors that these slices are taken from.

    Raises:
        CheckpointError: the header of a file is malformed.
    """
    files = tuple(sorted({source.path for source in slices.values()}))
    sources = {path: LocalFile(path) for path in files}
    headers = {path: read_header(source) for path, source in sources.items()}
    rows = {path: {name: row for row, name in enumerate(header.names)} for path, header in headers.items()}
    file_ids = {path: file_id for file_id, path in enumerate(files)}
    places = [(headers[source.path], rows[source.path][source.name]) for source in slices.values()]
    names = list(slices)
    return Checkpoint(
        path=os.path.commonpath(files) if files else "",
        directory=os.path.dirname(files[0]) if files else "",
        files=files,
        names=names,
        dtypes=[header.dtypes[row] for header, row in places],
        shapes=[header.shapes[row] for header, row in places],
        file_ids=[file_ids[source.path] for source in slices.values()],
        offsets=[header.offsets[row] for header, row in places],
        nbytes=[header.nbytes[row] for header, row in places],
        metadata={},
        position={name: row for row, name in enumerate(names)},
        sources=tuple(sources.values()),
    )
