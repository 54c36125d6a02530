"""Tests of the command with workers that fail, fall silent, take too long, or die."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import measure
from benchmarks.gpu import listening
from benchmarks.gpu.listening import Limits, Place
from benchmarks.gpu.record import Record, left_out, problems
from benchmarks.gpu.worker import BROKEN_EXIT_CODE
from benchmarks.gpu.working import Task, run_task, run_tasks_together

STAGE = "stage"
# A worker that does what the name of a cell says.
WORKER = """
import os, signal, subprocess, sys, time
from benchmarks.gpu.worker import serve

def work(order, channel):
    with open(order["starts"], "a") as file:
        file.write("x")
    if order.get("dies"):
        sys.exit("dead from the start")
    if order["cells"] is None:
        channel.cells(["a", "segfault", "b"])
    for cell in order["cells"] or ["a", "segfault", "b"]:
        if cell in order["done"]:
            continue
        if cell == "sleep":  # with what it started, when it falls silent
            subprocess.Popen(["sleep", order["nap"]])
            with open(order["starts"] + " asleep", "w") as file:
                file.write(str(os.getpid()))
            os.rename(order["starts"] + " asleep", order["starts"] + " sleep")
        channel.begin(cell)
        without = order["without"].get(cell, {})
        print("said on standard output")
        if cell == "segfault":
            os.kill(os.getpid(), signal.SIGSEGV)
        if cell == "exit":
            print("the last words", file=sys.stderr, flush=True)
            os._exit(7)
        if cell == "sleep":
            time.sleep(60)
        if cell == "wait":
            time.sleep(60)
        if cell == "stray":
            channel.row("of another stage")
            os._exit(7)
        if cell == "shout":
            sys.stderr.write(order["shouts"] * 1000)
        if cell == "broken":
            channel.broken("the device is gone")
        if cell == "ways":
            for way in ("one", "two", "three"):
                if way not in without:
                    channel.way(way)
                    if way != "two":
                        os.kill(os.getpid(), signal.SIGSEGV if way == "one" else signal.SIGKILL)
        channel.row(cell, failed=without, value=cell * 2)

