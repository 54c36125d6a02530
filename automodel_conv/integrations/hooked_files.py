"""The files that transformers opens under the hook.

A slice knows which tensor of which file it is, and a path knows which tensors the index gives to the file.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from automodel_conv.files.checkpoint import Checkpoint
from automodel_conv.files.header import read_header
from automodel_conv.files.source import LocalFile


class ListedFile(str):
    """The path of a file of an index, which knows the tensors that the index gives to it."""

    given: frozenset[str]
    ignored: dict[str, list[str]]
    """By file name, what lies in a file without being given to it; all files of a load share it, and fill it when they
    are opened."""


def listing_files(list_files: Callable[..., Any], is_on: Callable[[], bool]) -> Callable[..., Any]:
    """transformers' reader of an index, whose paths know what the index gives them.

    transformers itself takes every tensor of these files, and of two with one name the later. Source: transformers
    5.23.0, ``utils/hub.py`` and ``_load_pretrained_model`` in ``modeling_utils.py``.
    """

    @functools.wraps(list_files)
    def listed(*args: Any, **kwargs: Any) -> Any:
        paths, metadata = list_files(*args, **kwargs)
        if not is_on():
            return paths, metadata
        given: dict[str, set[str]] = {}
        for name, file in metadata["weight_map"].items():
            given.setdefault(file, set()).add(name)
        files = [ListedFile(path) for path in paths]
        ignored: dict[str, list[str]] = {}
        for file, (_, names) in zip(files, sorted(given.items()), strict=True):
            file.given, file.ignored = frozenset(names), ignored
        return files, metadata

    return listed


class Slice:
    """safetensors' lazy slice, that also says which tensor of which file it is."""

    def __init__(self, lazy: Any, file: OpenFile, name: str):
        self._lazy = lazy
        self.path = file.path
        self.listed = file.listed
        self.name = name

    def __getitem__(self, index: Any) -> Tensor:
        return self._lazy[index]

    def __getattr__(self, attribute: str) -> Any:
        if attribute == "_lazy":  # of a copy that is not yet filled
            raise AttributeError(attribute)
        return getattr(self._lazy, attribute)


class OpenFile:
    """safetensors' open file, whose slices say where they are from.

    It has the tensors that the index gives to it, where it was found by one, and all of them elsewhere.
    """

    def __init__(self, file: Any, path: Any):
        self._file = file
        self.path = os.path.abspath(os.fspath(path))
        self.listed = path if isinstance(path, ListedFile) else None

    def keys(self) -> list[str]:
        names = list(self._file.keys())
        if self.listed is None:
            return names
        given = self.listed.given
        self.listed.ignored[os.path.basename(self.path)] = sorted(name for name in names if name not in given)
        return [name for name in names if name in given]

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


class Opening:
    """``safe_open``, whose files say where their slices are from; ``isinstance`` takes it for the class it replaces."""

    def __init__(self, safe_open: Any, is_on: Callable[[], bool]):
        functools.update_wrapper(self, safe_open, updated=())
        self._safe_open = safe_open
        self._is_on = is_on

    def __call__(self, filename: Any, *args: Any, **kwargs: Any) -> Any:
        if not self._is_on():  # uninstalled, under somebody else's replacement
            return self._safe_open(filename, *args, **kwargs)
        return OpenFile(self._safe_open(filename, *args, **kwargs), filename)

    def __instancecheck__(self, thing: Any) -> bool:
        return isinstance(thing, (OpenFile, self._safe_open))


def unindexed_in(state_dict: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """Name and file name of what lies in the files of a load, and is not given to them by their index."""
    listed = (source.listed for source in state_dict.values() if isinstance(source, Slice))
    ignored = next((file.ignored for file in listed if file is not None), {})
    return tuple((name, file) for file, names in sorted(ignored.items()) for name in names)


def checkpoint_of(slices: Mapping[str, Slice]) -> Checkpoint:
    """The places of these tensors.

    Raises:
        CheckpointError: the header of a file is broken.
    """
    files = tuple(sorted({source.path for source in slices.values()}))
    sources = {path: LocalFile(path) for path in files}
    headers = {path: read_header(source) for path, source in sources.items()}
    rows = {path: {name: row for row, name in enumerate(header.names)} for path, header in headers.items()}
    number = {path: file for file, path in enumerate(files)}
    places = [(headers[source.path], rows[source.path][source.name]) for source in slices.values()]
    names = list(slices)
    return Checkpoint(
        path=os.path.commonpath(files) if files else "",
        directory=os.path.dirname(files[0]) if files else "",
        files=files,
        names=names,
        dtypes=[header.dtypes[row] for header, row in places],
        shapes=[header.shapes[row] for header, row in places],
        file_ids=[number[source.path] for source in slices.values()],
        offsets=[header.offsets[row] for header, row in places],
        nbytes=[header.nbytes[row] for header, row in places],
        metadata={},
        position={name: row for row, name in enumerate(names)},
        sources=tuple(sources.values()),
    )
