"""The streaming loader, driven by a simulated device: late, out of order, failing anywhere."""

from __future__ import annotations

import gc
import importlib.util
import inspect
import itertools
import random
import threading
import time
import types
from typing import NamedTuple
from unittest import mock

import pytest
import torch

from automodel_conv.dtypes import torch_dtype
from automodel_conv.errors import ConversionError, ReadError, UnsupportedError
from automodel_conv.execution import copy_batch
from automodel_conv.execution import device as streaming
from automodel_conv.execution.buffers import allocate
from automodel_conv.execution.device import MOST_COMPILED, load_to_device, ring_of
from automodel_conv.execution.workers import Stopped
from automodel_conv.kernels import launch
from automodel_conv.planning.copies import Fallback, Target
from automodel_conv.planning.operations import Operation
from automodel_conv.schedule.device import device_schedule
from automodel_conv.testing import address_valued, assert_bytes_equal, guarded
from tests.execution.simulated import DeviceFault, Event, SimulatedDevice
from tests.execution.support import LAYOUTS, columns, experts, moe, naive, plan_of, target, write_checkpoint

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
SMALL = {"scratch_bytes": 8192, "device_scratch_bytes": 8192}


class Case(NamedTuple):
    checkpoint: object
    plan: object
    expected: dict


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    """Each layout, with and without a cast, over several windows and many chunks; and one with no window."""
    made = []
    for layout, code in itertools.product(LAYOUTS, ("BF16", "F32")):
        directory = tmp_path_factory.mktemp("case")
        tensors, checkpoint, plan = moe(directory, *LAYOUTS[layout], pad=len(made) % 3, shape=(7, 18, 26))
        targets = [t._replace(dtype=code) if t.name != "norm" else t for t in plan.targets]
        plan = plan_of(plan.sources, *targets)
        made.append(Case(checkpoint, plan, naive(plan, tensors)))
    return made


def load(case, device, **options):
    """Load into poisoned, guarded buffers, which are compared if the load returns."""
    guards = {t.name: guarded(t.shape, torch_dtype(t.dtype)) for t in case.plan.targets}
    function = options.pop("load_to_device", load_to_device)
    options = {"backend": "torch", **SMALL, **options}
    found = {name: guard.tensor for name, guard in guards.items()}
    try:
        stats = function(case.plan, case.checkpoint, found, device, **options)
        for name, tensor in found.items():
            assert_bytes_equal(tensor, case.expected[name])
        return stats
    except (ReadError, DeviceFault, Stopped) as error:
        text = "".join([str(error), *getattr(error, "__notes__", ())])
        assert "filled:" in text
        for name in (line.strip() for line in text.partition("filled:")[2].splitlines()[1:]):
            assert_bytes_equal(found[name], case.expected[name])
        raise
    finally:
        for guard in guards.values():
            guard.check()


def assert_released(device, calls):
    assert device.idle
    assert not calls.open
    assert not [t for t in threading.enumerate() if t.name.startswith("automodel_conv")]
    if device.live:
        gc.collect()
    assert device.live == 0


def run_schedule(cases, seed, calls, load_to_device=load_to_device):
    """One load of one case with delays, and perhaps a fault, all drawn from a seed."""
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


def test_a_thousand_random_schedules_neither_leak_nor_hang_nor_write_a_wrong_byte(cases, calls):
    for seed in range(1000):
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


def planted(text, replacement):
    """The loader with a fault in it."""
    source = inspect.getsource(streaming)
    assert source.count(text) == 1
    mutated = types.ModuleType("mutated")
    exec(compile(source.replace(text, replacement), "mutated", "exec"), mutated.__dict__)
    return mutated


