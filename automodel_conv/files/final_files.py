"""Files in their final places below a directory: their paths, whether they are in place, and their removal."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from contextlib import suppress

from automodel_conv.files import system


def path_below(directory: str, name: str) -> str:
    """Return the path of a file below a directory, from its relative name with "/" separators."""
    return os.path.join(directory, *name.split("/"))


def folders_of(names: Iterable[str], directory: str) -> list[str]:
    """Return the paths of the folders below a directory that hold these files, inner folders first."""
    parts = [name.split("/")[:-1] for name in names]
    folders = {os.path.join(directory, *folder[:depth]) for folder in parts for depth in range(1, len(folder) + 1)}
    return sorted(folders, key=len, reverse=True)


def is_placed(directory: str, name: str, identity: list[int]) -> bool:
    """Return whether a file is in its place and has the size and modification time that were recorded for it."""
    path = path_below(directory, name)
    return system.exists(path) and [*system.identity(path)] == identity


def remove_placed(directory: str, placed: Mapping[str, list[int]]) -> None:
    """Remove the files that a failed commit moved into place, starting with the file that makes it a checkpoint.

    Args:
        directory: path of the directory.
        placed: size and modification time of each file by relative name, in the order of the commit.
    """
    with suppress(OSError):
        for name in reversed(list(placed)):
            if is_placed(directory, name, placed[name]):
                system.remove(path_below(directory, name))
    for folder in folders_of(placed, directory):
        with suppress(OSError):  # other files are in it too
            system.remove_directory(folder)
