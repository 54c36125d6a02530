"""Check by headers whether a directory holds exactly the files that a finished conversion would leave there."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from automodel_conv.errors import ReadError, message
from automodel_conv.files import system
from automodel_conv.files.full_io import read_exactly
from automodel_conv.files.shards import CHECKSUMS_NAME, Shard, is_checkpoint
from automodel_conv.files.staging import holds_work

_STEP_BYTES = 1 << 20


def is_finished(
    directory: str,
    shards: Sequence[Shard],
    texts: Mapping[str, bytes],
    copies: Mapping[str, str],
    checksums: bool,
) -> bool:
    """Return whether a directory holds these files with these headers, and no other weights.

    Args:
        directory: path of the directory.
        shards: weight files; only sizes and headers are compared.
        texts: contents of small files by name, such as an index or a config.
        copies: paths of the originals by the names of their copies.
        checksums: whether a file of checksums must exist; its contents are not compared.

    Raises:
        ReadError: the directory or a file cannot be read.
    """
    try:
        if not system.is_directory(directory) or holds_work(directory):
            return False
        present = set(system.list_names(directory))
        weights = {name for name in present if is_checkpoint(name)}
        expected_names = {shard.name for shard in shards} | {name for name in texts if is_checkpoint(name)}
        if weights != expected_names or (CHECKSUMS_NAME in present) != checksums:
            return False
        beginnings = {shard.name: (shard.header, shard.nbytes) for shard in shards}
        beginnings |= {name: (text, len(text)) for name, text in texts.items()}
        return all(
            _begins_with(os.path.join(directory, name), text, nbytes) for name, (text, nbytes) in beginnings.items()
        ) and all(_are_equal(os.path.join(directory, name), path) for name, path in copies.items())
    except OSError as error:
        raise ReadError(message("cannot read the directory", where=directory, found=error)) from error


def _begins_with(path: str, text: bytes, nbytes: int) -> bool:
    """Return whether a file has this size and begins with this text."""
    if not system.is_file(path) or system.identity(path)[0] != nbytes:
        return False
    return _read(path, 0, len(text)) == text


def _are_equal(path: str, other: str) -> bool:
    if not (system.is_file(path) and system.is_file(other)):
        return False
    nbytes = system.identity(path)[0]
    if system.identity(other)[0] != nbytes:
        return False
    ranges = ((start, min(_STEP_BYTES, nbytes - start)) for start in range(0, nbytes, _STEP_BYTES))
    return all(_read(path, start, count) == _read(other, start, count) for start, count in ranges)


def _read(path: str, offset: int, nbytes: int) -> bytes:
    data = bytearray(nbytes)
    with system.open_readonly(path) as file:
        read_exactly(file.fileno(), [memoryview(data)], offset, path)
    return bytes(data)
