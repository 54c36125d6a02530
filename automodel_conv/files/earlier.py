"""Take over what earlier work left in a directory: go on with it, discard it, or refuse."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from automodel_conv.errors import DestinationError, listing, message
from automodel_conv.files import system
from automodel_conv.files.journal import Earlier, note
from automodel_conv.files.placed import is_placed, take_back
from automodel_conv.files.shards import Shard, is_checkpoint
from automodel_conv.files.staging import JOURNAL_NAME, LOCK_NAME, STAGING_NAME, remove_all


def taken_over(
    earlier: Earlier,
    journal: int,
    directory: str,
    shards: Sequence[Shard],
    work: Mapping[str, Any] | None,
    resume: bool,
    index_name: str,
) -> set[str]:
    """Names of the shards that an earlier work has finished; what cannot be used of it is thrown away.

    Raises:
        DestinationError: see ``open_destination``.
    """
    staging = os.path.join(directory, STAGING_NAME)
    work = None if work is None else json.loads(json.dumps(work))
    finished: set[str] = set()
    if earlier.work is not None and (resume or work is None):
        if earlier.work != work:
            _refuse_other_work(directory, earlier.work, work or {})
        finished = {shard.name for shard in shards if shard.name in earlier.finished and _is_whole(shard, directory)}
    placing = earlier.placing
    if not finished and not any(is_placed(directory, name, placing[name]) for name in list(placing)[-1:]):
        take_back(directory, placing)
    complete = len(finished) == len(shards)
    allowed = finished | ({index_name} if complete else set())
    present = [name for name in system.list_names(directory) if is_checkpoint(name) and name not in allowed]
    if present:
        raise DestinationError(
            message(
                "the directory holds a checkpoint already",
                where=directory,
                found="\n" + listing(present),
                do="choose another directory, or remove these files first",
            )
        )
    if not finished:
        system.truncate(journal, 0)
        note(journal, {"work": work})
    for name in sorted(earlier.finished - finished) if finished else ():
        note(journal, {"again": name})  # before it has its size again, but not its bytes
    for name in system.list_names(staging):
        if name not in (LOCK_NAME, JOURNAL_NAME, *finished):
            remove_all(os.path.join(staging, name))
    return finished


def _refuse_other_work(directory: str, begun: Mapping[str, Any], work: Mapping[str, Any]) -> None:
    differences = list(_differences("", begun, work))
    raise DestinationError(
        message(
            "the directory holds an unfinished work that is not this one",
            where=os.path.join(directory, STAGING_NAME),
            expected="\n" + listing(f"{key}: {_short(was)}" for key, was, _ in differences),
            found="\n" + listing(f"{key}: {_short(now)}" for key, _, now in differences),
            do=["finish it as it was begun", "start anew with {resume=False}", "remove that folder"],
        )
    )


def _differences(key: str, was: Any, now: Any) -> Iterator[tuple[str, Any, Any]]:
    """Keys of objects, and of objects in them, whose values differ."""
    if isinstance(was, dict) and isinstance(now, dict):
        for inner in sorted({*was, *now}):
            yield from _differences(f"{key}, {inner}" if key else inner, was.get(inner), now.get(inner))
    elif was != now:
        yield key, was, now


def _short(value: object, limit: int = 200) -> str:
    text = str(value)
    return text if len(text) <= limit else text[:limit] + "..."


def _is_whole(shard: Shard, directory: str) -> bool:
    places = (os.path.join(directory, STAGING_NAME, shard.name), os.path.join(directory, shard.name))
    return any(system.is_file(path) and system.identity(path)[0] == shard.nbytes for path in places)
