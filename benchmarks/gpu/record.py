"""All results, in one file that is complete at every moment.

Rows belong to a stage and are identified by their ``cell``. A row replaces an earlier one of the same cell. A row with
a problem has ``error`` (for the cell as a whole), or ``failed`` or ``wrong`` (by way).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks import measure

NAME = "gpu.json"
_SOON_S = 0.5


class Record:
    """The file's content.

    Several threads may add to it.
    """

    def __init__(self, path: Path, result: dict[str, Any]):
        self.path = path
        self.say: Callable[[str], None] = lambda text: None  # a line for each row
        self.result = result
        self._lock = threading.Lock()
        self._written = 0.0

    @classmethod
    def new(cls, path: Path) -> Record:
        return cls(path, {"runs": [], "stages_s": {}, "left_out": {}, "errors": {}, "rows": {}})

    @classmethod
    def of(cls, path: Path) -> Record:
        """Return the record of an earlier run, without the rows that must be run again."""
        result = measure.read_json(str(path))
        result |= {"left_out": {}, "errors": {}}
        for stage, rows in result["rows"].items():
            result["rows"][stage] = [row for row in rows if not is_wrong(row)]
        return cls(path, result)

    def rows(self, stage: str) -> list[dict[str, Any]]:
        return self.result["rows"].get(stage, [])

    def done(self, stage: str) -> list[str]:
        return [row["cell"] for row in self.rows(stage)]

    def add(self, stage: str, row: Mapping[str, Any], *, soon: bool = False) -> None:
        """Keep a row.

        ``soon``: many rows come at once, and are written together.
        """
        with self._lock:
            rows = [known for known in self.rows(stage) if known["cell"] != row["cell"]]
            self.result["rows"][stage] = [*rows, dict(row)]
            if not soon or time.monotonic() > self._written + _SOON_S:
                self._write()

    def forget(self, stage: str, cells: Collection[str]) -> None:
        """Forget cells that will run again: their rows, and that they were left out."""
        with self._lock:
            self.result["rows"][stage] = [row for row in self.rows(stage) if row["cell"] not in cells]
            left = [cell for cell in self.result["left_out"].pop(stage, []) if cell not in cells]
            self.result["left_out"] |= {stage: left} if left else {}

    def note(self, part: str, stage: str, what: Any) -> None:
        """Keep something of a stage in addition to its rows: its ``errors``, ``stages_s`` or ``left_out``."""
        with self._lock:
            self.result[part][stage] = what
            self._write()

    def leave_out(self, stage: str, cells: list[str]) -> None:
        """Record cells that were left out for lack of time."""
        with self._lock:
            self.result["left_out"].setdefault(stage, []).extend(cells)
            self._write()

    def write(self, **parts: Any) -> None:
        with self._lock:
            self.result |= parts
            self._write()

    def _write(self) -> None:
        measure.write_json(str(self.path), self.result)
        self._written = time.monotonic()


def is_wrong(row: Mapping[str, Any]) -> bool:
    return bool(row.get("error") or row.get("failed") or row.get("wrong"))


def problems(result: Mapping[str, Any]) -> list[str]:
    """Return every problem, one or more lines each."""
    lines = [f"{stage}: {text}" for stage, text in result["errors"].items()]
    for stage, rows in result["rows"].items():
        for row in filter(is_wrong, rows):
            lines += [f"{stage}: {row['cell']}: {what}" for what in _wrongs(row)]
    return lines


def _wrongs(row: Mapping[str, Any]) -> Iterator[str]:
    if row.get("error"):
        yield row["error"]
    for kind in ("wrong", "failed"):
        yield from (f"{way} is {kind}: {text}" for way, text in row.get(kind, {}).items())


def left_out(result: Mapping[str, Any]) -> Iterable[str]:
    return [f"{stage}: {cell}" for stage, cells in result["left_out"].items() for cell in cells]
