"""Run the cells of a stage in workers, one after another.

A worker that dies loses only its current work.

If a worker dies in one of the ways of a cell, that way is marked and a new worker runs the cell again without it. If it
dies elsewhere in a cell, the cell is marked and a new worker continues with the next.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from benchmarks.gpu.listening import Limits, Message, Place, run_worker
from benchmarks.gpu.record import Record, is_wrong
from benchmarks.gpu.tables import row_line

_BARREN = 2


class Task(NamedTuple):
    """Cells that one process runs one after another.

    ``cells`` is None if the worker determines the cells itself. It then receives the names of those already done.
    """

    module: str
    order: Mapping[str, Any]
    cells: tuple[str, ...] | None
    variables: Mapping[str, str] = {}


def run_task(task: Task, stage: str, record: Record, place: Place, limits: Limits, *, quiet: bool = False) -> None:
    """Run the cells of a task that are not done yet.

    In the end each has a row, or is listed as left out.

    Args:
        quiet: many rows come at once. They are written together, and only errors are printed.
    """
    _Work(task, stage, record, place, limits, quiet).run()


def run_tasks_together(
    tasks: list[Task], stage: str, record: Record, place: Place, limits: Limits, *, quiet: bool = False
) -> None:
    """Run several tasks, all at once."""
    with ThreadPoolExecutor(max(1, len(tasks))) as pool:
        for future in [pool.submit(run_task, task, stage, record, place, limits, quiet=quiet) for task in tasks]:
            future.result()


class _Work:
    """A task in progress, and its state."""

    def __init__(self, task: Task, stage: str, record: Record, place: Place, limits: Limits, quiet: bool):
        self._task = task
        self._stage = stage
        self._record = record
        self._place = Place({**place.variables, **task.variables}, place.log)
        self._limits = limits
        self._quiet = quiet
        done = set(record.done(stage))
        # Ordered; None until the cells are known.
        self._todo = None if task.cells is None else dict.fromkeys(c for c in task.cells if c not in done)
        self._without: dict[str, dict[str, str]] = {}
        self._cell: str | None = None
        self._way: str | None = None

    def run(self) -> None:
        barren = 0
        while self._todo is None or self._todo:
            if time.monotonic() >= self._limits.deadline:
                break
            self._cell = self._way = None
            before = self._known()
            why = run_worker(self._task.module, self._order(), self._place, self._limits, self._hear)
            if time.monotonic() >= self._limits.deadline:
                break
            if why is None:
                for cell in list(self._todo or ()):
                    self._add({"cell": cell, "error": "the worker ended without it"})
                return
            if self._cell is not None:
                self._mark(self._cell, why)
            barren = 0 if self._known() != before else barren + 1
            if barren == _BARREN:
                self._record.note("errors", self._stage, why)
                break
        left = ["what the worker would have found to do"] if self._todo is None else list(self._todo)
        if left:
            self._record.leave_out(self._stage, left)

    def _order(self) -> dict[str, Any]:
        done = [] if self._todo is not None else self._record.done(self._stage)
        cells = None if self._todo is None else list(self._todo)
        return {**self._task.order, "cells": cells, "done": done, "without": self._without}

    def _known(self) -> tuple[int, int]:
        """Return two numbers, one of which changes with any progress of a worker: cells left, ways to skip."""
        return -1 if self._todo is None else len(self._todo), sum(map(len, self._without.values()))

    def _hear(self, message: Message) -> None:
        if "cells" in message:
            if self._todo is None:
                self._todo = dict.fromkeys(message["cells"])
        elif "cell" in message:
            self._cell, self._way = message["cell"], None
        elif "way" in message:
            self._way = message["way"]
        elif "row" in message:
            self._cell = self._way = None
            self._add(message["row"])

    def _mark(self, cell: str, why: str) -> None:
        without = self._without.setdefault(cell, {})
        if self._way is None or self._way in without:
            self._add({"cell": cell, "error": why})
        else:
            without[self._way] = why

    def _add(self, row: Mapping[str, Any]) -> None:
        if self._todo is not None:
            self._todo.pop(row["cell"], None)
        self._record.add(self._stage, row, soon=self._quiet)
        if is_wrong(row) or not self._quiet:
            self._record.say(row_line(self._stage, row))
