"""Tests of random schedules of a simulated device, late and out of order, and of the planted faults they detect."""

from __future__ import annotations

import gc
import random
import threading
import time

import pytest

from automodel_conv.errors import ReadError
from automodel_conv.execution.device import load_to_device
from automodel_conv.execution.workers import Stopped
from tests.execution.device_loads import assert_released, load, planted
from tests.execution.simulated import DeviceFault, Event, SimulatedDevice


def run_schedule(cases, seed, calls, load_to_device=load_to_device):
    """Run one load of one case with delays, and perhaps a fault, all drawn from a seed."""
    draw = random.Random(seed)
    case = draw.choice(cases)
    fault = draw.choice(["none", "none", "read", "device", "allocation"])
    at = draw.randint(1, 40)
    calls.reads, calls.fail_read = 0, at if fault == "read" else -1
    calls.delay = lambda number: time.sleep(draw.choice([0, 0, 0, 1e-5, 3e-4]))
    device = SimulatedDevice(
        seed,
        eagerness=draw.choice([0, 0.1, 0.5, 0.9]),
        fail_at=at if fault == "device" else -1,
        fail_allocation=at % 4 if fault == "allocation" else -1,
    )
    options = {"threads": draw.randint(1, 3), "scratch_bytes": draw.choice([8192, 20000, 40000])}
    options["device_scratch_bytes"] = draw.choice([8192, 8192, 16384])
    try:
        load(case, device, load_to_device=load_to_device, **options)
        failed = None
    except (ReadError, DeviceFault) as error:
        failed = (type(error), str(error))
    struck = {
        "none": False,
        "read": calls.reads >= at,
        "device": device.operations >= at,
        "allocation": 1 <= at % 4 <= device.allocations,
    }[fault]
    assert (failed is not None) == struck
    if failed is not None:
        kind, text = failed
        assert kind is (ReadError if fault == "read" else DeviceFault)
        assert fault != "read" or (".safetensors" in text and ("experts." in text or "norm.weight" in text))
    assert_released(device, calls)


@pytest.mark.parametrize("seeds", [range(250), pytest.param(range(250, 1000), marks=pytest.mark.long)], ids=str)
def test_random_schedules_neither_leak_nor_hang_nor_write_a_wrong_byte(seeds, cases, calls):
    for seed in seeds:
        run_schedule(cases, seed, calls)


MUTANTS = {
    "copies out of a window do not wait for its uploads": (
        "self._compute_stream.wait(self._filled[region])",
        "pass",
    ),
    "uploads into a window do not wait for the copies out of it": (
        "self._copy_stream.wait(self._emptied[previous])",
        "pass",
    ),
    "a slot is overwritten before it is uploaded": ("slot.uploaded.synchronize()", "pass"),
    "a window is emptied before it is full": (
        "[window.chunks for window in windows]",
        "[1 for window in windows]",
    ),
    "a window is filled before the one before it is emptied": ("previous = window - _REGIONS", "previous = -1"),
    "an error is swallowed": ("                worker.result()", "                pass"),
    "the load ends before the device": ("stream.record().synchronize()", "stream.record()"),
    "files stay open": ("ending.callback(self._files.close)", "pass"),
    "threads are left behind": ("ending.callback(pool.shutdown)", "pass"),
    "regions are kept": ("ending.callback(self._release)", "self.__class__.kept = self._regions"),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_random_schedules_find_each_fault_planted_in_the_loader(cases, calls, mutant):
    mutated = planted(*MUTANTS[mutant])
    with pytest.raises((AssertionError, KeyError, Stopped)):  # noqa: PT012
        for seed in range(300):
            run_schedule(cases, seed, calls, mutated.load_to_device)
    gc.collect()  # ends the threads of a pool without a shutdown
    for thread in threading.enumerate():
        if thread.name.startswith("automodel_conv"):
            thread.join(10)


def test_simulated_device_is_late_keeps_stream_order_and_detects_circular_waits():
    device = SimulatedDevice(eagerness=0)
    first, second = device.stream(), device.stream()
    done = []
    first.run(lambda: done.append(1))
    second.wait(first.record())
    second.run(lambda: done.append(2))
    assert done == []
    second.record().synchronize()
    assert done == [1, 2]
    first.wait(Event(first, 5))
    with pytest.raises(DeviceFault, match="wait for each other"):
        first.record().synchronize()


def test_simulated_device_keeps_its_first_fault():
    device = SimulatedDevice(eagerness=0, fail_at=2)
    stream = device.stream()
    done = []
    for number in range(3):
        stream.run(lambda number=number: done.append(number))
    with pytest.raises(DeviceFault, match="illegal access"):
        stream.record().synchronize()
    assert done == [0]
    assert device.idle
