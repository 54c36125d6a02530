"""Tests of loads to several devices at a time: an error ends all of them and names the complete targets of each."""

from __future__ import annotations

import gc
import os
import signal
import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from automodel_conv.errors import ConversionError, ReadError
from automodel_conv.execution import device as streaming
from automodel_conv.execution import filling
from automodel_conv.execution import host as cpu
from automodel_conv.execution.buffers import allocate
from automodel_conv.execution.filling import DeviceBytes, Limits, fill, split_limits
from automodel_conv.planning.copies import Fallback, Target
from automodel_conv.testing import POISON, address_valued, assert_bytes_equal
from tests.execution.elsewhere import FIRST, HOST, SECOND, Devices, put
from tests.execution.support import columns, moe, naive, plan_of, target, write_checkpoint
from tests.faults import workers

HOMES = {"gate_up": FIRST, "down": SECOND, "norm": HOST}
SCRATCH = {"scratch_bytes": 1 << 16, "device_scratch_bytes": 8192}
MANY = 20


@pytest.fixture
def devices(monkeypatch):
    simulated = Devices()
    monkeypatch.setattr(filling, "transfer_device", simulated)
    return simulated


def buffers_on(plan, homes):
    """Return poisoned buffers, each on its device."""
    buffers = {}
    for name, tensor in allocate(plan.targets).items():
        tensor.reshape(-1).view(torch.uint8).fill_(POISON)
        buffers[name] = put(tensor, homes[name])
    return buffers


def host_bytes(tensor):
    return tensor.as_subclass(torch.Tensor)


def assert_settled(devices, calls):
    """Check that no thread, open file, busy stream or device memory is left."""
    gc.collect()
    assert workers() == []
    assert calls.open == set()
    assert all(device.idle and device.live == 0 for device in devices.values())


def watched(monkeypatch, before=None, after=None):
    """Call functions before and after the load of each device, in its thread."""
    stock = filling._fill_device

    def around(part, *how):
        if before is not None:
            before(part.device)
        stats = stock(part, *how)
        if after is not None:
            after(part.device)
        return stats

    monkeypatch.setattr(filling, "_fill_device", around)


def names_filled(error, names):
    """Return the names that the text and notes of an error report as complete."""
    text = "\n".join([str(error), *getattr(error, "__notes__", ())])
    return sorted(word for part in text.split("filled:")[1:] for word in part.split() if word in names)


@pytest.fixture
def many(tmp_path):
    """Return a checkpoint of many tensors in a file for the first device, and one in another file for the second."""
    tensors = {f"t{n}": address_valued((32, 64), torch.float32, 5000 * n) for n in range(MANY)}
    other = {"u": address_valued((32, 64), torch.float32, 7)}
    checkpoint = write_checkpoint(tmp_path, {"a.safetensors": tensors, "b.safetensors": other})
    sources = columns(checkpoint)
    plan = plan_of(sources, *(target(sources, name, "F32", [[name]]) for name in (*tensors, *other)))
    return checkpoint, plan, {name: SECOND if name == "u" else FIRST for name in (*tensors, *other)}


@pytest.mark.parametrize("threads", [None, 1, 2, 3, 7])
@pytest.mark.parametrize("progress", [False, True])
def test_buffers_on_several_devices_get_their_bytes(tmp_path, devices, calls, threads, progress, capsys):
    tensors, checkpoint, plan = moe(tmp_path)
    buffers = buffers_on(plan, HOMES)
    stats = fill(plan, checkpoint, buffers, Limits(threads, **SCRATCH), progress=progress)
    for name, wanted in naive(plan, tensors).items():
        assert_bytes_equal(host_bytes(buffers[name]), wanted)
    assert list(stats) == [FIRST, SECOND, HOST]
    assert sum(part.bytes_read for part in stats.values()) == plan.bytes_read
    assert sum(part.scratch_bytes for part in stats.values()) <= SCRATCH["scratch_bytes"]
    assert_settled(devices, calls)
    bars = capsys.readouterr().err
    assert bars.count("\n") == progress  # one bar for all bytes
    assert ("reading: 100%" in bars.split("\r")[-1]) == progress


def test_devices_are_filled_at_the_same_time(tmp_path, devices, monkeypatch):
    _, checkpoint, plan = moe(tmp_path)
    meeting = threading.Barrier(3, timeout=30)
    watched(monkeypatch, before=lambda device: meeting.wait())
    fill(plan, checkpoint, buffers_on(plan, HOMES), Limits(**SCRATCH))


