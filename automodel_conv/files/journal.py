"""The journal of the work in a directory, from which the work can be resumed after a crash.

Each line is a JSON object of one of these forms:

    {"work": description}   the first line; null if the work cannot be resumed
    {"finished": shard}     the shard is complete on the disk
    {"again": shard}        the shard was finished, but must be written again
    {"placing": {name: [size, modification time]}}   from here on, files are moved into place in this order

The name of a file that accompanies the shards may contain folders, separated by "/".
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

from automodel_conv.files import system
from automodel_conv.files.full_io import read_exactly
from automodel_conv.files.staging import JOURNAL_NAME

# Far more than one line for every file of the largest checkpoint.
_MOST_JOURNAL_BYTES = 64 << 20


class JournalState(NamedTuple):
    """The state of unfinished work that a journal records; empty for a file that is not a journal."""

    work: dict[str, Any] | None
    """JSON description of the work; None if the work cannot be resumed."""
    finished: set[str]
    """Names of the shards that are complete on the disk."""
    verified: set[str]
    """Names of the finished shards that have been compared with their sources."""
    placing: dict[str, list[int]]
    """Size and modification time of each file that was being moved into place, by name and in order."""


_EMPTY = JournalState(None, set(), set(), {})


def read_journal(journal: int) -> JournalState:
    """Return the state that the complete lines record, and truncate an incomplete last line left by a crash."""
    work, finished, verified, placing = None, set(), set(), {}
    for record in read_records(journal) or ():
        match record:
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
            case {"placing": dict(value)} if all(map(is_inside, value)):
                placing = value
            case _:
                return _EMPTY
    return JournalState(work, finished, verified, placing)


def read_records(journal: int) -> list[Any] | None:
    """Return the complete lines, and truncate an incomplete last line left by a crash; None if it is not a journal."""
    nbytes = system.size(journal)
    if nbytes > _MOST_JOURNAL_BYTES:
        return None
    data = bytearray(nbytes)
    read_exactly(journal, [memoryview(data)], 0, JOURNAL_NAME)
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        system.truncate(journal, whole)
    try:
        return [json.loads(line) for line in data[:whole].splitlines()]
    except (ValueError, RecursionError):
        return None


def is_inside(name: str) -> bool:
    """Return whether a relative name stays below its directory."""
    return all(os.path.basename(part) == part and part not in ("", ".", "..") for part in name.split("/"))


def append_record(journal: int, record: Mapping[str, Any]) -> None:
    """Append a line to the journal, and wait until it is on the disk."""
    system.write_end(journal, json.dumps(record).encode() + b"\n")
