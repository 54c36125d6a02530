"""Enter modes of torch in threads that loading code starts: torch has a stack of modes for each thread."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

_lock = threading.Lock()
_here = threading.local()
_users = 0
_start = threading.Thread.start
_submit = ThreadPoolExecutor.submit


class _Work:
    """Loading code that runs under modes."""

    def __init__(self, dispatch: TorchDispatchMode, function: TorchFunctionMode):
        self.dispatch, self.function = dispatch, function
        self.is_running = True


class _Dispatch(TorchDispatchMode):
    def __init__(self, work: _Work):
        super().__init__()
        self._work = work

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Tell torch that nothing is compiled here, so that it does not import its compiler."""
        return False

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if not self._work.is_running:
            return func(*args, **(kwargs or {}))
        return self._work.dispatch.__torch_dispatch__(func, types, args, kwargs)


class _Function(TorchFunctionMode):
    def __init__(self, work: _Work):
        super().__init__()
        self._work = work

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if not self._work.is_running:
            return func(*args, **(kwargs or {}))
        return self._work.function.__torch_function__(func, types, args, kwargs)


@contextmanager
def in_threads(dispatch: TorchDispatchMode, function: TorchFunctionMode) -> Iterator[None]:
    """Use modes in threads that this thread starts, and in work that it gives to a ``ThreadPoolExecutor``.

    It does so within a ``with`` statement. What runs longer in another thread is without the modes from then on.
    """
    work = _Work(dispatch, function)
    before = getattr(_here, "work", None)
    _count(+1)
    _here.work = work
    try:
        yield
    finally:
        work.is_running = False
        _here.work = before
        _count(-1)


def _count(change: int) -> None:
    """Count users; while there are none, threads start as Python starts them."""
    global _users
    with _lock:
        _users += change
        threading.Thread.start = _start_thread if _users else _start  # type: ignore[method-assign]
        ThreadPoolExecutor.submit = _submit_work if _users else _submit


def _start_thread(thread: threading.Thread) -> None:
    work = getattr(_here, "work", None)
    if work is not None:
        thread.run = functools.partial(_run, work, thread.run)
    _start(thread)


def _submit_work(pool: ThreadPoolExecutor, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    work = getattr(_here, "work", None)
    if work is None:
        return _submit(pool, function, *args, **kwargs)
    _here.work = None  # a thread that the pool starts may live longer than this work
    try:
        return _submit(pool, functools.partial(_run, work, function), *args, **kwargs)
    finally:
        _here.work = work


def _run(work: _Work, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a function under the modes of ``work``, in a thread that is not under them yet."""
    before = getattr(_here, "work", None)
    if before is work:
        return function(*args, **kwargs)
    _here.work = work
    try:
        with _Dispatch(work), _Function(work):
            return function(*args, **kwargs)
    finally:
        _here.work = before
