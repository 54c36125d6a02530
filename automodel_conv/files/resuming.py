"""Resume, discard or refuse the work that an earlier process left in a directory."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from automodel_conv.errors import DestinationError, listing, message
from automodel_conv.files import system
from automodel_conv.files.final_files import is_placed, remove_placed
from automodel_conv.files.journal import JournalState, append_record
from automodel_conv.files.shards import Shard, is_checkpoint
from automodel_conv.files.staging import JOURNAL_NAME, LOCK_NAME, STAGING_NAME, remove_all


def resume_or_discard(
    earlier: JournalState,
    journal: int,
    directory: str,
    shards: Sequence[Shard],
    work: Mapping[str, Any] | None,
    resume: bool,
    index_name: str,
) -> set[str]:
    """Return the names of the shards that earlier work has finished, and discard its other files.

    Args:
        earlier: contents of the journal that the earlier work has written.
        journal: descriptor of the journal.
        directory, shards, work, resume, index_name: see ``open_destination``.

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
        remove_placed(directory, placing)
    complete = len(finished) == len(shards)
    allowed = finished | ({index_name} if complete else set())
    present = [name for name in system.list_names(directory) if is_checkpoint(name) and name not in allowed]
    if present:
        raise occupied_error(directory, present)
    if not finished:
        system.truncate(journal, 0)
        append_record(journal, {"work": work})
    for name in sorted(earlier.finished - finished) if finished else ():
        append_record(journal, {"again": name})  # a rewritten file has its full size before all its bytes
    for name in system.list_names(staging):
        if name not in (LOCK_NAME, JOURNAL_NAME, *finished):
            remove_all(os.path.join(staging, name))
    return finished


def occupied_error(directory: str, present: Sequence[str]) -> DestinationError:
    """Return the error for a directory that holds a checkpoint, given the names of its weights and indexes."""
    return DestinationError(
        message(
            "the directory holds a checkpoint already",
            where=directory,
            found="\n" + listing(present),
            do="choose another directory, or remove these files first",
        )
    )


def _refuse_other_work(directory: str, earlier: Mapping[str, Any], work: Mapping[str, Any]) -> None:
    differences = list(_differences("", earlier, work))
    raise DestinationError(
        message(
            "the directory holds unfinished work that differs from this one",
            where=os.path.join(directory, STAGING_NAME),
            expected="\n" + listing(f"{key}: {_short(was)}" for key, was, _ in differences),
            found="\n" + listing(f"{key}: {_short(now)}" for key, _, now in differences),
            do=["repeat the call that began it", "start again with {resume=False}", "remove that folder"],
        )
    )


def _differences(key: str, was: Any, now: Any) -> Iterator[tuple[str, Any, Any]]:
    """Yield the keys, including keys of nested objects, with both values where these differ."""
    if isinstance(was, dict) and isinstance(now, dict):
        for inner in sorted({*was, *now}):
            yield from _differences(f"{key}, {inner}" if key else inner, was.get(inner), now.get(inner))
    elif was != now:
        yield key, was, now


def _short(value: object, limit: int = 200) -> str:
    text = str(value)
    return text if len(text) <= limit else text[:limit] + "..."


def _is_whole(shard: Shard, directory: str) -> bool:
    paths = (os.path.join(directory, STAGING_NAME, shard.name), os.path.join(directory, shard.name))
    return any(system.is_file(path) and system.identity(path)[0] == shard.nbytes for path in paths)
