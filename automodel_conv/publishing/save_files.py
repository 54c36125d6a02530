"""Write what a checkpoint has beside its tensor data: config, headers, checksums and index."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from automodel_conv.execution.checksums import checksums_of, checksums_text
from automodel_conv.execution.writing import create_shard_file
from automodel_conv.files.checkpoint import open_checkpoint
from automodel_conv.files.destination import Destination
from automodel_conv.files.shards import CHECKSUMS_NAME, Form, Shard, index_of
from automodel_conv.files.write_errors import write_errors
from automodel_conv.upstream.saved_config import write_config


def begin_save(
    destination: Destination, shards: Sequence[Shard], model: nn.Module | None, dtype: torch.dtype | None = None
) -> None:
    """Write what goes before all data: the config, and of each file the header."""
    if model is not None:
        with write_errors(destination.directory):
            write_config(model, dtype, destination.staging)
    for shard in shards:
        create_shard_file(shard, destination.path(shard.name))


def finish_save(
    destination: Destination,
    shards: Sequence[Shard],
    model: nn.Module | None,
    form: Form,
    checksum_threads: int = 0,
) -> None:
    """What follows when the data of all files is on the disk; with no threads for checksums there are none."""
    for shard in shards:
        destination.finish(shard)
    if checksum_threads:
        write_checksums(destination, shards, checksum_threads)
    parameters = None if model is None else sum(parameter.numel() for parameter in model.parameters())
    destination.commit(index_of(shards, parameters, form))


def write_checksums(destination: Destination, shards: Sequence[Shard], threads: int) -> None:
    """Add the checksums of all tensors to what lies in a destination."""
    sums: dict[str, str] = {}
    for shard in shards:
        sums |= checksums_of(open_checkpoint(destination.found(shard.name)), threads)
    destination.write(CHECKSUMS_NAME, checksums_text(sums))
