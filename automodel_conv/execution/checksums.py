"""Checksums of tensors as they lie in files: written beside a checkpoint's index, and checked before it is read.

The file is this package's own: ``{"algorithm": "crc32", "tensors": {name: eight hexadecimal digits}}``, each over the
bytes of a tensor in its file, so that it holds wherever the tensors are moved to. They find what disks and networks do
to bytes, not what somebody does on purpose.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable
from functools import partial

from automodel_conv.errors import VerificationError, listing, message
from automodel_conv.execution.workers import run_in_threads
from automodel_conv.files import system
from automodel_conv.files.checkpoint import Checkpoint, rows_by_file
from automodel_conv.files.header import parse_object, read_limited, with_open
from automodel_conv.files.shards import CHECKSUMS_NAME
from automodel_conv.files.source import OpenSource, opened

_MOST_BYTES = 500_000_000
_WINDOW_BYTES = 1 << 20
_MOST_THREADS = 16


def checksums_of(checkpoint: Checkpoint, threads: int) -> dict[str, str]:
    """The checksums of all tensors, read one file after the other, in windows of 1 MiB a thread, of 16 at most.

    Raises:
        ReadError: a file cannot be read.
    """
    found: dict[str, str] = {}
    for source, rows in zip(checkpoint.sources, rows_by_file(checkpoint), strict=True):
        with opened(source) as file:
            start = partial(_summer, checkpoint, file, found)
            run_in_threads(rows, min(threads, _MOST_THREADS), start)
    return {name: found[name] for name in checkpoint.names}


def _summer(checkpoint: Checkpoint, file: OpenSource, found: dict[str, str]) -> Callable[[int], None]:
    window = memoryview(bytearray(_WINDOW_BYTES))

    def take(row: int) -> None:
        start, nbytes = checkpoint.offsets[row], checkpoint.nbytes[row]
        sum_so_far = 0
        for done in range(0, nbytes, _WINDOW_BYTES):
            part = window[: min(_WINDOW_BYTES, nbytes - done)]
            file.read_into([part], start + done)
            sum_so_far = zlib.crc32(part, sum_so_far)
        found[checkpoint.names[row]] = f"{sum_so_far:08x}"

    return take


def checksums_text(checksums: dict[str, str]) -> bytes:
    """The file beside the index."""
    return (json.dumps({"algorithm": "crc32", "tensors": checksums}, indent=2, sort_keys=True) + "\n").encode()


def verify_checksums(checkpoint: Checkpoint, threads: int) -> int:
    """Compare all tensors with the checksums beside the checkpoint; returns the bytes that were read.

    Raises:
        VerificationError: tensors have other bytes, or there are no checksums for all of them; names them.
        CheckpointError: the file of checksums is broken.
        ReadError: a file cannot be read.
    """
    path = os.path.join(checkpoint.directory, CHECKSUMS_NAME)
    if not system.is_file(path):
        raise VerificationError(
            message(
                "no checksums lie beside the checkpoint",
                where=path,
                do="{convert_checkpoint(..., checksums=True)} writes them",
            )
        )
    record = parse_object(with_open(path, lambda fd: read_limited(fd, path, _MOST_BYTES)), path)
    wanted = record.get("tensors")
    if record.get("algorithm") != "crc32" or not isinstance(wanted, dict):
        raise VerificationError(message("not a file of checksums that is known here", where=path))
    found = checksums_of(checkpoint, threads)
    lines = [f"{name}: no checksum" for name in found if name not in wanted]
    lines += [f"{name}: not in the checkpoint" for name in wanted if name not in found]
    files = dict(zip(checkpoint.names, checkpoint.file_ids, strict=True))
    lines += [
        f"{name} in {checkpoint.files[files[name]]}: {found[name]} instead of {wanted[name]}"
        for name in found
        if name in wanted and found[name] != wanted[name]
    ]
    if lines:
        raise VerificationError(
            message(
                f"{len(lines)} tensors do not have the bytes they were written with",
                where=checkpoint.path,
                found="\n" + listing(lines),
                do="copy or download the files again",
            )
        )
    return sum(checkpoint.nbytes)
