"""Tests of the streaming loader when a read, the device or the caller ends it: it reports at once and releases all."""

from __future__ import annotations

import signal
import threading
import time
import types
from unittest import mock

import pytest
import torch
from safetensors.torch import save_file

import automodel_conv as amc
from automodel_conv.errors import ConversionError, ReadError, UnsupportedError
from automodel_conv.execution import copy_batch
from automodel_conv.execution import device as streaming
from automodel_conv.execution.workers import Stopped
from tests.execution.device_loads import Case, assert_released, load, planted
from tests.execution.simulated import DeviceFault, SimulatedDevice
from tests.files.remote.random_faults import within
from tests.loopback_faults import OTHER_SIZE, STALL, Faults
from tests.loopback_store import serve


def test_failing_read_is_raised_at_once_while_other_threads_still_read(cases, calls):
    case = cases[1]
    calls.fail_read = 2
    both = threading.Barrier(2, timeout=5)
    calls.delay = lambda number: (both.wait(), time.sleep(0.2 if number == 1 else 0))
    with pytest.raises(ReadError, match="Input/output error") as error:
        load(case, SimulatedDevice(), threads=2, scratch_bytes=16384)
    assert calls.reads == 2
    assert "filled:" in str(error.value)


def test_failing_read_is_raised_before_the_device_error_at_the_end(cases, calls):
    calls.fail_read = 2
    device = SimulatedDevice(eagerness=0, fail_at=1)  # works only when it is waited for, at the end
    with pytest.raises(ReadError, match=r"Input/output error[\s\S]*also: +DeviceFault: .*illegal access"):
        load(cases[0], device, threads=1, scratch_bytes=16384)
    assert_released(device, calls)


def test_changed_file_on_a_server_is_raised_while_another_thread_waits_for_bytes(tmp_path):
    weights = torch.arange(30_000, dtype=torch.float32)
    save_file({"w": weights}, tmp_path / "model.safetensors")
    with serve(tmp_path, faults=Faults({1: STALL, 2: OTHER_SIZE}, ending="model.safetensors")) as server:
        checkpoint = amc.open_checkpoint(f"{server.url}/model.safetensors")
        case = Case(checkpoint, amc.compile_plan(checkpoint, rules=[]), {"w": weights})
        with pytest.raises(ReadError, match="has changed"):
            within(15, lambda: load(case, SimulatedDevice(), threads=2, scratch_bytes=1 << 16))


class Impatient(threading.Condition):
    """A condition on which no thread waits for more than two seconds. It records if a thread would have."""

    def __init__(self):
        super().__init__()
        self.somebody_waits = threading.Event()
        self.gave_up = False

    def wait(self, timeout=None):
        self.somebody_waits.set()
        woken = super().wait(2)
        self.gave_up |= not woken
        return woken


def fail_while_another_thread_waits(module, case, calls, monkeypatch):
    """Fail a read into the first window while another thread waits for that window to be emptied."""
    condition = Impatient()
    monkeypatch.setattr(module, "threading", types.SimpleNamespace(Condition=lambda: condition))
    calls.reads, calls.fail_read = 0, 1
    calls.delay = lambda number: number == 1 and condition.somebody_waits.wait(5)
    ends, real = [], module._DeviceLoad._read

    def read(load, slots):
        try:
            real(load, slots)
        except Exception as error:
            ends.append(type(error).__name__)
            raise

    monkeypatch.setattr(module._DeviceLoad, "_read", read)
    device = SimulatedDevice()
    with pytest.raises((ReadError, KeyError)):
        load(case, device, threads=2, scratch_bytes=16384, load_to_device=module.load_to_device)
    assert condition.somebody_waits.is_set()
    assert not condition.gave_up
    assert sorted(ends) == ["ReadError", "Stopped"]
    assert_released(device, calls)


def test_thread_waiting_for_a_window_ends_when_another_fails(cases, calls, monkeypatch):
    fail_while_another_thread_waits(streaming, cases[2], calls, monkeypatch)


