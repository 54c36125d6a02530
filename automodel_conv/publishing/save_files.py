"""Write the parts of a checkpoint other than tensor data: config, headers, checksums and index."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from automodel_conv.execution.checksums import checksums_of, checksums_text
from automodel_conv.execution.writing import create_shard_file
from automodel_conv.files.checkpoint import open_checkpoint
from automodel_conv.files.destination import Destination
from automodel_conv.files.shards import CHECKSUMS_NAME, Naming, Shard, index_of
from automodel_conv.files.write_errors import write_errors
from automodel_conv.progress import ignore
from automodel_conv.upstream.saved_config import write_config


def begin_save(
    destination: Destination, shards: Sequence[Shard], model: nn.Module | None, dtype: torch.dtype | None = None
) -> None:
    """Write the config and the headers of all files, before any data is written."""
    if model is not None:
        with write_errors(destination.directory):
            write_config(model, dtype, destination.staging)
    create_files(destination, shards)


def create_files(destination: Destination, shards: Sequence[Shard]) -> None:
    """Write the headers of files, before any of their data is written."""
    for shard in shards:
        create_shard_file(shard, destination.path(shard.name))


def finish_save(
    destination: Destination,
    shards: Sequence[Shard],
    model: nn.Module | None,
    naming: Naming,
    checksum_threads: int = 0,
) -> None:
    """Write checksums and index, and turn the destination into a checkpoint, once all data is on the disk.

    Args:
        destination: destination that holds the files.
        shards: output files.
        model: saved model; its parameters are counted for the index.
        naming: names of the files, and the layout to record.
        checksum_threads: number of threads that compute checksums; 0: no checksums are written.
    """
    finish_files(destination, shards, checksum_threads)
    commit_save(destination, shards, model, naming, checksum_threads)


def finish_files(destination: Destination, shards: Sequence[Shard], checksum_threads: int = 0) -> None:
    """Finish files once all of their data is on the disk; for ``checksum_threads`` see ``finish_save``."""
    for shard in shards:
        sums = shard_checksums(destination, shard, checksum_threads) if checksum_threads else None
        destination.finish(shard, checksums=sums)


def commit_save(
    destination: Destination,
    shards: Sequence[Shard],
    model: nn.Module | None,
    naming: Naming,
    checksum_threads: int = 0,
) -> None:
    """Write checksums and index of finished files, and turn the destination into a checkpoint; see ``finish_save``."""
    if checksum_threads:
        write_checksums(destination, shards, checksum_threads)
    parameters = None if model is None else sum(parameter.numel() for parameter in model.parameters())
    destination.commit(index_of(shards, parameters, naming))


def write_checksums(
    destination: Destination, shards: Sequence[Shard], threads: int, advance: Callable[[int], None] = ignore
) -> None:
    """Write the file of checksums of all tensors in a destination; for ``advance`` see ``checksums_of``."""
    sums: dict[str, str] = {}
    for shard in shards:
        known = destination.checksums.get(shard.name)
        sums |= shard_checksums(destination, shard, threads, advance) if known is None else known
    destination.write(CHECKSUMS_NAME, checksums_text(sums))


def shard_checksums(
    destination: Destination, shard: Shard, threads: int, advance: Callable[[int], None] = ignore
) -> dict[str, str]:
    """Return the checksums of the tensors in a file that is complete on this machine, by name."""
    return checksums_of(open_checkpoint(destination.finished_path(shard.name)), threads, advance)
