"""Choose the files of a checkpoint: the files that its index names, or its only file."""

from __future__ import annotations

import ntpath
import os
import re
from typing import Any, NamedTuple

from automodel_conv.errors import CheckpointError, UnsupportedError, listing, message
from automodel_conv.files import system
from automodel_conv.files.header import checkpoint_error, located, parse_object, read_limited, short, with_open
from automodel_conv.files.shards import DEFAULT_NAMING
from automodel_conv.files.staging import STAGING_NAME

# The index format sets no limit. 500,000 tensors need about 70 MB.
MAX_INDEX_BYTES = 500_000_000
INDEX_NAME = DEFAULT_NAMING.index_name
SINGLE_NAME = DEFAULT_NAMING.file_name(1, 1)
INDEX_SUFFIX = ".safetensors.index.json"
_INDEX = re.compile(r"\.safetensors\.index(\.[^.]+)?\.json\Z")
_SHARD = re.compile(r"-\d+-of-(\d+)\.safetensors\Z")
ADVICE = {
    ".bin": "convert pickled weights: load them with transformers and call save_pretrained",
    ".gguf": "convert GGUF: from_pretrained(..., gguf_file=...) of transformers, then save",
}
for _suffix in (".pt", ".pth", ".ckpt", ".pkl", ".pickle"):
    ADVICE[_suffix] = ADVICE[".bin"]


class Index(NamedTuple):
    """The parts of an index file that this package reads."""

    weight_map: dict[str, str]
    """File name of each tensor name."""
    metadata: dict[str, Any]


class Chosen(NamedTuple):
    """The files that make up a checkpoint."""

    root: str
    """The path that was opened."""
    directory: str
    """Path of the directory that holds the files."""
    shards: list[str]
    """Names of the files in ``directory``."""
    index: Index | None
    """The index that names the files; None for a single file."""

    @property
    def files(self) -> tuple[str, ...]:
        """Paths of the files."""
        return tuple(os.path.join(self.directory, shard) for shard in self.shards)


def choose_files(root: str, variant: str | None = None) -> Chosen:
    """Return the files of the checkpoint at a path: a directory, an index or a single file.

    Args:
        root: the path.
        variant: variant of the files of a directory, as in ``model.fp16.safetensors``; None: those without one.

    Raises:
        CheckpointError: the path holds no finished checkpoint, or its index is malformed.
        UnsupportedError: the weights are in another format than safetensors.
    """
    if not system.is_directory(root):
        return _select_file(root, root)
    if os.path.basename(root) == STAGING_NAME:
        raise _unfinished(os.path.dirname(root))
    try:
        present = system.list_names(root)
    except OSError as error:
        raise checkpoint_error("cannot list a directory", where=root, found=error) from error
    return _select_file(root, os.path.join(root, choose_name(root, present, variant)))


def choose_in_folder(url: str, name: str, copy: str | None) -> Chosen:
    """Return the files of the checkpoint that an index or a single file behind a URL names.

    Args:
        url: URL or name of the folder, for error texts.
        name: name of the index or of the single file.
        copy: path of a copy of the index on this machine; None for a single file.

    Raises:
        CheckpointError, UnsupportedError: see ``choose_files``.
    """
    return _select_file(url, f"{url}/{name}", copy)


def _select_file(root: str, file: str, copy: str | None = None) -> Chosen:
    """Return the files that an index names, or a single file; ``copy`` is the path of the index if it was copied."""
    directory = os.path.dirname(file)
    if file.endswith(".json"):
        index = _read_index(file, copy or file)
        return Chosen(root, directory, sorted(set(index.weight_map.values())), index)
    _refuse_other_formats(file)
    return Chosen(root, directory, [os.path.basename(file)], None)


def refuse_absent(absent: list[str], chosen: Chosen, where: str) -> None:
    """Raise CheckpointError if any of the files of a checkpoint are absent."""
    if absent:
        raise checkpoint_error(
            f"{len(absent)} of {len(chosen.shards)} files of the checkpoint are missing",
            where=where,
            found="\n" + listing(absent),
            do="download or copy the missing files",
        )