@pytest.mark.parametrize("reverse", [False, True])
def test_failing_read_is_raised_when_a_thread_is_stopped_and_the_device_fails(cases, calls, monkeypatch, reverse):
    notes, settle, wait = [], streaming._DeviceLoad._synchronize, streaming.wait_until_first_error

    def fail_at_the_end(load, stream):
        settle(load, stream)
        raise DeviceFault("at the end")

    def wait_for(futures):
        done = wait(futures)
        if reverse:  # either thread may fail
            futures.reverse()
        return done

    monkeypatch.setattr(streaming, "wait_until_first_error", wait_for)
    monkeypatch.setattr(streaming._DeviceLoad, "_synchronize", fail_at_the_end)
    monkeypatch.setattr(streaming, "add_note", lambda error, text: notes.append((type(error), text)))
    fail_while_another_thread_waits(streaming, cases[2], calls, monkeypatch)
    assert notes == [(ReadError, "  also:     DeviceFault: at the end")]


@pytest.mark.parametrize(
    ("text", "replacement"),
    [
        ("self._stopped = True\n            self._changed.notify_all()", "self._stopped = True"),
        ("if self._stopped:\n                    raise Stopped", "pass"),
    ],
    ids=["not woken", "continues"],
)
def test_thread_that_waits_or_continues_after_the_end_is_detected(cases, calls, monkeypatch, text, replacement):
    with pytest.raises(AssertionError):
        fail_while_another_thread_waits(planted(text, replacement), cases[2], calls, monkeypatch)


@pytest.mark.parametrize("before", [0, 1])
def test_stopped_load_releases_everything_and_names_complete_targets(cases, calls, before):
    stop = threading.Event()
    calls.delay = lambda number: stop.set() if number > before else None
    device = SimulatedDevice(eagerness=0.2)
    with pytest.raises(Stopped):
        load(cases[2], device, threads=2, stop=stop)
    assert calls.reads <= before + 4
    assert_released(device, calls)


def interrupt(module, case, calls, monkeypatch):
    """Interrupt the main thread while it waits for the readers, which must then begin no other chunk."""

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "wait_until_first_error", interrupted)
    calls.reads, calls.delay = 0, lambda number: time.sleep(0.02)
    device = SimulatedDevice(eagerness=0)
    with pytest.raises(KeyboardInterrupt):
        load(case, device, threads=2, load_to_device=module.load_to_device)
    assert calls.reads <= 4
    assert_released(device, calls)


def test_ctrl_c_releases_everything(cases, calls, monkeypatch):
    interrupt(streaming, cases[1], calls, monkeypatch)


def test_signal_that_a_reader_receives_ends_the_load(cases, calls):
    def signalled(number):
        if number == 2:
            time.sleep(0.2)  # until the main thread waits
            signal.pthread_kill(threading.get_ident(), signal.SIGINT)
        if number >= 2:
            time.sleep(1)

    calls.reads, calls.delay = 0, signalled
    device = SimulatedDevice(eagerness=0)
    with pytest.raises(KeyboardInterrupt):
        load(cases[1], device, threads=2)
    assert calls.reads <= 4
    assert_released(device, calls)


def test_readers_that_continue_after_ctrl_c_are_detected(cases, calls, monkeypatch):
    with pytest.raises(AssertionError):
        interrupt(planted("ending.callback(self._stop)", "pass"), cases[1], calls, monkeypatch)


def test_explicit_backend_is_refused_before_anything_is_read(cases, calls):
    with (
        mock.patch.object(copy_batch, "why_not", return_value="no compiler"),
        pytest.raises(UnsupportedError, match="no compiler"),
    ):
        load(cases[1], SimulatedDevice(), backend="triton")
    assert calls.reads == 0


@pytest.mark.parametrize(
    "options", [{"threads": 0}, {"threads": "2"}, {"scratch_bytes": 8191}, {"device_scratch_bytes": 0}]
)
def test_impossible_options_are_refused(cases, options):
    with pytest.raises(ConversionError, match="expected"):
        load(cases[0], SimulatedDevice(), **options)
