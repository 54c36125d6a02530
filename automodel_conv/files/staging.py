"""The folder of unfinished work in a directory: its name, its lock and its removal."""

from __future__ import annotations

import os
from contextlib import suppress

from automodel_conv.errors import DestinationError, message
from automodel_conv.files import system
from automodel_conv.files.write_errors import write_errors

STAGING_NAME = "incomplete.automodel_conv"
LOCK_NAME = "lock"
JOURNAL_NAME = "journal.jsonl"
BESIDE_NAME = "beside"


def staged_path(directory: str, name: str) -> str:
    """Where a file of a directory that is written to lies until all are there."""
    return os.path.join(directory, STAGING_NAME, name)


def holds_work(directory: str) -> bool:
    """Whether a directory holds unfinished work, which its journal tells."""
    return system.exists(os.path.join(directory, STAGING_NAME, JOURNAL_NAME))


def remove_remains(directory: str) -> None:
    """Remove what is left of a work that was killed after all of it was done.

    Raises:
        DestinationError: another process writes to the directory.
    """
    staging = os.path.join(directory, STAGING_NAME)
    if system.exists(staging):
        with write_errors(directory):
            lock = locked(staging, directory)
        remove_staging(staging)
        system.close(lock)


def locked(staging: str, directory: str) -> int:
    """The lock file, open and locked."""
    path = os.path.join(staging, LOCK_NAME)
    while True:
        system.make_directory(staging)
        try:
            fd = system.open_append(path)
        except FileNotFoundError:
            continue  # who had it has just finished and removed the directory
        try:
            if not system.lock(fd):
                raise DestinationError(
                    message(
                        "another process writes to this directory",
                        where=directory,
                        do="wait until it has finished, or choose another directory",
                    )
                )
            if system.is_at(fd, path):
                return fd
        except BaseException:
            system.close(fd)
            raise
        system.close(fd)  # likewise


def remove_staging(staging: str) -> None:
    """Remove what is no longer needed; the next work removes what cannot be removed now."""
    with suppress(OSError):
        # The lock, which others look at, is the last.
        for name in sorted(system.list_names(staging), key=lambda name: name == LOCK_NAME):
            remove_all(os.path.join(staging, name))
        system.remove_directory(staging)


def remove_all(path: str) -> None:
    """Remove a file, or a folder with all that is in it; of a link, the link."""
    if system.is_directory(path) and not system.is_link(path):
        for name in system.list_names(path):
            remove_all(os.path.join(path, name))
        system.remove_directory(path)
    else:
        system.remove(path)