@pytest.mark.parametrize("mutant", MUTANTS)
def test_random_schedules_find_each_fault_planted_in_the_loader(cases, calls, mutant):
    mutated = planted(*MUTANTS[mutant])
    with pytest.raises((AssertionError, KeyError, Stopped)):  # noqa: PT012
        for seed in range(300):
            run_schedule(cases, seed, calls, mutated.load_to_device)
    gc.collect()  # which ends the threads of a pool that nobody has shut down
    for thread in threading.enumerate():
        if thread.name.startswith("automodel_conv"):
            thread.join(10)


# --- the schedule -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("slot_bytes", "window_bytes"), [(100, 4096), (4096, 128), (700, 640), (1 << 20, 1 << 20)])
def test_chunks_fill_windows_in_their_order_and_carry_each_byte_once(cases, slot_bytes, window_bytes):
    for case in cases:
        copies = [t.copies for t in case.plan.targets]
        chunks, windows = device_schedule(
            case.plan.targets, copies, case.checkpoint, {}, slot_bytes=slot_bytes, window_bytes=window_bytes
        )
        filled = [list(chunk.to_windows) for chunk in chunks if chunk.to_windows]
        assert [window for group in filled for window in group] == sorted(
            window for group in filled for window in group
        )
        assert [window.chunks for window in windows] == [
            sum(n in group for group in filled) for n in range(len(windows))
        ]
        assert all(window.nbytes <= window_bytes for window in windows)
        parts = sorted(read[:3] for chunk in chunks for read in chunk.reads.one_by_one())
        assert all(first[:1] != after[:1] or sum(first[1:]) <= after[1] for first, after in itertools.pairwise(parts))
        assert sum(part[2] for part in parts) == case.plan.bytes_read
        for chunk in chunks:
            assert chunk.reads.total_bytes <= slot_bytes
            uploads = [u for side in (chunk.to_targets, chunk.to_windows) for group in side.values() for u in group]
            spans = sorted((upload.slot_start, upload.slot_start + upload.nbytes) for upload in uploads)
            assert [start for start, _ in spans] == [0, *(stop for _, stop in spans[:-1])]
            assert spans[-1][1] == chunk.reads.total_bytes


def test_neighbours_that_stay_neighbours_are_one_upload(tmp_path):
    tensors = experts(5, 16, 32, torch.bfloat16)
    checkpoint = write_checkpoint(tmp_path, {"a.safetensors": tensors})
    sources = columns(checkpoint)
    plan = plan_of(sources, *(target(sources, name, "F32", [[name]]) for name in tensors))
    chunks, windows = device_schedule(
        plan.targets, [t.copies for t in plan.targets], checkpoint, {}, slot_bytes=1 << 20, window_bytes=1 << 20
    )
    [chunk], [window] = chunks, windows
    assert [len(uploads) for uploads in chunk.to_windows.values()] == [1]
    assert window.nbytes == plan.bytes_read


# --- what a load does and says ----------------------------------------------------------------------------------------


def test_memory_stays_within_what_is_given_for_it(cases, calls):
    for case in cases:
        device = SimulatedDevice()
        stats = load(case, device, threads=3, scratch_bytes=30000, device_scratch_bytes=20000)
        assert 0 < device.pinned_bytes == stats.scratch_bytes <= 30000
        assert device.scratch_bytes == stats.device_scratch_bytes <= 20000
        assert stats.bytes_read == case.plan.bytes_read
        assert_released(device, calls)


