"""Files in their final places in a directory: their paths, whether they are there, and how to remove them again."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from contextlib import suppress

from automodel_conv.files import system


def inside(directory: str, name: str) -> str:
    """The path of a file that a directory or its folders hold."""
    return os.path.join(directory, *name.split("/"))


def folders_of(names: Iterable[str], directory: str) -> list[str]:
    """The folders of a directory that hold these files, inner ones first."""
    parts = [name.split("/")[:-1] for name in names]
    folders = {os.path.join(directory, *folder[:depth]) for folder in parts for depth in range(1, len(folder) + 1)}
    return sorted(folders, key=len, reverse=True)


def is_placed(directory: str, name: str, identity: list[int]) -> bool:
    """Whether a file is in its place, and is the one that was put there."""
    path = inside(directory, name)
    return system.exists(path) and [*system.identity(path)] == identity


def take_back(directory: str, placed: Mapping[str, list[int]]) -> None:
    """Remove what a commit that failed has put in its place; first what makes it a checkpoint."""
    with suppress(OSError):
        for name in reversed(list(placed)):
            if is_placed(directory, name, placed[name]):
                system.remove(inside(directory, name))
    for folder in folders_of(placed, directory):
        with suppress(OSError):  # others have files in it too
            system.remove_directory(folder)
