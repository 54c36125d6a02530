"""The folder of unfinished work in a directory: its name, its lock and its removal."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress

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
        with locked(staging, directory):
            remove_staging(staging)


@contextmanager
def locked(staging: str, directory: str) -> Iterator[None]:
    """Create the staging folder if necessary, and lock it for this process for the length of a block.

    Args:
        staging: path of the staging folder.
        directory: path of its directory, for the error text.

    Raises:
        DestinationError: another process holds the lock.
        WriteError: the directory cannot be written to.
    """
    # Not filelock.FileLock (4.2.12): Ctrl-C within its acquire or release can leave the descriptor open, and even the
    # lock held until the process ends. It also refuses a lock whose file its holder has just removed.
    path = os.path.join(staging, LOCK_NAME)
    while True:
        with _open_lock(staging, directory) as file:
            with write_errors(directory):
                if not system.lock(file.fileno()):
                    raise DestinationError(
                        message(
                            "another process writes to this directory",
                            where=directory,
                            do="wait until it has finished, or choose another directory",
                        )
                    )
                if not system.is_at(file.fileno(), path):
                    continue  # the process that held the lock has just removed the file
            try:
                yield
            finally:
                system.unlock(file.fileno())
            return


def _open_lock(staging: str, directory: str) -> system.File:
    """Open the lock file, without locking it; see ``locked``."""
    with write_errors(directory):
        while True:
            system.make_directory(staging)
            # Not found: the process that held the lock has just removed the directory.
            with suppress(FileNotFoundError):
                return system.open_append(os.path.join(staging, LOCK_NAME))


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
