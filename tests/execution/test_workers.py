"""Tests of threads that process items until all are done, a stop is set, or one of them fails."""

from __future__ import annotations

import gc
import signal
import threading
import time
import weakref
from contextlib import nullcontext

import pytest

from automodel_conv.execution.workers import Stopped, run_concurrently, run_in_threads
from tests.faults import workers


@pytest.mark.parametrize("threads", [1, 3])
def test_items_are_handed_out_until_a_stop(threads):
    stop, taken = threading.Event(), []

    def take(item):
        taken.append(item)
        if item == 5:
            stop.set()
        elif item > 5:
            stop.wait(10)

    with pytest.raises(Stopped):
        run_in_threads(range(100), threads, lambda: take, stop)
    assert set(range(6)) <= set(taken)
    assert len(taken) <= 6 + threads


def test_signal_that_another_thread_receives_ends_all_threads():
    stop, were_stopped = threading.Event(), []

    def work():
        were_stopped.append(stop.wait(20))

    def receive():
        time.sleep(0.2)  # until the main thread waits
        signal.pthread_kill(threading.get_ident(), signal.SIGINT)
        work()

    with pytest.raises(KeyboardInterrupt):
        run_concurrently([receive, work], stop)
    assert were_stopped == [True, True]


@pytest.mark.parametrize("threads", [1, 3])
def test_stop_after_the_last_item_is_none(threads):
    stop, taken = threading.Event(), []

    def take(item):
        taken.append(item)
        if len(taken) == 10:
            stop.set()

    run_in_threads(range(10), threads, lambda: take, stop)
    assert sorted(taken) == list(range(10))


def test_first_error_in_time_is_raised_once_all_have_ended():
    stop, ended, begun = threading.Event(), [], threading.Barrier(3, timeout=10)

    def waits():
        begun.wait()
        stop.wait(10)
        ended.append(threading.current_thread())
        raise RuntimeError("because of the stop")

    def fails():
        begun.wait()
        raise ValueError("the first")

    with pytest.raises(ValueError, match="the first"):
        run_concurrently([waits, fails, waits], stop)
    assert len(ended) == 2
    gc.collect()
    assert workers() == []


def test_threads_come_and_go_as_they_are_wanted():
    wanted, seen = iter([1, 4, 4, 2] + [1] * 100), []

    def take(item):
        time.sleep(0.002)
        seen.append(item)

    most = run_in_threads(range(60), 1, lambda: take, most=4, wanted=lambda: next(wanted))
    assert sorted(seen) == list(range(60))
    assert most == 4


def test_error_of_a_thread_that_came_later_is_raised():
    def take(item):
        if item == 30:
            raise ValueError("thirty")
        time.sleep(0.001)

    with pytest.raises(ValueError, match="thirty"):
        run_in_threads(range(60), 1, lambda: take, most=8, wanted=lambda: 8)


def test_last_item_is_handed_out_while_all_others_are_in_progress():
    all_at_work, last_taken = threading.Barrier(4), threading.Event()

    def take(item):
        if item == 4:
            last_taken.set()
            return
        all_at_work.wait(30)
        if item:
            assert last_taken.wait(10)

    assert run_in_threads(range(5), 4, lambda: take, most=4, wanted=lambda: 4) == 4


def test_few_threads_are_started_for_few_items():
    """Start one thread per item that is left, whichever thread asks, and not as many as are wanted."""
    assert run_in_threads(range(3), 1, lambda: lambda item: None, most=32, wanted=lambda: 32) <= 5


def test_threads_that_the_system_does_not_start_are_done_without(monkeypatch):
    """Threads that are wanted but never start must not end the working ones."""
    seen, stock = [], threading.Thread.start

    def start(thread):
        if seen and thread.name.startswith("automodel_conv"):
            raise RuntimeError("can't start new thread")
        stock(thread)

    monkeypatch.setattr(threading.Thread, "start", start)
    wanted = iter([4] * 10 + [1] * 100)
    run_in_threads(range(60), 1, lambda: seen.append, most=4, wanted=lambda: next(wanted))
    assert sorted(seen) == list(range(60))


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("threads", [1, 3])
def test_memory_of_the_threads_is_free_at_once(threads, fails):
    """Nothing may refer to itself in a circle: memory and files would stay until the next garbage collection."""

    class Memory:
        """A stand-in for what a thread holds."""

    def starter():
        memory = Memory()
        references.append(weakref.ref(memory))

        def take(item):
            if fails and item == 5:
                raise ValueError(f"{memory}")

        return lambda: take

    references: list[weakref.ref[Memory]] = []
    gc.disable()
    try:
        with pytest.raises(ValueError, match="Memory") if fails else nullcontext():
            run_in_threads(range(60), threads, starter(), most=threads + 1, wanted=lambda: threads + 1)
        assert [reference() for reference in references] == [None]
    finally:
        gc.enable()
