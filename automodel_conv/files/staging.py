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
COMPANIONS_NAME = "beside"


def staged_path(directory: str, name: str) -> str:
    """Return the path of a file in the staging folder of a directory."""
    return os.path.join(directory, STAGING_NAME, name)


def holds_work(directory: str) -> bool:
    """Return whether a directory holds unfinished work, which has a journal."""
    return system.exists(os.path.join(directory, STAGING_NAME, JOURNAL_NAME))


def remove_leftovers(directory: str) -> None:
    """Remove the staging folder that a process left because it was killed after its work was complete.

    Raises:
        DestinationError: another process writes to the directory.
    """
    staging = os.path.join(directory, STAGING_NAME)
    if system.exists(staging):
        with write_errors(directory):
            lock = acquire_lock(staging, directory)
        remove_staging(staging)
        system.close(lock)


def acquire_lock(staging: str, directory: str) -> int:
    """Create the staging folder, and lock it for this process.

    Args:
        staging: path of the staging folder.
        directory: path of its directory, for the error text.

    Returns:
        The descriptor of the lock file. Closing it releases the lock.

    Raises:
        DestinationError: another process holds the lock.
    """
    path = os.path.join(staging, LOCK_NAME)
    while True:
        system.make_directory(staging)
        try:
            fd = system.open_append(path)
        except FileNotFoundError:
            continue  # the process that held the lock has just removed the directory
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
        system.close(fd)  # the process that held the lock has just removed the file


def remove_staging(staging: str) -> None:
    """Remove the staging folder.

    Files that cannot be removed now are removed when the directory is next opened.
    """
    with suppress(OSError):
        # Other processes look at the lock, so it is removed last.
        for name in sorted(system.list_names(staging), key=lambda name: name == LOCK_NAME):
            remove_all(os.path.join(staging, name))
        system.remove_directory(staging)


def remove_all(path: str) -> None:
    """Remove a file, a link itself, or a folder with its contents."""
    if system.is_directory(path) and not system.is_link(path):
        for name in system.list_names(path):
            remove_all(os.path.join(path, name))
        system.remove_directory(path)
    else:
        system.remove(path)
