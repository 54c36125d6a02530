"""Threads that take what is to be done, until it is done or one of them fails."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
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


def work_off(
    items: Iterable[Item],
    threads: int,
    start: Callable[[], Callable[[Item], None]],
    stop: threading.Event | None = None,
) -> None:
    """Hand each item to one of ``threads`` threads, in order; the first error ends all of them and is raised.

    torch may write to any tensor there, inference tensors too, and starts no threads of its own. One thread is the
    caller's own.

    Args:
        start: called in each thread; returns what takes the items there.
        stop: set by anybody, no further item is handed out.

    Raises:
        Stopped: ``stop`` was set before all items were handed out.
    """
    todo = deque(items)
    ended = threading.Event()

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

    threads = min(threads, len(todo))
    with _keeping_torch_threads():
        if threads > 1:
            at_once([work] * threads, ended)
        elif todo:
            work()
    if todo:
        raise_if_stopped(stop)


def at_once(works: Sequence[Callable[[], None]], stop: threading.Event) -> None:
    """Run each of ``works`` in a thread of its own, and return when all have ended.

    The first error, or an interrupt of the caller, sets ``stop``, which the works watch, and is raised when they have
    ended. ``stop`` is set in any case then.
    """
    at_work: set[int] = set()
    change = threading.Condition()
    errors: list[BaseException] = []

    def counted(work: Callable[[], None]) -> None:
        with change:
            if stop.is_set():
                return
            at_work.add(threading.get_ident())
        try:
            work()
        except BaseException as error:
            errors.append(error)
            raise
        finally:
            with change:
                at_work.remove(threading.get_ident())
                change.notify()

    pool = ThreadPoolExecutor(len(works), thread_name_prefix="automodel_conv")
    try:
        wait([pool.submit(counted, work) for work in works], return_when=FIRST_EXCEPTION)
    finally:
        with change:  # the pool itself may not know of a thread whose start a signal has interrupted
            stop.set()
            change.wait_for(lambda: not at_work)
        pool.shutdown()
    if errors:
        raise errors[0]


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
