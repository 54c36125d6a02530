"""Threads that take what is to be done, until it is done or one of them fails."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import TypeVar

import torch

Item = TypeVar("Item")


class Stopped(Exception):
    """Raised by a load that somebody asked to end."""


def raise_if_stopped(stop: threading.Event | None) -> None:
    """Raise ``Stopped`` if the event is there and set."""
    if stop is not None and stop.is_set():
        raise Stopped


def run_in_threads(
    items: Iterable[Item],
    threads: int,
    start: Callable[[], Callable[[Item], None]],
    stop: threading.Event | None = None,
    *,
    most: int = 0,
    wanted: Callable[[], int] | None = None,
) -> int:
    """Hand each item to one of ``threads`` threads, in order; the first error ends all of them and is raised.

    torch may write to any tensor there, inference tensors too, and starts no threads of its own. A single thread is the
    caller's own, unless others may come.

    Args:
        start: called in each thread; returns what takes the items there.
        stop: set by anybody, no further item is handed out.
        most: threads at the same time, where ``wanted`` is given.
        wanted: how many threads shall work from now on, at least one; asked after each item. None: as many as at
            first. Fewer work where the system starts no more.

    Returns:
        The most threads that worked at the same time.

    Raises:
        Stopped: ``stop`` was set before all items were handed out.
    """
    todo = deque(items)
    ended = threading.Event()
    threads = min(threads, len(todo))
    crew = _ThreadGroup(max(threads, most), ended)
    count = _ThreadCount(threads)

    def goes_on() -> bool:
        if wanted is None:
            return True
        change = count.follow(wanted(), len(todo))
        for started in range(change):
            try:
                crew.start(work)
            except RuntimeError:  # the system starts no more threads: those that work go on
                count.take_back(change - started)
                break
        return change >= 0

    @torch.inference_mode()  # a mode is a thread's own; the caller's tensors may be inference tensors
    def work() -> None:
        torch.set_num_threads(1)
        take = start()
        while not (ended.is_set() or (stop is not None and stop.is_set())):
            try:
                item = todo.popleft()
            except IndexError:
                return
            take(item)
            if not goes_on():
                return

    with _keeping_torch_threads():
        if threads > 1 or (wanted is not None and todo):
            crew.run([work] * threads)
        elif todo:
            work()
    if todo:
        raise_if_stopped(stop)
    return count.most


class _ThreadCount:
    """How many threads work, and the most that did; any number may be started, and only the one that asks ends."""

    def __init__(self, threads: int):
        self.most = self._threads = threads
        self._lock = threading.Lock()

    def follow(self, wanted: int, left: int) -> int:
        """How many threads to start, until there are as many as items left; -1: the one that asks is to end.

        Args:
            wanted: threads, at least one, so that the last one never ends before all is done.
        """
        with self._lock:
            change = max(min(wanted, max(left, self._threads)) - self._threads, -1)
            self._threads += change
            self.most = max(self.most, self._threads)
            return change

    def take_back(self, threads: int) -> None:
        """Some threads could not be started."""
        with self._lock:
            self._threads -= threads


def run_concurrently(works: Sequence[Callable[[], None]], stop: threading.Event) -> None:
    """Run each of ``works`` in a thread of its own, and return when all have ended.

    The first error, or an interrupt of the caller, sets ``stop``, which the works watch, and is raised when they have
    ended. ``stop`` is set in any case then.
    """
    _ThreadGroup(len(works), stop).run(works)


class _ThreadGroup:
    """Threads at work, which may start others; see ``run_concurrently``."""

    def __init__(self, most: int, stop: threading.Event):
        self._stop = stop
        self._at_work: set[int] = set()
        self._change = threading.Condition()
        self._errors: list[BaseException] = []
        self._futures: list[Future[None]] = []
        self._most = most
        self._pool: ThreadPoolExecutor | None = None

    def run(self, works: Iterable[Callable[[], None]]) -> None:
        self._pool = ThreadPoolExecutor(self._most, thread_name_prefix="automodel_conv")
        try:
            for work in works:
                self.start(work)
            # Who starts another one has not ended then, so none is overlooked.
            known = 0
            while known < len(self._futures) and not self._errors:
                known = len(self._futures)
                wait(self._futures[:known], return_when=FIRST_EXCEPTION)
        finally:
            with self._change:  # the pool itself may not know of a thread whose start a signal has interrupted
                self._stop.set()
                self._change.wait_for(lambda: not self._at_work)
            self._pool.shutdown()
        if self._errors:
            raise self._errors[0]

    def start(self, work: Callable[[], None]) -> None:
        """Start one more, unless all are to end. Called by ``run`` or by one at work, so the pool takes it."""
        if self._pool is not None and not self._stop.is_set():
            self._futures.append(self._pool.submit(self._counted, work))

    def _counted(self, work: Callable[[], None]) -> None:
        with self._change:
            if self._stop.is_set():
                return
            self._at_work.add(threading.get_ident())
        try:
            work()
        except BaseException as error:
            self._errors.append(error)
            self._stop.set()
            raise
        finally:
            with self._change:
                self._at_work.remove(threading.get_ident())
                self._change.notify()


class _TorchThreads:
    """The number of torch's threads that works under way will restore, and how many such works there are."""

    lock = threading.Lock()
    under_way = 0
    number = 0

    @classmethod
    def forget(cls) -> None:
        """In a child, which has none of the threads that work or hold the lock."""
        if cls.under_way:
            torch.set_num_threads(cls.number)
        cls.lock, cls.under_way = threading.Lock(), 0


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_TorchThreads.forget)


@contextmanager
def _keeping_torch_threads() -> Iterator[None]:
    """Undo, after the last work under way, that a worker's number of torch threads holds for later threads too."""
    with _TorchThreads.lock:
        if not _TorchThreads.under_way:
            _TorchThreads.number = torch.get_num_threads()
        _TorchThreads.under_way += 1
    try:
        yield
    finally:
        with _TorchThreads.lock:
            _TorchThreads.under_way -= 1
            if not _TorchThreads.under_way:
                torch.set_num_threads(_TorchThreads.number)