@pytest.mark.parametrize(
    ("threads", "scratch_bytes", "ring"),
    [
        (None, None, (4, 8 << 20)),
        (16, None, (16, 8 << 20)),
        (None, 1 << 30, (4, 16 << 20)),
        (None, 100 << 20, (4, 100 << 17)),
        (None, 40 << 20, (2, 10 << 20)),
        (None, 1 << 20, (1, 1 << 19)),
        (3, 1 << 20, (3, (1 << 20) // 6 // 64 * 64)),
        (3, 8192, (1, 4096)),
    ],
)
def test_slots_have_8_to_16_mib_unless_what_is_given_leaves_no_more(monkeypatch, threads, scratch_bytes, ring):
    monkeypatch.setattr(streaming, "default_reader_threads", lambda most: min(4, most))
    assert ring_of(threads, scratch_bytes) == ring


def test_slots_of_pinned_memory_start_where_any_element_may(cases, monkeypatch):
    made, real = [], streaming._Slot
    monkeypatch.setattr(streaming, "_Slot", lambda memory: made.append(real(memory)) or made[-1])
    load(cases[1], SimulatedDevice(), threads=3, scratch_bytes=30001)
    assert len(made) == 6
    assert all(slot.memory.data_ptr() % 64 == 0 for slot in made)


@needs_triton
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_tensors_made_in_inference_mode_are_filled_in_it(tmp_path, backend):
    tensors, checkpoint, plan = moe(tmp_path, *LAYOUTS["transposed"], shape=(3, 16, 32))
    with torch.inference_mode():
        found = allocate(plan.targets)
        load_to_device(plan, checkpoint, found, SimulatedDevice(eagerness=1), backend=backend, **SMALL)
    for name, tensor in naive(plan, tensors).items():
        assert_bytes_equal(found[name], tensor)


def test_nothing_is_allocated_for_copies_where_all_bytes_only_move(tmp_path, calls):
    tensors, checkpoint, plan = moe(tmp_path)
    device = SimulatedDevice()
    stats = load(Case(checkpoint, plan, naive(plan, tensors)), device)
    assert (device.scratch_bytes, stats.work) == (0, copy_batch.Work(0, 0))


def test_triton_is_not_asked_for_where_all_bytes_only_move_and_otherwise_not_by_the_caller(tmp_path, monkeypatch):
    asked = []

    def takes_kernels(backend, tensors):
        asked.append(threading.current_thread().name)
        return False

    monkeypatch.setattr(streaming, "takes_kernels", takes_kernels)
    tensors, checkpoint, plan = moe(tmp_path / "moves")
    load(Case(checkpoint, plan, naive(plan, tensors)), SimulatedDevice(), backend="auto")
    assert asked == []
    tensors, checkpoint, plan = moe(tmp_path / "turns", *LAYOUTS["transposed"], shape=(3, 16, 32))
    load(Case(checkpoint, plan, naive(plan, tensors)), SimulatedDevice(), backend="auto")
    assert len(asked) == 1
    assert asked[0].startswith("automodel_conv")


@needs_triton
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("code", ["BF16", "F32"])
def test_kernels_make_the_same_bytes_and_are_compiled_before_they_are_needed(tmp_path, layout, code):
    tensors, checkpoint, plan = moe(tmp_path, *LAYOUTS[layout], shape=(3, 16, 32))
    plan = plan_of(plan.sources, *(t._replace(dtype=code) for t in plan.targets))
    launched = []

    def spy(variant, *arguments):
        launched.append(variant)
        return real(variant, *arguments)

    real = launch.queue
    with mock.patch.object(launch, "queue", spy):
        stats = load(Case(checkpoint, plan, naive(plan, tensors)), SimulatedDevice(), backend="triton", threads=2)
    variants = set(launched)
    assert len(variants) <= MOST_COMPILED
    assert set(launched[: len(variants)]) == variants
    if layout != "rows" or code == "F32":
        assert stats.work.by_kernels > 0


@needs_triton
def test_a_load_compiles_three_kernels_at_most_and_torch_makes_the_other_copies(tmp_path):
    shapes = {"a": (16, 32), "b": (33, 7), "c": (5, 3), "d": (64, 8), "e": (4, 36)}
    tensors = {name: address_valued(shape, torch.bfloat16) for name, shape in shapes.items()}
    checkpoint = write_checkpoint(tmp_path, {"a.safetensors": tensors})
    sources = columns(checkpoint)
    turned = [Operation("Transpose", (("dim0", 0), ("dim1", 1)))]
    targets = [target(sources, name, "BF16", [[name]], turned) for name in shapes]
    targets += [target(sources, f"{name}.wide", "F32", [[name]]) for name in shapes]
    targets += [target(sources, f"{name}.turned.wide", "F32", [[name]], turned) for name in shapes]
    plan = plan_of(sources, *targets)
    launched = set()
    real = launch.queue
    with mock.patch.object(launch, "queue", lambda *a: (launched.add(a[0]), real(*a))):
        stats = load(Case(checkpoint, plan, naive(plan, tensors)), SimulatedDevice(), backend="triton")
    assert len(launched) == MOST_COMPILED
    assert stats.work.by_kernels > 0
    assert stats.work.by_torch > 0
    assert sum(stats.work) >= len(targets)


def test_buffers_of_any_strides_are_filled(tmp_path):
    tensors, checkpoint, plan = moe(tmp_path, shape=(3, 6, 10))
    found = {}
    for t in plan.targets:
        strides = [2]
        for size in t.shape[:0:-1]:
            strides.insert(0, strides[0] * size + 3)
        found[t.name] = guarded(t.shape, torch_dtype(t.dtype), strides=strides)
    load_to_device(plan, checkpoint, {name: guard.tensor for name, guard in found.items()}, SimulatedDevice(), **SMALL)
    for name, tensor in naive(plan, tensors).items():
        found[name].check()
        assert_bytes_equal(found[name].tensor.contiguous(), tensor)


def test_targets_of_upstream_are_made_and_uploaded(tmp_path):
    tensors = {"a": address_valued((3, 4), torch.float32), "b": address_valued((5,), torch.bfloat16)}
    checkpoint = write_checkpoint(tmp_path, {"a.safetensors": tensors})
    sources = columns(checkpoint)
    fallback = Fallback("a test says so", lambda found: {"flat": found[0].flatten()})
    flat = Target("flat", "F32", (12,), -1, (0,), (), fallback)
    plan = plan_of(sources, flat, target(sources, "b", "BF16", [["b"]]))
    stats = load(Case(checkpoint, plan, {"flat": tensors["a"].flatten(), "b": tensors["b"]}), SimulatedDevice())
    assert stats.bytes_read == plan.bytes_read


# --- trouble ----------------------------------------------------------------------------------------------------------


def test_a_failing_read_is_told_at_once_while_other_threads_still_read(cases, calls):
    case = cases[1]
    calls.fail_read = 2
    both = threading.Barrier(2, timeout=5)
    calls.delay = lambda number: (both.wait(), time.sleep(0.2 if number == 1 else 0))
    with pytest.raises(ReadError, match="Input/output error") as error:
        load(case, SimulatedDevice(), threads=2, scratch_bytes=16384)
    assert calls.reads == 2
    assert "filled:" in str(error.value)


def test_a_failing_read_is_told_before_what_the_device_says_at_the_end(cases, calls):
    calls.fail_read = 2
    device = SimulatedDevice(eagerness=0, fail_at=1)  # which works only when it is waited for, at the end
    with pytest.raises(ReadError, match=r"Input/output error[\s\S]*besides: +DeviceFault: .*illegal access"):
        load(cases[0], device, threads=1, scratch_bytes=16384)
    assert_released(device, calls)


class Impatient(threading.Condition):
    """A condition on which nobody waits for more than two seconds, and that tells if somebody would have."""

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
    """A thread fails to read into the first window while another waits for that window to be emptied."""
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


def test_a_thread_that_waits_for_a_window_ends_when_another_fails(cases, calls, monkeypatch):
    fail_while_another_thread_waits(streaming, cases[2], calls, monkeypatch)


@pytest.mark.parametrize("reverse", [False, True])
def test_a_failing_read_is_told_where_another_thread_is_stopped_and_the_device_fails(
    cases, calls, monkeypatch, reverse
):
    told, settle, wait = [], streaming._DeviceLoad._synchronize, streaming.wait

    def fail_at_the_end(load, stream):
        settle(load, stream)
        raise DeviceFault("at the end")

    def wait_for(futures, **options):
        wait(futures, **options)
        if reverse:  # either thread may be the one that fails
            futures.reverse()

    monkeypatch.setattr(streaming, "wait", wait_for)
    monkeypatch.setattr(streaming._DeviceLoad, "_synchronize", fail_at_the_end)
    monkeypatch.setattr(streaming, "tell", lambda error, text: told.append((type(error), text)))
    fail_while_another_thread_waits(streaming, cases[2], calls, monkeypatch)
    assert told == [(ReadError, "  besides:  DeviceFault: at the end")]


@pytest.mark.parametrize(
    ("text", "replacement"),
    [
        ("self._stopped = True\n            self._changed.notify_all()", "self._stopped = True"),
        ("if self._stopped:\n                    raise Stopped", "pass"),
    ],
    ids=["it is not woken", "it goes on"],
)
def test_a_thread_that_would_wait_or_go_on_after_the_end_is_found(cases, calls, monkeypatch, text, replacement):
    with pytest.raises(AssertionError):
        fail_while_another_thread_waits(planted(text, replacement), cases[2], calls, monkeypatch)


@pytest.mark.parametrize("before", [0, 1])
def test_a_load_that_is_asked_to_end_releases_everything_and_tells_what_is_complete(cases, calls, before):
    stop = threading.Event()
    calls.delay = lambda number: stop.set() if number > before else None
    device = SimulatedDevice(eagerness=0.2)
    with pytest.raises(Stopped):
        load(cases[2], device, threads=2, stop=stop)
    assert calls.reads <= before + 4
    assert_released(device, calls)


def interrupt(module, case, calls, monkeypatch):
    """Ctrl-C while the main thread waits for the readers, which then begin no other chunk."""

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "wait", interrupted)
    calls.reads, calls.delay = 0, lambda number: time.sleep(0.02)
    device = SimulatedDevice(eagerness=0)
    with pytest.raises(KeyboardInterrupt):
        load(case, device, threads=2, load_to_device=module.load_to_device)
    assert calls.reads <= 4
    assert_released(device, calls)


def test_ctrl_c_releases_everything(cases, calls, monkeypatch):
    interrupt(streaming, cases[1], calls, monkeypatch)


def test_readers_that_go_on_after_ctrl_c_are_found(cases, calls, monkeypatch):
    with pytest.raises(AssertionError):
        interrupt(planted("ending.callback(self._stop)", "pass"), cases[1], calls, monkeypatch)


def test_an_explicit_backend_is_refused_before_anything_is_read(cases, calls):
    with (
        mock.patch.object(copy_batch, "why_not", return_value="no compiler"),
        pytest.raises(UnsupportedError, match="no compiler"),
    ):
        load(cases[1], SimulatedDevice(), backend="triton")
    assert calls.reads == 0


@pytest.mark.parametrize("options", [{"threads": 0}, {"scratch_bytes": 8191}, {"device_scratch_bytes": 0}])
def test_impossible_options_are_refused(cases, options):
    with pytest.raises(ConversionError, match="expected"):
        load(cases[0], SimulatedDevice(), **options)


def test_progress_counts_all_bytes(cases, capsys):
    load(cases[1], SimulatedDevice(), progress=True)
    assert "100%" in capsys.readouterr().err


# --- the tests themselves ---------------------------------------------------------------------------------------------


def test_the_simulated_device_is_late_keeps_the_order_of_a_stream_and_finds_circles():
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


def test_the_simulated_device_keeps_its_first_fault():
    device = SimulatedDevice(eagerness=0, fail_at=2)
    stream = device.stream()
    done = []
    for number in range(3):
        stream.run(lambda number=number: done.append(number))
    with pytest.raises(DeviceFault, match="illegal access"):
        stream.record().synchronize()
    assert done == [0]
    assert device.idle
