"""Whether a directory could take a checkpoint, looked at without writing to it."""

from __future__ import annotations

import os
from typing import NamedTuple

from automodel_conv.files import system
from automodel_conv.files.shards import is_checkpoint
from automodel_conv.files.staging import STAGING_NAME
from automodel_conv.files.write_errors import write_errors


class DiskSpace(NamedTuple):
    """What a directory has room for."""

    free_bytes: int
    """What may be written; counts what an unfinished work there takes, which goes on or is thrown away."""
    unfinished: bool
    """Whether there is such a work."""
    in_the_way: tuple[str, ...]
    """Names of weights that lie there, and that no unfinished work has put there."""


def disk_space_of(directory: str) -> DiskSpace:
    """Look at a directory, which need not exist.

    Raises:
        WriteError: the system does not let us look.
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
    """The directory, or the one above it that exists."""
    while not system.exists(directory):
        directory = os.path.dirname(directory)
    return directory
