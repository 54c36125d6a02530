"""Whether a directory holds just what a finished work would have left there, as far as headers tell."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from automodel_conv.errors import ReadError, message
from automodel_conv.files import system
from automodel_conv.files.full_io import read_exactly
from automodel_conv.files.shards import CHECKSUMS_NAME, Shard, is_checkpoint
from automodel_conv.files.staging import holds_work

_WINDOW_BYTES = 1 << 20


def is_finished(
    directory: str,
    shards: Sequence[Shard],
    texts: Mapping[str, bytes],
    copies: Mapping[str, str],
    checksums: bool,
) -> bool:
    """Whether a directory has these files with these headers, and no other weights.

    Args:
        texts: whole files by name: an index, a config.
        copies: paths of the files that others are copies of, by name.
        checksums: whether there are checksums, which are not compared.

    Raises:
        ReadError: the system does not let us read there.
    """
    try:
        if not system.is_directory(directory) or holds_work(directory):
            return False
        present = set(system.list_names(directory))
        weights = {name for name in present if is_checkpoint(name)}
        wanted = {shard.name for shard in shards} | {name for name in texts if is_checkpoint(name)}
        if weights != wanted or (CHECKSUMS_NAME in present) != checksums:
            return False
        begins = {shard.name: (shard.header, shard.nbytes) for shard in shards}
        begins |= {name: (text, len(text)) for name, text in texts.items()}
        return all(
            _begins_with(os.path.join(directory, name), text, nbytes) for name, (text, nbytes) in begins.items()
        ) and all(_are_equal(os.path.join(directory, name), path) for name, path in copies.items())
    except OSError as error:
        raise ReadError(message("cannot look at what lies in the directory", where=directory, found=error)) from error


def _begins_with(path: str, text: bytes, nbytes: int) -> bool:
    """Whether a file has this size, and this text at its beginning."""
    if not system.is_file(path) or system.identity(path)[0] != nbytes:
        return False
    return _read(path, 0, len(text)) == text


def _are_equal(path: str, other: str) -> bool:
    if not (system.is_file(path) and system.is_file(other)):
        return False
    nbytes = system.identity(path)[0]
    if system.identity(other)[0] != nbytes:
        return False
    windows = ((at, min(_WINDOW_BYTES, nbytes - at)) for at in range(0, nbytes, _WINDOW_BYTES))
    return all(_read(path, at, count) == _read(other, at, count) for at, count in windows)


def _read(path: str, at: int, nbytes: int) -> bytes:
    fd = system.open_readonly(path)
    try:
        found = bytearray(nbytes)
        read_exactly(fd, [memoryview(found)], at, path)
        return bytes(found)
    finally:
        system.close(fd)
