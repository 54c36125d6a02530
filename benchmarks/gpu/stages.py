"""The stages, in order, each with its share of the time.

Time that a stage leaves goes to the stages after it.
"""

from __future__ import annotations

import shutil
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import measure
from benchmarks.gpu import candidates, checkpoints, environment, kernels, loading, round_trip, sweep, transfers
from benchmarks.gpu.listening import Limits, Place
from benchmarks.gpu.record import Record, is_wrong
from benchmarks.gpu.working import Task, run_task, run_tasks_together

_MOST_PROCESSES = 8
_COMPILING_SHARE = 0.4
_ENVIRONMENT_S = 60


@dataclass
class Run:
    """One call of the command: its options, and the place for the results of its stages."""

    device: str
    smoke: bool
    tests: str
    layers: int
    root: Path  # temporary
    place: Place
    record: Record
    only: tuple[str, ...] = ()
    written: set[str] = field(default_factory=set)

    @property
    def order(self) -> dict[str, Any]:
        return {"device": self.device, "smoke": self.smoke, "root": str(self.root), "layers": self.layers}

    def processes(self) -> int:
        return min(_MOST_PROCESSES, measure.cores())

    def run_task(self, stage: str, limits: Limits, task: Task) -> None:
        run_task(task, stage, self.record, self.place, limits)


class Stage(NamedTuple):
    """A stage.

    ``share_s``: its share of six minutes. ``silence_s``: longer than any of its cells takes.
    """

    share_s: float
    silence_s: float
    do: Callable[[Run, Limits], None]


def look_around(run: Run) -> None:
    """Record the environment again, except the time of imports.

    If time is short, the stages begin without it.

    Raises:
        SystemExit: the device does not exist, or it is another one than that of the record.
    """
    stage = "environment"
    known = run.record.rows(stage)
    run.record.result["rows"][stage] = [row for row in known if row["cell"] == environment.IMPORTS]
    for cells in environment.TASKS:
        limits = Limits(time.monotonic() + _ENVIRONMENT_S, _ENVIRONMENT_S)
        run.run_task(stage, limits, Task("benchmarks.gpu.environment", run.order, cells))
        _check_device(run, known)
    done = run.record.done(stage)
    for row in known:
        if row["cell"] not in done:
            run.record.add(stage, row)


def _check_device(run: Run, known: list[dict[str, Any]]) -> None:
    before, now = (
        {row["cell"]: row for row in rows}.get("device", {}) for rows in (known, run.record.rows("environment"))
    )
    if is_wrong(now):
        raise SystemExit(f"no device {run.device}: {now['error']}; --smoke tries everything on the CPU")
    if before and now and environment.which(before["found"]) != environment.which(now["found"]):
        run.record.result["rows"]["environment"] = known
        run.record.write()
        raise SystemExit(f"the record is of another device, {before['found']}; name another folder")


def run_tests(run: Run, limits: Limits) -> None:
    count = run.processes()
    order = {**run.order, "tests": run.tests, "huge": False}
    tasks = [Task("benchmarks.gpu.testing", {**order, "share": [k, count]}, None) for k in range(count)]
    run_tasks_together(tasks, "tests", run.record, run.place, limits, quiet=True)
    if not run.record.rows("tests") and "tests" not in run.record.result["left_out"]:
        run.record.note("errors", "tests", f"there is no test in {run.tests}")


def measure_kernels(run: Run, limits: Limits) -> None:
    run.run_task("kernels", limits, Task("benchmarks.gpu.kernels", run.order, tuple(kernels.cells(run.smoke))))


def try_candidates(run: Run, limits: Limits) -> None:
    cells = sweep.cells(run.smoke)
    alone = {name: cell.candidate for name, cell in cells.items() if cell.candidate.own_process}
    groups = [[name for name in cells if name not in alone]]
    groups += [[n for n, of in alone.items() if of is c] for c in candidates.CANDIDATES if c in alone.values()]
    compiling = {**run.order, "compiles_only": True}
    now = time.monotonic()
    soon = limits._replace(deadline=now + _COMPILING_SHARE * (limits.deadline - now))
    count = 1 if run.smoke else run.processes()
    # Few candidates need a process of their own.
    shares = [groups[0][k::count] for k in range(count)] + groups[1:]
    tasks = [Task("benchmarks.gpu.sweep", compiling, tuple(share)) for share in shares if share]
    run_tasks_together(tasks, "compilation", run.record, run.place, soon, quiet=True)
    run.record.result["left_out"].pop("compilation", None)  # they are compiled when they are timed
    broken = {row["cell"] for row in run.record.rows("compilation") if is_wrong(row)}
    order = {**run.order, "compiles_only": False}
    for layer in dict.fromkeys(cell.layer for cell in cells.values()):
        for group in groups:
            names = tuple(name for name in group if cells[name].layer == layer and name not in broken)
            run.run_task("sweep", limits, Task("benchmarks.gpu.sweep", order, names))


