"""Check whether a directory has room for a checkpoint, without writing to it."""

from __future__ import annotations

import os
from typing import NamedTuple

from automodel_conv.files import system
from automodel_conv.files.shards import is_checkpoint
from automodel_conv.files.staging import STAGING_NAME
from automodel_conv.files.write_errors import write_errors


class DiskSpace(NamedTuple):
    """Free space of a directory, and the weights that it holds already."""

    free_bytes: int
    """Bytes that can be written. Includes the bytes of unfinished work, which is either resumed or discarded."""
    unfinished: bool
    """Whether the directory holds unfinished work."""
    existing_weights: tuple[str, ...]
    """Names of weight files in the directory that do not belong to unfinished work."""


def disk_space_of(directory: str) -> DiskSpace:
    """Return the free space of a directory, which need not exist.

    Raises:
        WriteError: the directory cannot be listed.
    """
    with write_errors(directory):
        staging = os.path.join(directory, STAGING_NAME)
        unfinished = system.is_directory(staging)
        staged = [os.path.join(staging, name) for name in system.list_names(staging)] if unfinished else []
        names = system.list_names(directory) if system.is_directory(directory) else []
        free = system.free_bytes(_nearest(directory)) + sum(system.identity(path)[0] for path in staged)
    weights = () if unfinished else tuple(filter(is_checkpoint, names))
    return DiskSpace(free, unfinished, weights)


def _nearest(directory: str) -> str:
    """Return the directory, or its nearest parent that exists."""
    while not system.exists(directory):
        directory = os.path.dirname(directory)
    return directory
