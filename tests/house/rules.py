"""The rules of the house; each returns its breaches as text: where, what, and what to do."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise
from typing import NamedTuple

from tests.house.source_tree import Import, SourceTree, circles

_ROOM = re.compile(r"`([\w.]+\.py|\w+/)`")
_HEADER = "| level | components |"
DOORS = "public functions (doors):"
"""Start of the description of the storey that holds the doors."""

IMPURE = {
    *("transformers", "safetensors", "huggingface_hub", "fsspec"),
    *("io", "os", "pathlib", "shutil", "tempfile", "mmap", "glob", "fcntl", "ctypes", "subprocess", "socket", "urllib"),
}
"""Packages for files, the network, or models; a pure room imports none of them."""
COLUMNS_AND_NUMBERS = {"Checkpoint", "IOV_MAX", "SMALL_RANGE_BYTES"}
"""Names that pure rooms may import from ``files/``: the table of the headers, and a number of the system."""


class Storeys(NamedTuple):
    """The table of CONTRIBUTING.md, highest storey first."""

    levels: list[list[str]]
    """Rooms of each storey; they do not import each other."""
    doors: list[str]

    @classmethod
    def read(cls, text: str) -> Storeys:
        levels: list[list[str]] = []
        doors: list[str] = []
        for _, rooms, what, *_ in _rows(text):
            levels.append(_ROOM.findall(rooms))
            if what.startswith(DOORS):
                doors += levels[-1]
        return cls(levels, doors)

    @property
    def level_of(self) -> dict[str, int]:
        return {room: number for number, level in enumerate(self.levels) for room in level}


def _rows(text: str) -> Iterator[list[str]]:
    """Yield the cells of each row below the header of the storeys."""
    _, header, below = text.partition(_HEADER)
    if not header:
        raise ValueError(f"CONTRIBUTING.md has no table that begins with {_HEADER!r}")
    for line in below.splitlines()[2:]:
        if not line.startswith("|"):
            return
        yield [cell.strip() for cell in line.strip("|").split("|")]


def circles_of_modules(tree: SourceTree) -> list[str]:
    edges = {(step.importer, step.imported): step for step in tree.inside}
    return _circles(tree, edges, "move what both need to a module below both; a deferred import is a circle too")


def circles_of_rooms(tree: SourceTree) -> list[str]:
    return _circles(tree, tree.arrows, "move what both need to a room below both")


def _circles(tree: SourceTree, edges: Mapping[tuple[str, str], Import], do: str) -> list[str]:
    arrows: dict[str, set[str]] = {}
    for start, stop in edges:
        arrows.setdefault(start, set()).add(stop)
    errors = []
    for way in circles(arrows):
        steps = [_text_of(tree, edges[step]) for step in pairwise(way)]
        errors.append("\n".join([f"a circle: {' -> '.join(way)}", *(f"  {step}" for step in steps), f"  do: {do}"]))
    return errors


def rooms_off_the_table(tree: SourceTree, storeys: Storeys) -> list[str]:
    listed = [room for level in storeys.levels for room in level]
    twice = sorted({room for room in listed if listed.count(room) > 1})
    return [
        *(
            f"{room} is not in CONTRIBUTING's levels. do: add it to its level"
            for room in sorted(tree.rooms - {*listed})
        ),
        *(f"{room} of CONTRIBUTING's levels does not exist. do: remove it" for room in sorted({*listed} - tree.rooms)),
        *(f"{room} is in CONTRIBUTING's levels twice. do: list it once" for room in twice),
    ]


def arrows_up_or_across(tree: SourceTree, storeys: Storeys) -> list[str]:
    level_of, errors = storeys.level_of, []
    for (start, stop), arrow in tree.arrows.items():
        if start in level_of and stop in level_of and level_of[start] >= level_of[stop]:
            way = "across to" if level_of[start] == level_of[stop] else "up to"
            do = f"move what it imports below {start}, or pass it as an argument"
            errors.append(f"an arrow from {start} {way} {stop}\n  {_text_of(tree, arrow)}\n  do: {do}")
    return errors


def doors_on_doors(tree: SourceTree, storeys: Storeys) -> list[str]:
    do = "move what both doors need to a room below them"
    return [
        f"a door uses a door\n  {_text_of(tree, arrow)}\n  do: {do}"
        for (start, stop), arrow in tree.arrows.items()
        if start in storeys.doors and stop in storeys.doors
    ]


def impure(
    tree: SourceTree, rooms: Iterable[str], below: Mapping[str, set[str]], more: Iterable[str] = ()
) -> list[str]:
    """Return the imports of pure rooms that open files or use models.

    Args:
        below: by room, the rooms that it may import, in addition to ``files/`` for columns and numbers.
        more: further packages that these rooms must not import.
    """
    errors = []
    for one in tree.imports:
        room = tree.room(one.importer)
        if room in rooms and not _is_pure(tree, one, room, below, {*IMPURE, *more}):
            do = "do it in upstream/, files/ or execution/, and pass in the result"
            errors.append(f"{room} is pure\n  {_text_of(tree, one)}\n  do: {do}")
    opened = [where for room in rooms for where in tree.calls("open", room)]
    return [*errors, *(f"a file is opened in a pure room\n  {where}\n  do: open it in files/" for where in opened)]


def _is_pure(tree: SourceTree, one: Import, room: str, below: Mapping[str, set[str]], refused: set[str]) -> bool:
    if not tree.is_inside(one.imported):
        return one.imported.partition(".")[0] not in refused
    other = tree.room(one.imported)
    if other == "files/":
        return {*one.taken} <= COLUMNS_AND_NUMBERS
    return other == room or other in below[room]


def asks_transformers(tree: SourceTree, rooms: Iterable[str]) -> list[str]:
    """Return the imports of transformers in other rooms than these."""
    return [
        f"transformers is asked outside of {', '.join(rooms)}\n  {_text_of(tree, one)}\n  do: ask it in upstream/"
        for one in tree.imports
        if one.imported.partition(".")[0] == "transformers" and tree.room(one.importer) not in rooms
    ]


def _text_of(tree: SourceTree, one: Import) -> str:
    taken = f" ({', '.join(one.taken)})" if one.taken else ""
    return f"{one.where(tree.root)} imports {one.imported}{taken}"