def measure_transfers(run: Run, limits: Limits) -> None:
    reads = tuple(transfers.READS)
    known = transfers.cells(str(run.root), run.smoke, torch.device("cpu"))
    rest = tuple(name for name in known if name not in reads)
    run.run_task("transfers", limits, Task("benchmarks.gpu.transfers", run.order, rest))
    reads = ready(run, limits, "transfers", dict.fromkeys(reads, (checkpoints.SHORT,)))
    run.run_task("transfers", limits, Task("benchmarks.gpu.transfers", run.order, reads))


def measure_loads(run: Run, limits: Limits) -> None:
    known = loading.loadings(run.smoke)
    groups: dict[str, list[str]] = {}
    for name, one in known.items():
        groups.setdefault(one.group or name, []).append(name)
    for group in groups.values():
        cells = ready(run, limits, "loads", {name: known[name].needs for name in group})
        # An empty cache, so that kernels are compiled.
        cold = {"TRITON_CACHE_DIR": str(run.root / "triton-cache")} if known[group[0]].is_cold else {}
        run.run_task("loads", limits, Task("benchmarks.gpu.loading", run.order, cells, cold))
        for row in loading.mark_unequal(run.record.rows("loads")):
            run.record.add("loads", row)


def finish(run: Run, limits: Limits) -> None:
    # The disk need not store the other checkpoints any longer.
    for name in checkpoints.checkpoints(run.layers, run.smoke).keys() - {checkpoints.SHORT}:
        shutil.rmtree(run.root / name, ignore_errors=True)
    run.written &= {checkpoints.SHORT}
    cells = ready(run, limits, "round trip", dict.fromkeys(round_trip.CELLS, (checkpoints.SHORT,)))
    run.run_task("round trip", limits, Task("benchmarks.gpu.round_trip", run.order, cells))
    order = {**run.order, "tests": run.tests, "huge": True, "share": [0, 1]}
    run.run_task("huge tests", limits, Task("benchmarks.gpu.testing", order, None))


STAGES = {
    "tests": Stage(45, 60, run_tests),
    "kernels": Stage(70, 40, measure_kernels),
    "sweep": Stage(60, 40, try_candidates),
    "transfers": Stage(25, 60, measure_transfers),
    "loads": Stage(105, 90, measure_loads),
    "round trip": Stage(45, 60, finish),
}


def ready(run: Run, limits: Limits, stage: str, needs: Mapping[str, Iterable[str]]) -> tuple[str, ...]:
    """Return the cells that still must run and have their checkpoints, which are written now if necessary.

    All other cells that still must run are listed as left out.
    """
    done = run.record.done(stage)
    todo = {cell: names for cell, names in needs.items() if cell not in done}
    if todo:
        need(run, limits, dict.fromkeys(name for names in todo.values() for name in names))
    lacking = [cell for cell, names in todo.items() if not run.written.issuperset(names)]
    if lacking:
        run.record.leave_out(stage, lacking)
    return tuple(cell for cell in todo if cell not in lacking)


def need(run: Run, limits: Limits, names: Iterable[str]) -> None:
    """Write the checkpoints of these names that do not exist yet.

    A temporary directory starts empty.

    A checkpoint that failed is not tried again; one that was interrupted is.
    """
    stage = "checkpoints"
    # Tiny ones all at once, because starting a process takes most of the time.
    wanted = checkpoints.checkpoints(run.layers, run.smoke) if run.smoke else dict.fromkeys(names)
    failed = {row["cell"] for row in run.record.rows(stage) if is_wrong(row)}
    missing = tuple(name for name in wanted if name not in run.written | failed)
    run.record.forget(stage, missing)
    run.run_task(stage, limits, Task("benchmarks.gpu.checkpoints", run.order, missing))
    run.written |= {row["cell"] for row in run.record.rows(stage) if row["cell"] in missing and not is_wrong(row)}


def run_all(run: Run, seconds: float, say: Callable[[str], None]) -> None:
    """Run every requested stage, regardless of the result of the one before."""
    start = time.monotonic()
    look_around(run)
    todo = [name for name in STAGES if not run.only or name in run.only]
    for number, name in enumerate(todo):
        began = time.monotonic()
        left_s = seconds - (began - start)
        share = STAGES[name].share_s / sum(STAGES[later].share_s for later in todo[number:])
        limits = Limits(began + left_s * share, STAGES[name].silence_s)
        say(f"[{began - start:4.0f} s] {name}, at most {left_s * share:.0f} s")
        try:
            STAGES[name].do(run, limits)
        except Exception:  # measure what still can be measured: this machine may not come back
            run.record.note("errors", name, traceback.format_exc()[-2000:])
        run.record.note("stages_s", name, round(time.monotonic() - began, 1))
    run.record.write()
