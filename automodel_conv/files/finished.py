"""Check by headers whether a folder holds exactly the files that a finished conversion would leave there."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from automodel_conv.errors import ReadError, message
from automodel_conv.files.shards import CHECKSUMS_NAME, Shard, is_checkpoint
from automodel_conv.files.source import ByteSource, LocalFile, opened
from automodel_conv.files.staging import holds_work
from automodel_conv.files.uploads.output_folders import LocalFolder, OutputFolder

_STEP_BYTES = 1 << 20


def is_finished(
    folder: OutputFolder,
    shards: Sequence[Shard],
    texts: Mapping[str, bytes],
    copies: Mapping[str, str],
    checksums: bool,
) -> bool:
    """Return whether a folder holds these files with these headers, and no other weights.

    Args:
        folder: the folder.
        shards: weight files; only sizes and headers are compared.
        texts: contents of small files by name, such as an index or a config.
        copies: paths of the originals by the names of their copies.
        checksums: whether a file of checksums must exist; its contents are not compared.

    Raises:
        ReadError: the folder or a file cannot be read.
    """
    try:
        if holds_work(folder.directory):
            return False
        present = set(folder.names())
        weights = {name for name in present if is_checkpoint(name)}
        expected_names = {shard.name for shard in shards} | {name for name in texts if is_checkpoint(name)}
        if weights != expected_names or (CHECKSUMS_NAME in present) != checksums:
            return False
        beginnings = {shard.name: (shard.header, shard.nbytes) for shard in shards}
        beginnings |= {name: (text, len(text)) for name, text in texts.items()}
        return all(_begins_with(folder, name, text, nbytes) for name, (text, nbytes) in beginnings.items()) and all(
            _is_copy(folder, name, path) for name, path in copies.items()
        )
    except OSError as error:
        raise ReadError(message("cannot read the directory", where=folder.name, found=error)) from error


def _begins_with(folder: OutputFolder, name: str, text: bytes, nbytes: int) -> bool:
    """Return whether a file has this size and begins with this text."""
    return folder.size(name) == nbytes and _read(folder.source(name), 0, len(text)) == text


def _is_copy(folder: OutputFolder, name: str, path: str) -> bool:
    directory, base = os.path.split(path)
    nbytes = LocalFolder(directory).size(base)
    if nbytes is None or folder.size(name) != nbytes:
        return False
    ranges = ((start, min(_STEP_BYTES, nbytes - start)) for start in range(0, nbytes, _STEP_BYTES))
    copy, original = folder.source(name), LocalFile(path)
    return all(_read(copy, start, count) == _read(original, start, count) for start, count in ranges)


def _read(source: ByteSource, offset: int, nbytes: int) -> bytes:
    data = bytearray(nbytes)
    with opened(source) as file:
        file.read_into([memoryview(data)], offset)
    return bytes(data)
