"""Checksums of the tensors of a checkpoint: compute them, write them next to the index, and verify them.

The file format is this package's own: ``{"algorithm": "crc32", "tensors": {name: eight hexadecimal digits}}``. Each
checksum covers the bytes of a tensor in its file, so it stays valid if the tensor moves to another file. Checksums
detect damage by disks and networks, not deliberate changes.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Sequence
from functools import partial

from automodel_conv.errors import VerificationError, listing, message
from automodel_conv.execution.workers import run_in_threads
from automodel_conv.files import system
from automodel_conv.files.checkpoint import Checkpoint, rows_by_file
from automodel_conv.files.header import parse_object, read_limited, with_open
from automodel_conv.files.shards import CHECKSUMS_NAME
from automodel_conv.files.source import OpenSource, opened
from automodel_conv.progress import bytes_progress, ignore
from automodel_conv.schedule.requests import LEAST_REQUEST_BYTES

_MOST_BYTES = 500_000_000
_WINDOW_BYTES = 1 << 20
_MOST_THREADS = 16


def checksums_of(checkpoint: Checkpoint, threads: int, advance: Callable[[int], None] = ignore) -> dict[str, str]:
    """Return the checksum of each tensor, by name.

    Files are read one after another, 1 MiB at a time in each thread, by at most 16 threads.

    Args:
        checkpoint: the checkpoint.
        threads: number of threads that read.
        advance: function that is called with each number of bytes read.

    Raises:
        ReadError: a file cannot be read.
    """
    checksums: dict[str, str] = {}
    for source, rows in zip(checkpoint.sources, rows_by_file(checkpoint), strict=True):
        with opened(source) as file:
            start = partial(_checksum_worker, checkpoint, file, checksums, advance)
            run_in_threads(_groups(rows, checkpoint), min(threads, _MOST_THREADS), start, abort=file.abort)
    return {name: checksums[name] for name in checkpoint.names}


def _groups(rows: Sequence[int], checkpoint: Checkpoint) -> list[list[int]]:
    """Return the rows of a file in groups of neighbours, of which one request reads at least 8 MiB."""
    groups: list[list[int]] = []
    nbytes = LEAST_REQUEST_BYTES
    for row in rows:
        if nbytes >= LEAST_REQUEST_BYTES:
            groups.append([])
            nbytes = 0
        groups[-1].append(row)
        nbytes += checkpoint.nbytes[row]
    return groups


def _checksum_worker(
    checkpoint: Checkpoint, file: OpenSource, checksums: dict[str, str], advance: Callable[[int], None]
) -> Callable[[Sequence[int]], None]:
    window = memoryview(bytearray(_WINDOW_BYTES))

    def add_checksums(rows: Sequence[int]) -> None:
        file.expect([(checkpoint.offsets[rows[0]], checkpoint.offsets[rows[-1]] + checkpoint.nbytes[rows[-1]])])
        for row in rows:
            add_checksum(row)

    def add_checksum(row: int) -> None:
        start, nbytes = checkpoint.offsets[row], checkpoint.nbytes[row]
        checksum = 0
        for done in range(0, nbytes, _WINDOW_BYTES):
            part = window[: min(_WINDOW_BYTES, nbytes - done)]
            file.read_into([part], start + done)
            checksum = zlib.crc32(part, checksum)
            advance(len(part))
        checksums[checkpoint.names[row]] = f"{checksum:08x}"

    return add_checksums


def checksums_text(checksums: dict[str, str]) -> bytes:
    """Return the contents of the checksum file."""
    return (json.dumps({"algorithm": "crc32", "tensors": checksums}, indent=2, sort_keys=True) + "\n").encode()


def verify_checksums(checkpoint: Checkpoint, threads: int, progress: bool = False) -> int:
    """Compare all tensors with the checksums next to the checkpoint, and return the bytes that were read.

    Args:
        checkpoint: the checkpoint.
        threads: number of threads that read.
        progress: whether to show a progress bar.

    Raises:
        VerificationError: there is no checksum file, it has an unknown format, or tensors have different bytes or no
            checksum. The error names them.
        CheckpointError: the checksum file is broken.
        ReadError: a file cannot be read.
    """
    path = os.path.join(checkpoint.directory, CHECKSUMS_NAME)
    if not system.is_file(path):
        raise VerificationError(
            message(
                "there are no checksums next to the checkpoint",
                where=path,
                do="{convert_checkpoint(..., checksums=True)} writes them",
            )
        )
    record = parse_object(with_open(path, lambda fd: read_limited(fd, path, _MOST_BYTES)), path)
    expected = record.get("tensors")
    if record.get("algorithm") != "crc32" or not isinstance(expected, dict):
        raise VerificationError(message("the checksum file has an unknown format", where=path))
    with bytes_progress(sum(checkpoint.nbytes), "verifying", progress) as advance:
        actual = checksums_of(checkpoint, threads, advance)
    lines = [f"{name}: no checksum" for name in actual if name not in expected]
    lines += [f"{name}: not in the checkpoint" for name in expected if name not in actual]
    files = dict(zip(checkpoint.names, checkpoint.file_ids, strict=True))
    lines += [
        f"{name} in {checkpoint.files[files[name]]}: {actual[name]} instead of {expected[name]}"
        for name in actual
        if name in expected and actual[name] != expected[name]
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
