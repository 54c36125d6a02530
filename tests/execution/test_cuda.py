"""Tests of the order of a CUDA device's streams, with torch's streams and events replaced by simulated ones."""

from __future__ import annotations

import threading
from contextlib import contextmanager

import pytest
import torch

from automodel_conv.execution.cuda import CudaDevice
from tests.execution import simulated


class Stream(simulated.Stream):
    def wait_stream(self, other):
        self.wait(other.record())

    def wait_event(self, event):
        self.wait(event.recorded)


class Event:
    def __init__(self, blocking):
        self.recorded = None

    def record(self, stream):
        self.recorded = stream.record()

    def synchronize(self):
        self.recorded.synchronize()


class OnDevice:
    """A tensor of the device: copies to it are queued on the thread's current stream."""

    def __init__(self, tensor):
        self.tensor = tensor

    def copy_(self, source, non_blocking):
        assert non_blocking
        torch.cuda.current_stream().copy_all([(self.tensor, source)])


@pytest.fixture(params=range(8))
def current(request, monkeypatch):
    """Return a function that makes a stream current for a thread, which otherwise uses the default stream."""
    device = simulated.SimulatedDevice(request.param, eagerness=0)
    at_work = threading.local()

    def new_stream(*arguments):
        device.streams.append(Stream(device))
        return device.streams[-1]

    default = new_stream()

    @contextmanager
    def entered(stream):
        before = getattr(at_work, "stream", default)
        at_work.stream = stream
        try:
            yield
        finally:
            at_work.stream = before

    monkeypatch.setattr(torch.cuda, "Stream", new_stream)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "stream", entered)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: getattr(at_work, "stream", default))
    return entered


def test_stream_created_in_a_worker_waits_for_the_callers_current_stream(current):
    """Check that a worker waits for a caller's side stream that still writes the tensor."""
    source, copied = torch.zeros(4), torch.full((4,), -1.0)

    def work():
        stream = device.stream()
        stream.copy_all([(OnDevice(copied), source)])
        stream.record().synchronize()

    with current(side := torch.cuda.Stream()):
        for value in range(1, 6):
            side.copy_all([(source, torch.full((4,), float(value)))])
        device = CudaDevice(torch.device("cuda"))
        worker = threading.Thread(target=work)
        worker.start()
        worker.join()
    assert copied.tolist() == [5.0] * 4
