"""Each file call, allocation and start of a thread fails in each way, once; see ``fault_sweep``."""

import signal
import sys

import pytest

pytest.importorskip("transformers", reason="the merging rules are transformers'")
if sys.platform != "linux":
    pytest.skip("the faults are made with what Linux has", allow_module_level=True)

from automodel_conv.execution import reading
from automodel_conv.files import destination, system
from tests.fault_sweep import FAULTS, VERBS, Sweep, count_calls, sweep_one


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    return Sweep(tmp_path_factory.mktemp("sweep"))


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("verb", VERBS)
def test_a_fault_at_any_call_is_one_error_or_none(sweep, verb, fault):
    found = sweep_one(sweep, verb, FAULTS[fault])
    assert fault in ("ENOSPC", "no more threads") or sum(found.values()) > 0
    assert bool(found["error"]) != FAULTS[fault].harmless or not found


@pytest.mark.parametrize("fault", ["EIO", "KeyboardInterrupt"])
@pytest.mark.parametrize("verb", VERBS)
def test_a_fault_while_two_threads_work_is_one_error_or_none(tmp_path, verb, fault):
    assert sweep_one(Sweep(tmp_path / "sweep", threads=2), verb, FAULTS[fault])["error"] > 0


def test_all_calls_are_swept(sweep):
    """A load makes few calls, a conversion many."""
    counts = {verb: count_calls(sweep, verb, FAULTS["EIO"]) for verb in VERBS}
    assert counts["load"] > 12
    assert counts["save"] > 40
    assert counts["convert"] > 100


def test_a_descriptor_that_stays_open_is_found(sweep, monkeypatch):
    monkeypatch.setattr(reading.OpenFiles, "close", lambda self: None)
    with pytest.raises(AssertionError, match="left open"):
        sweep_one(sweep, "load", FAULTS["EIO"])


def test_a_file_that_stays_is_found(sweep, monkeypatch):
    monkeypatch.setattr(destination, "_remove", lambda staging: None)
    with pytest.raises(AssertionError):
        sweep_one(sweep, "save", FAULTS["EIO"])


def test_an_error_that_is_swallowed_is_found(sweep, monkeypatch):
    stock = system.read_exactly

    def swallowing(*arguments):
        try:
            stock(*arguments)
        except Exception:
            return

    monkeypatch.setattr(system, "read_exactly", swallowing)
    with pytest.raises(AssertionError):
        sweep_one(sweep, "load", FAULTS["EIO"])


@pytest.mark.parametrize("verb", VERBS)
def test_signals_interrupt_no_call(sweep, verb):
    """EINTR: a handler that returns lets each call go on, a thousand times a second."""
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
