"""A device that refuses every wait of the host, except a thread's wait for its own slot."""

from __future__ import annotations

import functools
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from torch.overrides import TorchFunctionMode

from automodel_conv.execution import window_decoding
from automodel_conv.kernels import code_tables, launch
from tests.execution.simulated import SimulatedDevice


class Synchronized(AssertionError):
    pass


class NoSynchronization(TorchFunctionMode):
    """A mode that refuses operations that make the host wait for a device, such as ``item`` and copies of lists."""

    WAITING = frozenset(
        "item tolist cpu numpy tensor as_tensor nonzero masked_select equal unique repeat_interleave "
        "__bool__ __int__ __float__ __index__".split()
    )

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        moves = name == "to" and any(str(argument) == "cpu" for argument in args[1:])
        chooses = name in ("__getitem__", "__setitem__") and isinstance(args[1], (torch.Tensor, list))
        if name in self.WAITING or moves or chooses:
            raise Synchronized(name)
        return function(*args, **(kwargs or {}))


class StrictDevice(SimulatedDevice):
    """A device that only allows a thread to wait for its own slot, from the first read to the end."""

    def stream(self):
        stream = super().stream()
        real = stream.run

        def strictly(work):
            with NoSynchronization():
                work()

        stream.run = lambda work: real(lambda: strictly(work))
        return stream


@contextmanager
def outside_of_modes():
    """Run launches without the rules of a device: the interpreter reads tables on the host."""
    real = launch.queue

    def queue(*arguments):
        with torch._C.DisableTorchFunction():
            real(*arguments)

    with mock.patch.object(launch, "queue", queue):
        yield


@pytest.fixture
def first_load(monkeypatch):
    """Clear the constants of earlier loads."""
    for name in ("_code_values", "byte_scale_table", "byte_scale_values"):
        for module in (code_tables, window_decoding):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, functools.cache(getattr(code_tables, name).__wrapped__))
