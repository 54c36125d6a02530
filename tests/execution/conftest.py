"""Fixtures for all executors: a record of file calls, small jobs, and cases that several files of tests load."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable

import pytest

from automodel_conv.files import system
from automodel_conv.schedule import host as schedule
from tests.execution.device_loads import Case
from tests.execution.support import LAYOUTS, moe, naive, plan_of


class Calls:
    """A counter of the package's file calls. It can delay, fail or shorten reads, which it numbers from 1."""

    def __init__(self) -> None:
        self.nbytes = 0
        self.reads = 0
        self.opened: list[system.File] = []
        self.fail_read = -1
        self.short_bytes = 0
        self.delay: Callable[[int], object] = lambda number: None
        self.lock = threading.Lock()

    @property
    def open(self) -> set[str]:
        """Names of the files that are open."""
        return {file.name for file in self.opened if not file.closed}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    seen = Calls()
    preadv = system.preadv

    def counted(fd: int, views: list[memoryview], offset: int) -> int:
        with seen.lock:
            seen.reads += 1
            number = seen.reads
        seen.delay(number)
        if number == seen.fail_read:
            raise OSError(5, "Input/output error")
        if seen.short_bytes:
            views = [views[0][: 1 + number % seen.short_bytes]]
        count = preadv(fd, views, offset)
        with seen.lock:
            seen.nbytes += count
        return count

    def watched(open_file: Callable[[str], system.File]) -> Callable[[str], system.File]:
        def opened(path: str) -> system.File:
            seen.opened.append(file := open_file(path))
            return file

        return opened

    monkeypatch.setattr(system, "preadv", counted)
    for name in ("open_readonly", "open_append", "open_existing", "create"):
        monkeypatch.setattr(system, name, watched(getattr(system, name)))
    return seen


@pytest.fixture
def small_portions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut jobs to a few hundred bytes, so that a small checkpoint has many."""
    monkeypatch.setattr(schedule, "_LEAST_JOB_BYTES", 256)
    monkeypatch.setattr(schedule, "RUN_BYTES", 256)
    monkeypatch.setattr(schedule, "_SLAB_BYTES", 256)


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    """Return each layout, with and without a cast, over several windows and many chunks, and one with no window."""
    loads = []
    for layout, code in itertools.product(LAYOUTS, ("BF16", "F32")):
        directory = tmp_path_factory.mktemp("case")
        tensors, checkpoint, plan = moe(directory, *LAYOUTS[layout], pad=len(loads) % 3, shape=(7, 18, 26))
        targets = [t._replace(dtype=code) if t.name != "norm" else t for t in plan.targets]
        plan = plan_of(plan.sources, *targets)
        loads.append(Case(checkpoint, plan, naive(plan, tensors)))
    return loads
