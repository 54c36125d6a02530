"""Tests of Ctrl-C: all threads end, all files are closed, and finished files stay."""

from __future__ import annotations

import signal
import threading
import time
from functools import partial
from typing import Any

import pytest

import automodel_conv as amc
from automodel_conv.execution.workers import run_in_threads
from automodel_conv.files.staging import STAGING_NAME
from automodel_conv.schedule import writes
from tests.crash_safety.support import (
    KINDS,
    SIZES,
    arguments_of,
    assert_refused,
    assert_whole_or_refused,
    everything,
    finish,
    new_directory,
)
from tests.faults import replace_calls, workers


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("kind", ["nemo", "transformers"])
def test_ctrl_c_ends_all_threads_and_closes_all_files(forked, source, wanted, tmp_path, kind, when):
    interrupted = 0
    for call in range(1 if when == "before" else 2, 91, 6):
        directory = new_directory(tmp_path / f"{call}", source)
        job = {"signal": "SIGINT", "call": call, "when": when}
        answer = forked.run("convert", arguments=arguments_of(source, directory, kind), **job)
        assert answer["outcome"] in ("KeyboardInterrupt", "done"), answer
        interrupted += answer["outcome"] == "KeyboardInterrupt"
        assert (answer["descriptors"], answer["workers"], answer["later"]) == (0, [], 0)
        assert_whole_or_refused(directory, wanted[kind])
        if answer["outcome"] == "KeyboardInterrupt":
            finish(source, directory, kind, wanted)
    assert interrupted >= 10


@pytest.mark.parametrize("when", ["before", "after"])
def test_interrupted_save_leaves_the_directory_unchanged(forked, source, tmp_path, when):
    interrupted = 0
    for call in range(1 if when == "before" else 2, 66, 4):
        directory = new_directory(tmp_path / f"{call}", source)
        job = {"signal": "SIGINT", "call": call, "when": when}
        answer = forked.run("save", arguments={"directory": str(directory), **SIZES}, **job)
        assert (answer["descriptors"], answer["workers"], answer["later"]) == (0, [], 0)
        if answer["outcome"] == "KeyboardInterrupt":
            interrupted += 1
            left = everything(directory)
            created = {f"{STAGING_NAME}/lock"} if (when, call) == ("after", 2) else set()  # but not locked yet
            assert set(left) <= {"config.json"} | created, left.keys()
    assert interrupted >= 10


def test_interrupt_while_the_main_thread_waits(source, wanted, tmp_path, monkeypatch):
    directory = new_directory(tmp_path / "out", source)
    main = threading.main_thread()
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a shell ignore SIGINT

    def interrupt(number: int, name: str, arguments: tuple[Any, ...]) -> None:
        if number == 5:
            assert threading.current_thread() is not main
            signal.pthread_kill(main.ident or 0, signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(writes, "_SLAB_BYTES", 4096)  # several slabs per file, for several threads
        replace_calls(("copy_range",), before=interrupt, put=patch.setattr)
        assert_refused(
            partial(amc.convert_checkpoint, source, directory, **KINDS["transformers"]),
            KeyboardInterrupt,  # type: ignore[arg-type]
        )
    signal.signal(signal.SIGINT, handler)
    assert not assert_whole_or_refused(directory, wanted["transformers"])
    finish(source, directory, "transformers", wanted)


def test_no_thread_runs_after_an_interrupt_during_its_start(monkeypatch):
    start, working = threading.Thread.start, []

    def interrupted(thread: threading.Thread) -> None:
        start(thread)
        while thread.name.startswith("automodel_conv") and not working:
            time.sleep(0.001)
        if working:
            raise KeyboardInterrupt  # before the pool records this thread

    def take(item: int) -> None:
        working.append(item)
        time.sleep(0.1)
        working.remove(item)

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_in_threads(range(3), 2, lambda: take)
    assert not working
    assert workers() == []