# None of these is a message.
sys.stdout.buffer.write(b"a word before its time\\nnull\\n3\\n[4]\\n\\xff\\n")
sys.stdout.flush()
serve(work)
"""
NUMBERS = itertools.count()


class Worker:
    """A module for ``WORKER``, and a sleep time in seconds that no other process on this machine uses."""

    def __init__(self, folder):
        number = f"{os.getpid()}_{next(NUMBERS)}"
        self.name = f"worker_{number}"
        self.starts = folder / "starts"
        self.order = {"starts": str(self.starts), "nap": f"61.{number.replace('_', '0')}", "done": [], "without": {}}
        (folder / f"{self.name}.py").write_text(WORKER)

    def left(self):
        """Return the processes of the worker, and those that it started."""
        return processes_of(self.name) + processes_of("sleep\0" + self.order["nap"])


@pytest.fixture
def worker(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return Worker(tmp_path)


class AfterAll:
    """Limits that begin when the worker sleeps, so that the start of Python does not count."""

    def __init__(self, worker, **limits):
        self._asleep = Path(f"{worker.starts} sleep")  # contains the id of the sleeping process
        self._limits = limits
        self._start = time.monotonic()

    @property
    def deadline(self):
        return self._start + (self._limits.get("seconds", 60) if self._asleep.exists() else 60)

    @property
    def silence_s(self):
        if not self._asleep.exists() or "silence_s" not in self._limits:
            return 60
        is_running = Path(f"/proc/{self._asleep.read_text()}").exists()
        return self._limits["silence_s"] if is_running else 60


@pytest.fixture
def stage(tmp_path, worker):
    """Run cells. Return the content of the record."""

    def work(cells, *, limits=None, **order):
        record = Record.new(tmp_path / "gpu.json")
        limits = limits or Limits(time.monotonic() + 30, 30)
        task = Task(worker.name, {**worker.order, **order}, cells)
        run_task(task, STAGE, record, Place({}, tmp_path / "log"), limits)
        return measure.read_json(str(tmp_path / "gpu.json"))

    return work


def values(result):
    return {row["cell"]: row.get("value") for row in result["rows"].get(STAGE, [])}


def starts(tmp_path):
    return len((tmp_path / "starts").read_text())


def test_cells_are_done_one_after_another_by_one_worker(stage, tmp_path):
    assert values(stage(("a", "b"))) == {"a": "aa", "b": "bb"}
    assert starts(tmp_path) == 1


@pytest.mark.parametrize(
    ("cell", "error"),
    [("segfault", "killed by signal SIGSEGV"), ("exit", "exit code 7"), ("broken", "the device is gone")],
)
def test_cell_that_kills_its_worker_affects_only_itself(stage, tmp_path, cell, error):
    result = stage(("a", cell, "b"))
    assert values(result) == {"a": "aa", cell: None, "b": "bb"}
    [problem] = problems(result)
    assert error in problem
    assert cell != "exit" or "the last words" in problem
    assert starts(tmp_path) == 2


def test_variant_that_kills_its_worker_is_marked_and_skipped(stage):
    result = stage(("a", "ways", "b"))
    assert values(result) == {"a": "aa", "ways": "waysways", "b": "bb"}
    failed = result["rows"][STAGE][1]["failed"]
    assert {way: why.splitlines()[0] for way, why in failed.items()} == {
        "one": "killed by signal SIGSEGV",
        "three": "killed by signal SIGKILL",
    }


def test_worker_that_lists_its_cells_continues_after_a_fault(stage):
    assert values(stage(None)) == {"a": "aa", "segfault": None, "b": "bb"}


def test_silent_cell_is_killed_with_its_children(stage, worker):
    result = stage(("a", "sleep", "b"), limits=AfterAll(worker, silence_s=0.3))
    assert values(result) == {"a": "aa", "sleep": None, "b": "bb"}
    assert "no word for" in problems(result)[0]
    assert not worker.left()


def test_cells_after_the_deadline_are_listed_and_not_wrong(stage, worker):
    result = stage(("a", "sleep", "b"), limits=AfterAll(worker, seconds=0))
    assert values(result) == {"a": "aa"}
    assert [*left_out(result)] == ["stage: sleep", "stage: b"]
    assert problems(result) == []


def test_workers_that_cannot_even_begin_end_the_stage(stage, tmp_path):
    result = stage(("a", "b"), dies=True)
    assert "dead from the start" in result["errors"][STAGE]
    assert starts(tmp_path) == 2
    assert [*left_out(result)] == ["stage: a", "stage: b"]


def test_worker_with_only_unexpected_messages_gets_nowhere(stage, tmp_path):
    result = stage(("stray", "b"))
    assert values(result) == {"of another stage": None}
    assert "exit code 7" in result["errors"][STAGE]
    assert starts(tmp_path) == 2
    assert [*left_out(result)] == ["stage: stray", "stage: b"]


def test_parallel_workers_keep_all_rows_and_separate_logs(tmp_path, worker):
    record = Record.new(tmp_path / "gpu.json")
    tasks = [Task(worker.name, {**worker.order, "shouts": f"{k}"}, (f"{k}", "shout")) for k in range(4)]
    run_tasks_together(tasks, STAGE, record, Place({}, tmp_path / "log"), Limits(time.monotonic() + 30, 30))
    record.write()
    assert len(values(measure.read_json(str(tmp_path / "gpu.json")))) == 5
    log = (tmp_path / "log").read_text()
    assert log.count(f"--- {worker.name}") == 4
    assert all(f"{k}" * 1000 in log for k in range(4))


def test_full_log_grows_no_further(stage, tmp_path, monkeypatch):
    monkeypatch.setattr(listening, "MOST_LOG_BYTES", 1500)
    for shouts in ("x", "y"):
        stage(("shout",), shouts=shouts)
    log = (tmp_path / "log").read_bytes()
    assert b"x" * 1000 in log
    assert b"y" not in log
    assert len(log) <= 1500


LISTENER = """
import json, sys, time
from pathlib import Path
from benchmarks.gpu.listening import Limits, Place, run_worker

