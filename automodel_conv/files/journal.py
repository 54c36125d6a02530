"""The journal of the work in a directory, line by line, so that the work can go on after a crash.

Each line is one of

    {"work": what}          the first line; null: the work cannot go on
    {"finished": shard}     the shard is on the disk, whole
    {"again": shard}        the shard was finished, and has to be written anew
    {"placing": {name: its size and time of change}}   from here on files are put in their places, in this order

The name of a file that goes with the shards may have folders, each before a "/".
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

from automodel_conv.files import system
from automodel_conv.files.full_io import read_exactly
from automodel_conv.files.staging import JOURNAL_NAME

# Far more than a line for every file of any checkpoint.
_MOST_JOURNAL_BYTES = 64 << 20


class Earlier(NamedTuple):
    """What a journal says; nothing, if it is no journal."""

    work: dict[str, Any] | None
    finished: set[str]
    verified: set[str]
    placing: dict[str, list[int]]


_NOTHING = Earlier(None, set(), set(), {})


def read_journal(journal: int) -> Earlier:
    """What the whole lines say; what a crash left of another one is cut off."""
    nbytes = system.size(journal)
    if nbytes > _MOST_JOURNAL_BYTES:
        return _NOTHING
    data = bytearray(nbytes)
    read_exactly(journal, [memoryview(data)], 0, JOURNAL_NAME)
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        system.truncate(journal, whole)
    work, finished, verified, placing = None, set(), set(), {}
    try:
        for line in data[:whole].splitlines():
            match record := json.loads(line):
                case {"work": dict(value)}:
                    work = value
                case {"work": None}:
                    pass
                case {"finished": str(name)}:
                    finished.add(name)
                    (verified.add if record.get("verified") is True else verified.discard)(name)
                case {"again": str(name)}:
                    finished.discard(name)
                    verified.discard(name)
                case {"placing": dict(value)} if all(map(_is_inside, value)):
                    placing = value
                case _:
                    return _NOTHING
    except (ValueError, RecursionError):
        return _NOTHING
    return Earlier(work, finished, verified, placing)


def _is_inside(name: str) -> bool:
    """Whether it names something in a directory or in its folders, and not above them."""
    return all(os.path.basename(part) == part and part not in ("", ".", "..") for part in name.split("/"))


def note(journal: int, record: Mapping[str, Any]) -> None:
    """Add a line, and wait until the disk has it."""
    system.write_end(journal, json.dumps(record).encode() + b"\n")