@pytest.mark.parametrize(("homes", "threads"), [(HOMES, 2), (HOMES, 1), (dict.fromkeys(HOMES, FIRST), None)])
def test_more_devices_than_threads_or_a_single_one_are_filled_by_the_caller(
    tmp_path, devices, monkeypatch, homes, threads
):
    _, checkpoint, plan = moe(tmp_path)
    seen = []
    watched(monkeypatch, before=lambda device: seen.append(threading.current_thread()))
    fill(plan, checkpoint, buffers_on(plan, homes), Limits(threads, **SCRATCH))
    assert seen == [threading.main_thread()] * len(set(homes.values()))


def test_streams_are_created_in_the_thread_of_the_caller(tmp_path, monkeypatch):
    _, checkpoint, plan = moe(tmp_path)
    simulated, seen = Devices(), []

    def transfer_device(device):
        seen.append(threading.current_thread())
        return simulated(device)

    monkeypatch.setattr(filling, "transfer_device", transfer_device)
    fill(plan, checkpoint, buffers_on(plan, HOMES), Limits(**SCRATCH))
    assert set(seen) == {threading.main_thread()}


def test_torch_thread_state_of_the_caller_is_set_in_all_threads(tmp_path, devices, monkeypatch):
    _, checkpoint, plan = moe(tmp_path)
    seen = set()
    watched(
        monkeypatch,
        before=lambda device: seen.add((torch.is_inference_mode_enabled(), torch.get_default_device().type)),
    )
    with torch.inference_mode(), torch.device("meta"):
        fill(plan, checkpoint, buffers_on(plan, HOMES), Limits(**SCRATCH))
    assert seen == {(True, "meta")}


def test_transformers_code_fills_inference_tensors_of_any_device(tmp_path, devices):
    tensors, checkpoint, plan = moe(tmp_path)
    rows = (plan.sources.names.index("norm.weight"),)
    fallback = Fallback("a test", lambda sources: {"extra": sources[rows[0]] * 1})
    plan = plan_of(plan.sources, *plan.targets, Target("extra", "BF16", (7,), -1, rows, (), fallback))
    with torch.inference_mode():
        buffers = buffers_on(plan, HOMES | {"extra": HOST})
        fill(plan, checkpoint, buffers, Limits(**SCRATCH))
    assert_bytes_equal(buffers["extra"], tensors["norm.weight"])


