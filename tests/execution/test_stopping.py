"""Tests of stopping a load: it ends, settles, and names the complete targets."""

from __future__ import annotations

import threading

import pytest
import torch

from automodel_conv.execution.buffers import allocate
from automodel_conv.execution.device import load_to_device
from automodel_conv.execution.host import load_to_host
from automodel_conv.execution.workers import Stopped
from automodel_conv.planning.copies import Fallback, Target
from automodel_conv.schedule import host as schedule
from automodel_conv.testing import assert_bytes_equal
from tests.execution.simulated import SimulatedDevice
from tests.execution.support import TRANSPOSE, columns, moe, naive, plan_of, write_checkpoint
from tests.faults import workers

SMALL = 8192


@pytest.fixture(params=["host", "device"])
def executor(request, monkeypatch):
    """Return a function that loads with two threads by many small reads."""
    for size in ("_LEAST_JOB_BYTES", "RUN_BYTES", "_SLAB_BYTES"):
        monkeypatch.setattr(schedule, size, 256)
    if request.param == "host":
        return lambda *load, **how: load_to_host(*load, threads=2, scratch_bytes=SMALL, **how)
    device = SimulatedDevice()

    def stream(*load, **how):
        try:
            return load_to_device(*load, device, threads=2, scratch_bytes=2 * SMALL, device_scratch_bytes=SMALL, **how)
        finally:
            assert device.idle

    return stream


def case(tmp_path):
    return moe(tmp_path, TRANSPOSE, shape=(7, 18, 26))


@pytest.mark.parametrize("at", [1, 3])
def test_stopped_load_ends_and_names_complete_targets(tmp_path, calls, executor, at):
    tensors, checkpoint, plan = case(tmp_path)
    buffers = allocate(plan.targets)
    stop, calls.reads = threading.Event(), 0
    calls.delay = lambda number: number == at and stop.set()
    with pytest.raises(Stopped) as raised:
        executor(plan, checkpoint, buffers, stop=stop)
    assert calls.reads <= at + 2
    (note,) = raised.value.__notes__
    assert "filled:" in note
    complete = [name for name in note.split() if name in buffers]
    assert len(complete) < len(buffers)
    wanted = naive(plan, tensors)
    for name in complete:
        assert_bytes_equal(buffers[name], wanted[name])
    assert calls.open == set()
    assert workers() == []


def test_load_stopped_before_it_begins_reads_nothing(tmp_path, calls, executor):
    _, checkpoint, plan = case(tmp_path)
    stop, calls.reads = threading.Event(), 0
    stop.set()
    with pytest.raises(Stopped):
        executor(plan, checkpoint, allocate(plan.targets), stop=stop)
    assert calls.reads == 0
    assert calls.open == set()


def test_unused_stop_does_not_change_a_load(tmp_path, executor):
    tensors, checkpoint, plan = case(tmp_path)
    buffers, stop = allocate(plan.targets), threading.Event()
    executor(plan, checkpoint, buffers, stop=stop)
    assert not stop.is_set()  # other loads may share it
    for name, wanted in naive(plan, tensors).items():
        assert_bytes_equal(buffers[name], wanted)


def test_transformers_code_does_not_start_after_a_stop(tmp_path, executor):
    stop, seen = threading.Event(), []

    def convert(name):
        def convert_one(sources):
            seen.append(name)
            stop.set()
            return {name: sources[0] * 1}

        return convert_one

    checkpoint = write_checkpoint(tmp_path, {"a.safetensors": {"a": torch.arange(6.0)}})
    targets = [Target(n, "F32", (6,), -1, (0,), (), Fallback("a test", convert(n))) for n in ("one", "two")]
    plan = plan_of(columns(checkpoint), *targets)
    buffers = allocate(plan.targets)
    with pytest.raises(Stopped) as raised:
        executor(plan, checkpoint, buffers, stop=stop)
    assert seen == ["one"]
    assert [name for name in "".join(raised.value.__notes__).split() if name in buffers] == ["one"]