order = {**json.loads(sys.argv[2]), "cells": ["a", "sleep"]}
place, limits = Place({}, Path(sys.argv[3])), Limits(time.monotonic() + 60, 60)
run_worker(sys.argv[1], order, place, limits, lambda message: print(message, flush=True))
"""


def test_no_worker_outlives_a_listener_that_is_killed(tmp_path, worker):
    path = os.pathsep.join([str(measure.REPOSITORY), str(tmp_path)])
    listener = subprocess.Popen(
        [sys.executable, "-c", LISTENER, worker.name, json.dumps(worker.order), str(tmp_path / "log")],
        env=os.environ | {"PYTHONPATH": path},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert any("sleep" in line for line in iter(listener.stdout.readline, ""))
        assert soon(lambda: processes_of("sleep\0" + worker.order["nap"]))
    finally:
        listener.send_signal(signal.SIGKILL)
        listener.wait()
        listener.stdout.close()
    assert soon(lambda: not worker.left())


def test_worker_started_by_hand_ends_without_its_group(tmp_path, worker):
    """Its parent is in the same process group, and stays alive."""
    order = json.dumps({**worker.order, "cells": ["wait"]})
    by_hand = f"""
import subprocess, sys
worker = subprocess.Popen([sys.executable, "-m", "{worker.name}"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
worker.stdin.write({order!r}.encode() + b"\\n")
worker.stdin.flush()
while b'"cell"' not in worker.stdout.readline():
    pass
worker.stdin.close()
print("ended with", worker.wait())
"""
    path = os.pathsep.join([str(measure.REPOSITORY), str(tmp_path)])
    run = subprocess.run(
        [sys.executable, "-c", by_hand],
        env=os.environ | {"PYTHONPATH": path},
        stdout=subprocess.PIPE,
        start_new_session=True,
        text=True,
        check=False,
    )
    assert run.stdout == f"ended with {BROKEN_EXIT_CODE}\n"


def soon(is_so):
    for _ in range(100):
        if is_so():
            return True
        time.sleep(0.1)
    return False


def processes_of(text):
    """Return the processes with a text in their command line."""
    lines = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_text()
        except OSError:
            continue
        if text in line and str(os.getpid()) != path.parent.name:
            lines.append(line)
    return lines


def test_file_stays_whole_if_writing_stops(tmp_path, monkeypatch):
    path = tmp_path / "gpu.json"
    measure.write_json(str(path), {"old": 1})
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        measure.write_json(str(path), {"new": 2})
    assert json.loads(path.read_text()) == {"old": 1}


def test_wrong_cells_are_repeated_and_right_ones_kept(tmp_path):
    record = Record.new(tmp_path / "gpu.json")
    record.add(STAGE, {"cell": "right", "value": 1})
    record.add(STAGE, {"cell": "wrong", "wrong": {"ours": "a byte"}})
    record.add(STAGE, {"cell": "failed", "failed": {"theirs": "a fault"}})
    record.add(STAGE, {"cell": "error", "error": "dead"})
    record.leave_out(STAGE, ["late"])
    record.note("errors", STAGE, "no driver")
    assert len(problems(record.result)) == 4
    again = Record.of(tmp_path / "gpu.json")
    assert again.done(STAGE) == ["right"]
    assert problems(again.result) == []
    assert [*left_out(again.result)] == []


def test_row_replaces_the_earlier_row_of_its_cell(tmp_path):
    record = Record.new(tmp_path / "gpu.json")
    for value in (1, 2):
        record.add(STAGE, {"cell": "a", "value": value})
    assert record.rows(STAGE) == [{"cell": "a", "value": 2}]