@pytest.mark.parametrize("kind", [ReadError, ConversionError, RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("threads", [1, 6])
def test_error_names_targets_of_complete_devices(tmp_path, devices, monkeypatch, kind, threads):
    _, checkpoint, plan = moe(tmp_path)
    complete = threading.Semaphore(0)

    def failing(device):
        if device == HOST:
            assert complete.acquire(timeout=30)
            assert complete.acquire(timeout=30)
            raise kind("no such device")

    watched(monkeypatch, before=failing, after=lambda device: complete.release())
    with pytest.raises(kind, match="no such device") as raised:
        fill(plan, checkpoint, buffers_on(plan, HOMES), Limits(threads, **SCRATCH))
    assert names_filled(raised.value, HOMES) == ["down", "gate_up"]


def stops_of(monkeypatch):
    """Record the events that end loads, as the executors receive them."""
    stops, stock = [], filling._fill_device

    def noting(*arguments):
        stops.append(arguments[-1])
        return stock(*arguments)

    monkeypatch.setattr(filling, "_fill_device", noting)
    return stops


def assert_some_are_filled(error, buffers, homes):
    """Check that only a part of the first device's targets is reported, and that these have their bytes."""
    filled = [name for name in names_filled(error, homes) if name != "u"]
    text = "\n".join([str(error), *getattr(error, "__notes__", ())])
    assert f"filled:   {len(filled)} of {MANY} targets" in text
    assert len(filled) < MANY
    for name in filled:
        start = 5000 * int(name[1:])
        assert_bytes_equal(host_bytes(buffers[name]), address_valued((32, 64), torch.float32, start))


def test_error_on_one_device_ends_the_load_of_the_others(many, devices, calls, monkeypatch):
    checkpoint, plan, homes = many
    (path,) = (file for file in checkpoint.files if file.endswith("b.safetensors"))
    os.unlink(path)  # so that only the first device reads
    stops = stops_of(monkeypatch)
    calls.delay = lambda number: number < 3 or stops[0].wait(10)
    buffers = buffers_on(plan, homes)
    with pytest.raises(ReadError, match=r"b\.safetensors") as raised:
        fill(plan, checkpoint, buffers, Limits(2, 4 * 8192, 8192))
    assert calls.reads < MANY
    assert_some_are_filled(raised.value, buffers, homes)
    del raised  # its traceback keeps objects of the threads alive
    assert_settled(devices, calls)


def test_interrupt_ends_the_loads_of_all_devices(many, devices, calls, monkeypatch):
    checkpoint, plan, homes = many
    stops = stops_of(monkeypatch)

    def interrupt(number):
        if number == 5:
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        if number >= 5:
            stops[0].wait(10)

    calls.delay = interrupt
    buffers = buffers_on(plan, homes)
    with pytest.raises(KeyboardInterrupt) as raised:
        fill(plan, checkpoint, buffers, Limits(2, 4 * 8192, 8192))
    assert calls.reads < MANY
    assert_some_are_filled(raised.value, buffers, homes)
    del raised  # its traceback keeps objects of the threads alive
    assert_settled(devices, calls)


def test_failures_on_two_devices_are_both_reported(tmp_path, devices, monkeypatch):
    _, checkpoint, plan = moe(tmp_path)
    stock = filling._fill_device

    def failing(part, *how):
        if part.device == SECOND:
            raise ReadError("the first to fail")
        how[-1].wait(10)
        if part.device == FIRST:
            raise RuntimeError("out of memory")
        return stock(part, *how)

    monkeypatch.setattr(filling, "_fill_device", failing)
    with pytest.raises(ReadError, match=r"the first to fail[\s\S]*on xpu:0, RuntimeError: out of memory"):
        fill(plan, checkpoint, buffers_on(plan, HOMES), Limits(**SCRATCH))


def test_device_that_fails_in_the_middle_settles_and_ends_the_other(many, devices, calls, monkeypatch):
    checkpoint, plan, homes = many
    devices[SECOND].fail_at = 1
    stops, begun = stops_of(monkeypatch), threading.Event()
    # The first read is that of the second device, which has only one.
    watched(monkeypatch, before=lambda device: device == SECOND or begun.wait(10))
    calls.delay = lambda number: begun.set() if number == 1 else number < 4 or stops[0].wait(10)
    with pytest.raises(RuntimeError, match="an illegal access"):
        fill(plan, checkpoint, buffers_on(plan, homes), Limits(2, 4 * 8192, 8192))
    assert calls.reads < MANY
    assert_settled(devices, calls)


def test_error_before_anything_is_read_names_nothing(tmp_path):
    _, checkpoint, plan = moe(tmp_path)
    buffers = allocate(plan.targets)
    with pytest.raises(ConversionError) as raised:
        fill(plan, checkpoint, {name: tensor.to(torch.float64) for name, tensor in buffers.items()}, Limits(threads=1))
    assert "filled:" not in str(raised.value)


LEAST = {True: streaming.LEAST_SCRATCH_BYTES, False: cpu.LEAST_SCRATCH_BYTES}
needs_of = st.builds(DeviceBytes, st.integers(0, 1 << 45), st.booleans())


@given(
    st.lists(needs_of, min_size=2, max_size=9),
    st.none() | st.integers(1, 64),
    st.none() | st.integers(9 * 8192, 1 << 32),
)
def test_shares_are_together_no_more_than_the_load_may_use(needs, threads, scratch_bytes):
    shares = split_limits(Limits(threads, scratch_bytes, 12345), needs)
    if scratch_bytes is None:  # each device uses what its threads need
        assert {share.scratch_bytes for share in shares} == {None}
    else:
        assert sum(share.scratch_bytes for share in shares) <= scratch_bytes
    for share, need in zip(shares, needs, strict=True):
        assert share.threads >= 1
        assert scratch_bytes is None or share.scratch_bytes >= LEAST[need.is_streamed]
        assert scratch_bytes is None or not need.is_streamed or share.scratch_bytes.bit_count() == 1
        assert share.device_scratch_bytes == 12345
    if threads is not None and threads >= len(needs):
        assert sum(share.threads for share in shares) == threads


def test_shares_go_by_the_bytes_of_a_device():
    needs = [DeviceBytes(3 << 30, True), DeviceBytes(1 << 30, True)]
    shares = split_limits(Limits(18, 64 << 20), needs)
    assert [share.threads for share in shares] == [13, 5]
    assert [share.scratch_bytes for share in shares] == [32 << 20, 16 << 20]


def test_single_device_gets_the_whole_budget():
    assert split_limits(Limits(), [DeviceBytes(7, True)]) == [Limits()]
    assert split_limits(Limits(3, 100, 200), [DeviceBytes(7, False)]) == [Limits(3, 100, 200)]
    assert split_limits(Limits(3, 100, 200), []) == []


def test_scratch_too_small_for_all_devices_is_refused_before_anything_is_read(tmp_path, devices, calls):
    _, checkpoint, plan = moe(tmp_path)
    least = 2 * streaming.LEAST_SCRATCH_BYTES + cpu.LEAST_SCRATCH_BYTES
    buffers = buffers_on(plan, HOMES)
    calls.reads = 0
    with pytest.raises(ConversionError, match=f"to 3 devices[\\s\\S]*scratch_bytes >= {least}"):
        fill(plan, checkpoint, buffers, Limits(scratch_bytes=least - 1))
    assert calls.reads == 0
    fill(plan, checkpoint, buffers, Limits(scratch_bytes=least, device_scratch_bytes=8192))
