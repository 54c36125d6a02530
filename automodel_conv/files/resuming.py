"""Resume, discard or refuse the work that an earlier process left in a directory."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from automodel_conv.errors import DestinationError, listing, message
from automodel_conv.files import system
from automodel_conv.files.final_files import is_placed, remove_placed
from automodel_conv.files.journal import JournalState, append_record
from automodel_conv.files.shards import Shard, is_checkpoint
from automodel_conv.files.staging import JOURNAL_NAME, LOCK_NAME, STAGING_NAME, remove_all

OPTIONS_KEY = "options"
"""Key of a description of work: the arguments of the call as Python would print them, by name. Work is the same if all
other keys are equal, as an option may have several spellings. Older journals lack it."""


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
        refuse_other_work(staging, earlier.work, work)
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


def _is_same_work(was: Mapping[str, Any], now: Mapping[str, Any] | None) -> bool:
    """Return whether two descriptions are of the same work; options only explain a difference of the other keys."""
    return now is not None and {**was, OPTIONS_KEY: None} == {**now, OPTIONS_KEY: None}


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


def refuse_other_work(staging: str, was: Mapping[str, Any], now: Mapping[str, Any] | None) -> None:
    """Raise DestinationError if unfinished work is of another description than that of this call.

    Args:
        staging: path of the folder of the unfinished work.
        was: description of the unfinished work, read from its journal.
        now: description of the work of this call, as JSON would return it; None: it cannot resume.
    """
    if _is_same_work(was, now):
        return
    raise DestinationError(
        message(
            "the directory holds unfinished work that differs from this one",
            where=staging,
            found="\n" + listing(_difference_lines(was, now)),
            do=["repeat the call that began it", "start again with {resume=False}", "remove that folder"],
        )
    )


def _difference_lines(was: Mapping[str, Any], now: Mapping[str, Any] | None) -> list[str]:
    """Return lines that state how the description of unfinished work differs from that of a call.

    If options differ, lists and digests that differ because of them are not named.
    """
    options = was.get(OPTIONS_KEY)
    if now is None:
        return [f"begun with: {_options_text(options)}", "this call:  a save"]
    now_options = now.get(OPTIONS_KEY)
    names = _keys_that_differ(options, now_options)
    lines = []
    if names and options is not None and now_options is not None:
        lines.append(f"begun with: {_options_text({name: options.get(name) for name in names})}")
        lines.append(f"this call:  {_options_text({name: now_options.get(name) for name in names})}")
    elif not isinstance(options, dict):
        lines.append(f"begun with: {_options_text(options)}")
    for key in sorted({*was, *now} - {OPTIONS_KEY}):
        inner = _keys_that_differ(was.get(key), now.get(key))
        if inner:
            lines.append(f"{key} differ: {_short(', '.join(inner))}")
        elif was.get(key) != now.get(key) and not names:
            lines.append(f"{key} differ")
    return lines


def _options_text(options: Any) -> str:
    """Return recorded options as arguments of a call."""
    if not isinstance(options, dict):
        return "options that are not recorded"
    return ", ".join(f"{name}={_short(value)}" for name, value in options.items())


def _keys_that_differ(was: Any, now: Any) -> list[str]:
    """Return the keys of two objects with different values; none if one of both is not an object."""
    if not isinstance(was, dict) or not isinstance(now, dict):
        return []
    return [key for key in sorted({*was, *now}) if was.get(key) != now.get(key)]


def _short(value: object, limit: int = 200) -> str:
    text = str(value)
    return text if len(text) <= limit else text[:limit] + "..."


def _is_whole(shard: Shard, directory: str) -> bool:
    paths = (os.path.join(directory, STAGING_NAME, shard.name), os.path.join(directory, shard.name))
    return any(system.is_file(path) and system.identity(path)[0] == shard.nbytes for path in paths)