def choose_name(directory: str, present: list[str], variant: str | None = None) -> str:
    """Return the name of the index or of the single file among the names in a directory.

    Args:
        directory: path or URL of the directory, for error texts.
        present: the names.
        variant: see ``choose_files``.

    Raises:
        CheckpointError, UnsupportedError: see ``choose_files``.
    """
    if variant is not None:
        return _choose_variant(directory, present, variant)
    indices = [name for name in present if name.endswith(INDEX_SUFFIX)]
    if INDEX_NAME in indices:
        return INDEX_NAME
    if len(indices) == 1:
        return indices[0]
    if indices:
        raise checkpoint_error(
            "more than one index",
            where=directory,
            expected=f"{INDEX_NAME}, or one index",
            found="\n" + listing(indices),
            do="open one of them by its own path",
        )
    singles = [name for name in present if name.endswith(".safetensors")]
    if SINGLE_NAME in singles:
        return SINGLE_NAME
    if len(singles) == 1 and STAGING_NAME not in present:
        shard = _SHARD.search(singles[0])
        if shard is None or int(shard[1]) == 1:
            return singles[0]
    if STAGING_NAME in present:
        raise _unfinished(directory)
    if singles:
        raise checkpoint_error(
            f"the index {INDEX_NAME} is missing",
            where=directory,
            expected="an index that names the files of the checkpoint",
            found="\n" + listing(singles),
            do="download the index, or open one file by its own path",
        )
    foreign = [name for name in present if _advice(name)]
    if foreign:
        raise UnsupportedError(
            message(
                "no safetensors weights, but files of other formats",
                where=directory,
                found="\n" + listing(foreign),
                do=_advice(foreign[0]),
            )
        )
    raise checkpoint_error(
        "no safetensors weights",
        where=directory,
        expected=f"{INDEX_NAME} or {SINGLE_NAME}",
        found="\n" + listing(present) if present else "an empty directory",
        do="check the path: the files may be in a folder below it, or not downloaded yet",
    )


def names_of_variant(variant: str | None) -> tuple[str, str]:
    """Return the names of the index and of the single file of a variant.

    Source: transformers 5.24.0, ``_add_variant`` in ``utils/hub.py``.
    """
    if variant is None:
        return INDEX_NAME, SINGLE_NAME
    return f"{INDEX_NAME.removesuffix('.json')}.{variant}.json", f"model.{variant}.safetensors"


def _choose_variant(directory: str, present: list[str], variant: str) -> str:
    names = names_of_variant(variant)
    for name in names:
        if name in present:
            return name
    weights = [name for name in present if ".safetensors" in name]
    raise checkpoint_error(
        "no files of this variant",
        where=directory,
        expected=" or ".join(names),
        found="\n" + listing(weights) if weights else "no safetensors weights",
        do="leave {variant} out, or name one that exists",
    )


def _unfinished(directory: str) -> CheckpointError:
    return checkpoint_error(
        "no checkpoint yet: a conversion or a save into this directory is not finished",
        where=directory,
        found=f"the folder {STAGING_NAME}",
        do="wait if it still runs; otherwise run the same conversion or save again",
    )


def _advice(file: str) -> str | None:
    return ADVICE.get(os.path.splitext(file)[1].lower())


def _refuse_other_formats(file: str) -> None:
    if not file.endswith(".safetensors"):
        raise UnsupportedError(
            message(
                "these weights are not in the safetensors format",
                where=file,
                expected="a .safetensors file, an index of such files, or a directory of them",
                do=_advice(file),
            )
        )


def _read_index(path: str, copy: str) -> Index:
    if not system.is_file(copy):  # opening a pipe would block until its other end is opened
        raise checkpoint_error("an index that is not a file", where=path, expected="a regular file")
    data = with_open(copy, lambda fd: read_limited(fd, copy, MAX_INDEX_BYTES))
    parsed = parse_object(data, path)
    weight_map, metadata = parsed.get("weight_map"), parsed.get("metadata")
    if "weight_map" not in parsed and not _INDEX.search(path):
        raise checkpoint_error(
            "not an index of a checkpoint",
            where=path,
            expected=f"a directory, a .safetensors file, or an index such as {INDEX_NAME}",
            found=f"{os.path.basename(path)} without weight_map",
            do="pass the directory of the checkpoint",
        )
    if type(weight_map) is not dict or not weight_map:
        raise checkpoint_error(
            "an index without weight_map",
            where=path,
            expected="weight_map, an object from tensor names to file names",
            found=short(weight_map),
            do="copy or download the index again",
        )
    checked: set[str] = set()
    for name, file in weight_map.items():
        if type(file) is str and file in checked:
            continue
        if type(file) is not str or _leaves_directory(file):
            raise checkpoint_error(
                "the index names a file outside of its directory, or no file at all",
                where=located(path, name),
                expected="a file name below the directory of the index",
                found=short(file),
                do="do not trust this checkpoint; if you trust its source, correct the index",
            )
        _refuse_other_formats(os.path.join(os.path.dirname(path), file))
        checked.add(file)
    return Index(weight_map, metadata if type(metadata) is dict else {})


def _leaves_directory(file: str) -> bool:
    """Return whether a file name leads out of its directory.

    Only the name counts. Links are allowed, since a snapshot of the Hub consists of links to files elsewhere.
    """
    parts = re.split(r"[/\\]", file)
    return not parts[0] or bool(ntpath.splitdrive(file)[0]) or ".." in parts or "\0" in file
