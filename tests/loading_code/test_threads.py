"""Tests of threads that loading code starts: they are under the same modes, while it runs."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from multiprocessing.pool import ThreadPool

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from automodel_conv.loading_code.threads import in_threads


class Dispatched(TorchDispatchMode):
    """Notes the threads in which it is asked."""

    def __init__(self):
        super().__init__()
        self.threads = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.threads.append(threading.get_ident())
        return func(*args, **(kwargs or {}))


class Functions(TorchFunctionMode):
    """Notes the threads in which it is asked."""

    def __init__(self):
        super().__init__()
        self.threads = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.threads.append(threading.get_ident())
        return func(*args, **(kwargs or {}))


def operation():
    torch.zeros(2).add_(1)
    return threading.get_ident()


def by_thread():
    found = []
    thread = threading.Thread(target=lambda: found.append(operation()))
    thread.start()
    thread.join()
    return found[0]


def by_thread_of_thread():
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(by_thread).result()


def by_pool():
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(operation).result()


def by_thread_pool():
    with ThreadPool(1) as pool:
        return pool.apply(operation)


@pytest.mark.parametrize("start", [by_thread, by_thread_of_thread, by_pool, by_thread_pool])
def test_threads_are_under_the_modes(start):
    dispatched, functions = Dispatched(), Functions()
    with in_threads(dispatched, functions):
        ident = start()
    assert set(dispatched.threads) == set(functions.threads) == {ident}


def test_pools_that_run_already_are_under_the_modes_while_they_work():
    dispatched = Dispatched()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(operation).result()
        with in_threads(dispatched, Functions()):
            ident = pool.submit(operation).result()
        count = len(dispatched.threads)
        assert set(dispatched.threads) == {ident}
        pool.submit(operation).result()
        assert len(dispatched.threads) == count


def test_threads_of_other_work_are_not_under_the_modes():
    dispatched = Dispatched()
    go, done = threading.Event(), threading.Event()

    def other():
        go.wait()
        by_thread()
        by_pool()
        done.set()

    thread = threading.Thread(target=other)
    thread.start()
    with in_threads(dispatched, Functions()):
        go.set()
        done.wait()
    thread.join()
    assert dispatched.threads == []


def test_threads_that_run_longer_leave_the_modes():
    dispatched, functions = Dispatched(), Functions()
    go = threading.Event()
    thread = threading.Thread(target=lambda: (go.wait(), operation()))
    with in_threads(dispatched, functions):
        thread.start()
    go.set()
    thread.join()
    assert dispatched.threads == functions.threads == []


@pytest.mark.parametrize("count", [1, 2])
def test_threads_start_as_before_at_the_end(count):
    before = threading.Thread.start, ThreadPoolExecutor.submit
    for _ in range(count):
        with suppress(KeyboardInterrupt), in_threads(Dispatched(), Functions()):
            with in_threads(Dispatched(), Functions()):
                pass
            assert threading.Thread.start is not before[0]
            raise KeyboardInterrupt
    assert (threading.Thread.start, ThreadPoolExecutor.submit) == before


def test_arguments_and_errors_pass():
    def divide(first, second):
        return first / second

    with in_threads(Dispatched(), Functions()), ThreadPoolExecutor(1) as pool:
        assert pool.submit(divide, 4, second=2).result() == 2
        with pytest.raises(ZeroDivisionError):
            pool.submit(divide, 4, 0).result()


@pytest.mark.parametrize("start", [by_thread, by_pool])
def test_threads_after_inner_modes_are_under_the_outer_ones(start):
    outer, inner = Dispatched(), Dispatched()
    with in_threads(outer, Functions()):
        with in_threads(inner, Functions()):
            pass
        ident = start()
    assert set(outer.threads) == {ident}
    assert inner.threads == []
