"""Tests of faults: each file call, allocation and start of a thread fails in each way, once; see ``fault_sweep``."""

import gc
import signal
import sys
import threading
import time
from typing import NamedTuple

import pytest
import safetensors

pytest.importorskip("transformers", reason="uses merging rules of transformers")
if sys.platform != "linux":
    pytest.skip("the faults use Linux system calls", allow_module_level=True)

from automodel_conv.errors import ConversionError
from automodel_conv.execution import load, reading
from automodel_conv.files import destination, source, system
from automodel_conv.testing import assert_bytes_equal
from tests.fault_sweep import FAULTS, VERBS, Model, Sweep, count_calls, fault_at, sweep_one
from tests.faults import descriptors, mapped_files, workers


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    return Sweep(tmp_path_factory.mktemp("sweep"))


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("verb", VERBS)
def test_a_fault_at_any_call_is_one_error_or_none(sweep, verb, fault):
    counts = sweep_one(sweep, verb, FAULTS[fault])
    assert fault in ("ENOSPC", "no more threads") or sum(counts.values()) > 0
    assert bool(counts["error"]) != FAULTS[fault].harmless or not counts


@pytest.mark.parametrize("fault", ["EIO", "KeyboardInterrupt", "SystemExit"])
@pytest.mark.parametrize("verb", VERBS)
def test_a_fault_while_two_threads_work_is_one_error_or_none(tmp_path, verb, fault):
    assert sweep_one(Sweep(tmp_path / "sweep", threads=2), verb, FAULTS[fault])["error"] > 0


def test_all_calls_are_swept(sweep):
    """Check that a load makes few calls and a conversion many."""
    counts = {verb: count_calls(sweep, verb, FAULTS["EIO"]) for verb in VERBS}
    assert counts["load"] > 12
    assert counts["save"] > 40
    assert counts["convert"] > 100


def assert_sweep_fails(sweep, verb, fault, match=None):
    """Check that the sweep fails; then free its frames: they refer to the error in a circle, and keep files open."""
    with pytest.raises(AssertionError, match=match):
        sweep_one(sweep, verb, FAULTS[fault])
    gc.collect()


def test_sweep_detects_an_open_descriptor(sweep, monkeypatch):
    monkeypatch.setattr(reading.OpenFiles, "close", lambda self: None)
    assert_sweep_fails(sweep, "load", "EIO", "left open")


def test_sweep_detects_a_mapped_file(sweep, monkeypatch):
    maps = []

    def mapping(path):
        if path.endswith(".safetensors"):
            maps.append(safetensors.safe_open(path, "pt"))
        return stock(path)

    stock = system.open_readonly
    monkeypatch.setattr(system, "open_readonly", mapping)
    assert_sweep_fails(sweep, "load", "EIO", "left open")
    assert mapped_files()
    maps.clear()


def test_sweep_detects_filled_targets_that_are_not_reported(sweep, monkeypatch):
    monkeypatch.setattr(load, "add_filled_targets", lambda *_: None)
    for fault in ("KeyboardInterrupt", "no memory for a buffer", "EIO"):
        assert_sweep_fails(sweep, "load", fault, "does not name the filled tensors")


def test_sweep_detects_a_leftover_file(sweep, monkeypatch):
    monkeypatch.setattr(destination, "remove_staging", lambda staging: None)
    assert_sweep_fails(sweep, "save", "EIO")


def test_sweep_detects_a_swallowed_error(sweep, monkeypatch):
    stock = source.read_exactly

    def swallowing(*arguments):
        try:
            stock(*arguments)
        except Exception:
            return

    monkeypatch.setattr(source, "read_exactly", swallowing)
    assert_sweep_fails(sweep, "load", "EIO")


@pytest.mark.parametrize("verb", VERBS)
def test_signals_interrupt_no_call(sweep, verb):
    """Interrupt each call (EINTR) a thousand times a second by a handler that returns."""
    seen = []
    before = signal.signal(signal.SIGALRM, lambda *_: seen.append(1))
    signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
    try:
        for _ in range(20):
            getattr(sweep, f"try_{verb}")(lambda work: work() and None)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert len(seen) > 20


@pytest.mark.parametrize("fault", ["no memory for a buffer", "no memory for a tensor", "no more threads"])
def test_lack_of_resources_is_an_error_with_advice(tmp_path, fault):
    sweep = Sweep(tmp_path / "sweep", threads=2)
    happened, error = fault_at(sweep, "load", FAULTS[fault], 0)
    assert happened
    assert isinstance(error, ConversionError)
    assert "memory" in str(error)
    assert "do:" in str(error)


def test_thread_that_ends_during_a_load_names_filled_targets(sweep):
    """Check that SystemExit, like an interrupt, is raised unchanged."""
    last = count_calls(sweep, "load", FAULTS["SystemExit"]) - 1
    happened, error = fault_at(sweep, "load", FAULTS["SystemExit"], last)
    assert happened
    assert isinstance(error, SystemExit)
    assert "filled:" in error.__notes__[-1]
    assert "layers.0.norm" in error.__notes__[-1]


class Stuck(NamedTuple):
    entered: threading.Event
    released: threading.Event


@pytest.fixture
def stuck(monkeypatch):
    """Block the first read of a thread of the package until it is released."""
    entered, released = threading.Event(), threading.Event()
    stock, first = system.preadv, threading.Lock()

    def preadv(fd, views, offset):
        if threading.current_thread().name.startswith("automodel_conv") and first.acquire(blocking=False):
            entered.set()
            assert released.wait(60)
        return stock(fd, views, offset)

    monkeypatch.setattr(system, "preadv", preadv)
    return Stuck(entered, released)


def test_load_from_a_stuck_disk_ends_when_reads_resume(tmp_path, stuck):
    sweep = Sweep(tmp_path / "sweep", threads=1)
    sweep.threads, done = 2, []
    model = Model()
    thread = threading.Thread(target=lambda: done.append(sweep.load(model)))
    thread.start()
    assert stuck.entered.wait(60)
    assert not done
    stuck.released.set()
    thread.join(60)
    assert done
    for name, tensor in model.state_dict().items():
        assert_bytes_equal(tensor, sweep.wanted[name])


def test_ctrl_c_on_a_stuck_disk_is_raised_after_the_last_read(tmp_path, stuck):
    sweep = Sweep(tmp_path / "sweep", threads=1)
    sweep.threads = 2
    before, handler = descriptors(), signal.signal(signal.SIGINT, signal.default_int_handler)

    def interrupt():
        assert stuck.entered.wait(60)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        time.sleep(0.3)
        stuck.released.set()

    interrupting = threading.Thread(target=interrupt)
    try:
        interrupting.start()
        with pytest.raises(KeyboardInterrupt) as raised:
            sweep.load(Model())
        assert stuck.released.is_set()
    finally:
        interrupting.join()
        signal.signal(signal.SIGINT, handler)
    assert workers() == []
    assert descriptors() == before
    assert "filled:" in raised.value.__notes__[-1]
