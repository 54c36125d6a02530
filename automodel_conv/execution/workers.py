"""Worker threads: they process items until all are done, one of the threads fails, or the caller asks to stop."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

Item = TypeVar("Item")

_SECONDS_BETWEEN_SIGNALS = 0.5


class Stopped(Exception):
    """Raised to end a load whose ``stop`` event the caller or another thread has set."""


def raise_if_stopped(stop: threading.Event | None) -> None:
    """Raise ``Stopped`` if the event is set; None counts as not set."""
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
    abort: Callable[[], None] | None = None,
) -> int:
    """Process each item in one of several threads, in order; end all threads at the first error, and raise it.

    In these threads torch may write to any tensor, including inference tensors, and starts no threads of its own. A
    single thread is the caller's own, unless ``wanted`` may ask for more.

    Args:
        items: items to process.
        threads: number of threads at the start.
        start: function that each thread calls once. It returns the function that processes one item in this thread.
        stop: event that any thread may set. Once it is set, no further item is started.
        most: largest number of threads that ``wanted`` may ask for.
        wanted: function that returns how many threads should work from now on, at least one. It is called after each
            item. Fewer threads work if the system cannot start more. None keeps the number constant.
        abort: function that ends the waiting of threads, so that they notice the first error or an interrupt.

    Returns:
        The largest number of threads that worked at the same time.

    Raises:
        Stopped: ``stop`` was set before all items were started.
    """
    todo = deque(items)
    ended = threading.Event()
    threads = min(threads, len(todo))
    group = _ThreadGroup(max(threads, most), ended, abort)
    count = _WorkerCount(threads)

    def should_continue() -> bool:
        if wanted is None:
            return True
        change = count.adjust(wanted(), len(todo))
        for started in range(change):
            try:
                group.start_another()
            except RuntimeError:  # the system cannot start another thread: continue with the present ones
                count.subtract(change - started)
                break
        return change >= 0

    @torch.inference_mode()  # each thread has its own mode, and the caller's tensors may be inference tensors
    def work() -> None:
        torch.set_num_threads(1)
        process = start()
        while not (ended.is_set() or (stop is not None and stop.is_set())):
            try:
                item = todo.popleft()
            except IndexError:
                return
            process(item)
            if not should_continue():
                return

    with _restored_torch_threads():
        if threads > 1 or (wanted is not None and todo):
            group.run([work] * threads)
        elif todo:
            work()
    if todo:
        raise_if_stopped(stop)
    return count.most


class _WorkerCount:
    """The number of threads that work now, and the largest number so far."""

    def __init__(self, threads: int):
        self.most = self._threads = threads
        self._lock = threading.Lock()

    def adjust(self, wanted: int, left: int) -> int:
        """Adjust the number to ``wanted``, and return how many threads the calling thread must start.

        The number grows at once, but to no more than the items left. It shrinks by one in each call: -1 means that the
        calling thread must end.

        Args:
            wanted: wanted number of threads, at least one, so that the last thread never ends before all is done.
            left: number of items that no thread has started.
        """
        with self._lock:
            change = max(min(wanted, max(left, self._threads)) - self._threads, -1)
            self._threads += change
            self.most = max(self.most, self._threads)
            return change

    def subtract(self, threads: int) -> None:
        """Subtract threads that could not be started."""
        with self._lock:
            self._threads -= threads


def run_concurrently(tasks: Sequence[Callable[[], None]], stop: threading.Event) -> None:
    """Run each task in a thread of its own, and return when all have ended.

    The first error, or an interrupt of the caller, sets ``stop``, and is raised when all tasks have ended. The tasks
    must watch ``stop``. It is always set when this returns or raises.
    """
    _ThreadGroup(len(tasks), stop).run(tasks)


def wait_until_first_error(futures: Sequence[Future[Any]]) -> set[Future[Any]]:
    """Wait until all futures are done or one has an error, and return those that are done.

    Python runs the handler of a signal in the main thread. If another thread receives the signal, or the main thread
    does just before it begins to wait, nothing ends the wait. Therefore the wait looks for signals twice a second.
    """
    while True:
        done, running = wait(futures, _SECONDS_BETWEEN_SIGNALS, return_when=FIRST_EXCEPTION)
        if not running or any(future.exception() for future in done):
            return done


class _ThreadGroup:
    """A group of threads that end together, each of which may start further ones; see ``run_concurrently``."""

    def __init__(self, most: int, stop: threading.Event, abort: Callable[[], None] | None = None):
        self._stop = stop
        self._abort = abort
        self._running: dict[int, Callable[[], None]] = {}
        """Task of each running thread, by the number of the thread."""
        self._change = threading.Condition()
        self._errors: list[BaseException] = []
        self._futures: list[Future[None]] = []
        self._most = most
        self._pool: ThreadPoolExecutor | None = None

    def run(self, tasks: Iterable[Callable[[], None]]) -> None:
        self._pool = ThreadPoolExecutor(self._most, thread_name_prefix="automodel_conv")
        try:
            for task in tasks:
                self._start(task)
            # A thread is still running when it starts another one, so this loop misses none.
            known = 0
            while known < len(self._futures) and not self._errors:
                known = len(self._futures)
                wait_until_first_error(self._futures[:known])
        finally:
            # The pool may miss a thread if a signal interrupted its start, so wait for the threads themselves.
            self._stop.set()
            if self._abort is not None and self._running:
                self._abort()
            with self._change:
                self._change.wait_for(lambda: not self._running)
            self._pool.shutdown()
            # No references in a circle: memory and files of the threads are free once the caller drops the error.
            errors, self._errors, self._futures = self._errors, [], []
        try:
            if errors:
                raise errors[0]
        finally:
            errors.clear()

    def start_another(self) -> None:
        """Start one more thread with the task of the calling thread, unless all must end."""
        self._start(self._running[threading.get_ident()])

    def _start(self, task: Callable[[], None]) -> None:
        # The pool is not shut down while ``run`` starts threads, or while a thread runs.
        if self._pool is not None and not self._stop.is_set():
            self._futures.append(self._pool.submit(self._run_registered, task))

    def _run_registered(self, task: Callable[[], None]) -> None:
        with self._change:
            if self._stop.is_set():
                return
            self._running[threading.get_ident()] = task
        try:
            task()
        except BaseException as error:
            self._errors.append(error)
            self._stop.set()
            raise
        finally:
            with self._change:
                del self._running[threading.get_ident()]
                self._change.notify()


class _TorchThreads:
    """The number of torch threads to restore, and how many ``run_in_threads`` calls are active in this process."""

    lock = threading.Lock()
    active = 0
    number = 0

    @classmethod
    def reset_in_child(cls) -> None:
        """Reset the state in a forked child, which has none of the threads that work or hold the lock."""
        if cls.active:
            torch.set_num_threads(cls.number)
        cls.lock, cls.active = threading.Lock(), 0


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_TorchThreads.reset_in_child)


@contextmanager
def _restored_torch_threads() -> Iterator[None]:
    """Restore the number of torch threads after the last active call.

    A worker thread sets it to 1, and later threads would start with that number too.
    """
    with _TorchThreads.lock:
        if not _TorchThreads.active:
            _TorchThreads.number = torch.get_num_threads()
        _TorchThreads.active += 1
    try:
        yield
    finally:
        with _TorchThreads.lock:
            _TorchThreads.active -= 1
            if not _TorchThreads.active:
                torch.set_num_threads(_TorchThreads.number)
