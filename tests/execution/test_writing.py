"""Tests of slabs from host tensors, a device and files: the same file from all of them, in bounded memory."""

from __future__ import annotations

import gc
import importlib.util
import random
import threading

import pytest
import torch
from safetensors.torch import save_file
from torch.profiler import ProfilerActivity, profile

import automodel_conv as amc
from automodel_conv.dtypes import dtype_code
from automodel_conv.errors import ConversionError, ReadError, WriteError
from automodel_conv.execution import writing
from automodel_conv.execution.writing import LEAST_SCRATCH_BYTES, split_scratch
from automodel_conv.files import system
from automodel_conv.files.checkpoint import open_checkpoint
from automodel_conv.testing import address_valued, assert_bytes_equal, guarded
from tests.execution.simulated import DeviceFault, SimulatedDevice
from tests.execution.slab_writes import MAKERS, SLAB, Case, case_of, every_case, producer_of, write
from tests.execution.support import LAYOUTS, MERGE, columns, experts, naive, plan_of, target, write_checkpoint
from tests.files.remote.random_faults import within
from tests.loopback_faults import OTHER_SIZE, STALL, Faults
from tests.loopback_store import serve

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    return every_case(tmp_path_factory)


def assert_holds(path, case):
    opened = open_checkpoint(path)
    assert set(opened.names) == case.expected.keys()
    data = path.read_bytes()
    for name, tensor in case.expected.items():
        row = opened.position[name]
        assert (opened.dtypes[row], opened.shapes[row]) == (dtype_code(tensor.dtype), tuple(tensor.shape))
        held = bytearray(data[opened.offsets[row] : opened.offsets[row] + opened.nbytes[row]])
        assert_bytes_equal(torch.frombuffer(held, dtype=tensor.dtype).reshape(tensor.shape), tensor)


@pytest.fixture
def scratches(monkeypatch):
    """Poison and guard all host scratch, and check it at the end."""
    guards = []

    def allocate(nbytes):
        guards.append(guarded((nbytes,), torch.uint8))
        return guards[-1].tensor

    monkeypatch.setattr(writing, "_scratch", allocate)
    yield guards
    for scratch in guards:
        scratch.check()


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("slab_bytes", [256, SLAB, 1 << 16])
def test_files_hold_the_results_of_the_plan_from_every_producer(cases, tmp_path, scratches, kind, slab_bytes):
    for number, case in enumerate(cases):
        path = write(kind, case, tmp_path / str(number), slab_bytes=slab_bytes, input_bytes=slab_bytes // 2)
        assert_holds(path, case)
    assert scratches or kind == "device"


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float64, torch.bool, torch.float8_e4m3fn], ids=str)
def test_elements_of_any_width_are_written(tmp_path, kind, dtype):
    case = case_of(tmp_path / "source", *LAYOUTS["transposed"], dtype=dtype, wanted=dtype_code(dtype), pad=1)
    assert_holds(write(kind, case, tmp_path / "made"), case)


@pytest.mark.parametrize("kind", MAKERS)
def test_scalars_and_tensors_without_elements_are_written(tmp_path, kind):
    tensors = {"scalar": torch.tensor(1.5), "empty": torch.empty(0, 3), "a": address_valued((5,), torch.float32, 3)}
    checkpoint = write_checkpoint(tmp_path / "source", {"a.safetensors": tensors})
    sources = columns(checkpoint)
    plan = plan_of(sources, *(target(sources, name, "F32", [[name]]) for name in ("scalar", "a")))
    case = Case(tensors, checkpoint, plan, naive(plan, tensors))
    assert_holds(write(kind, case, tmp_path / "made"), case)


def with_gaps(tensor):
    return torch.stack([tensor, tensor], -1)[..., 0]


def transposed(tensor):
    return tensor.t().contiguous().t() if tensor.dim() == 2 else with_gaps(tensor)


def inside_larger(tensor):
    """Return the values as a part of a larger tensor, neither at its start nor contiguous."""
    around = torch.zeros([size + 3 for size in tensor.shape], dtype=tensor.dtype)
    inner = around[tuple(slice(2, 2 + size) for size in tensor.shape)]
    inner.copy_(tensor)
    return inner


@pytest.mark.parametrize("kind", ["host", "device"])
@pytest.mark.parametrize("arrange", [with_gaps, transposed, inside_larger])
def test_tensors_of_any_strides_are_read(cases, tmp_path, scratches, kind, arrange):
    for number, case in enumerate(cases):
        tensors = {name: arrange(tensor) for name, tensor in case.tensors.items()}
        assert not all(tensor.is_contiguous() for tensor in tensors.values())
        assert_holds(write(kind, case, tmp_path / str(number), tensors=tensors), case)


@needs_triton
@pytest.mark.parametrize("wanted", ["BF16", "F32"])
def test_kernels_write_the_same_bytes(tmp_path, wanted):
    case = case_of(tmp_path / "source", *LAYOUTS["transposed"], wanted=wanted, shape=(2, 16, 32))
    path = write("device", case, tmp_path / "made", slab_bytes=8192, threads=1, backend="triton")
    assert_holds(path, case)


def test_inference_tensors_are_written(cases, tmp_path):
    with torch.inference_mode():
        tensors = {name: tensor.clone() for name, tensor in cases[2].tensors.items()}
    assert_holds(write("host", cases[2], tmp_path / "a", tensors=tensors), cases[2])
    with torch.inference_mode():
        assert_holds(write("host", cases[2], tmp_path / "b", tensors=tensors), cases[2])


def fewer(count):
    """Return a replacement for a system call that transfers a few bytes at a time."""
    numbers = random.Random(count)
    return lambda most: numbers.randint(1, min(count, most))


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("most", [1, 7, 300])
def test_short_writes_give_the_same_file(cases, tmp_path, monkeypatch, kind, most):
    real, take, lock = system.pwritev, fewer(most), threading.Lock()

    def pwritev(fd, views, offset):
        with lock:
            count = take(len(views[0]))
        return real(fd, [views[0][:count]], offset)

    monkeypatch.setattr(system, "pwritev", pwritev)
    monkeypatch.setattr(system, "copy_range", lambda *arguments: 0)
    for number, case in enumerate(cases[: 2 if most == 1 else 4]):
        assert_holds(write(kind, case, tmp_path / str(number)), case)


def only_some(rng, real):
    """Return copies within the kernel that are short, or stop early, as at the end of an extent."""

    def copy_range(source, source_offset, target, target_offset, nbytes):
        if rng.random() < 0.3:
            return 0
        return real(source, source_offset, target, target_offset, rng.randint(1, nbytes))

    return copy_range


@pytest.mark.parametrize("way", ["not at all", "a few bytes at a time", "whole"])
def test_partial_copies_within_the_kernel_give_the_same_file(cases, tmp_path, monkeypatch, calls, way):
    real, copied = system.copy_range, []
    stand_in = {"not at all": lambda *a: 0, "a few bytes at a time": only_some(random.Random(3), real), "whole": real}

    def copy_range(*arguments):
        copied.append(stand_in[way](*arguments))
        return copied[-1]

    monkeypatch.setattr(system, "copy_range", copy_range)
    for repeat in range(1 if way != "a few bytes at a time" else 5):
        for number, case in enumerate(cases):
            assert_holds(write("files", case, tmp_path / f"{repeat}-{number}"), case)
            assert not calls.open  # files of the source, closed by the last user
    assert copied
    if way == "a few bytes at a time":
        assert 0 in copied
        assert any(copied)


def test_bytes_that_only_move_never_enter_the_process(tmp_path, calls):
    case = case_of(tmp_path / "source", shape=(4, 16, 32))
    before = calls.nbytes
    assert_holds(write("files", case, tmp_path / "made"), case)
    headers = calls.nbytes - before
    probe = tmp_path / "probe"
    probe.write_bytes(b"x" * 100)
    with probe.open("rb") as source, (tmp_path / "copy").open("wb") as copy:
        if not system.copy_range(source.fileno(), 0, copy.fileno(), 0, 100):
            pytest.skip("this file system has no copies within the kernel")
    assert headers <= 4096 < case.plan.bytes_read


@pytest.mark.parametrize("kind", MAKERS)
def test_failing_write_names_its_file_and_ends_all_threads(cases, tmp_path, monkeypatch, kind):
    real, count = system.pwritev, iter(range(1000))

    def pwritev(fd, views, offset):
        if next(count) == 5:
            raise OSError(28, "No space left on device")
        return real(fd, views, offset)

    monkeypatch.setattr(system, "pwritev", pwritev)
    monkeypatch.setattr(system, "copy_range", lambda *arguments: 0)
    with pytest.raises(WriteError, match=r"model\.safetensors(.|\n)*No space left"):
        write(kind, cases[4], tmp_path / "made", slab_bytes=256)
    assert not [t for t in threading.enumerate() if t.name.startswith("automodel_conv")]
    assert list((tmp_path / "made").iterdir()) == []


def test_read_that_fails_names_the_tensor(cases, tmp_path, calls):
    calls.fail_read = calls.reads + 3
    with pytest.raises(ReadError, match=r"experts\.(.|\n)*Input/output error"):
        write("files", cases[4], tmp_path / "made", slab_bytes=256, input_bytes=128)
    assert not calls.open


@pytest.mark.parametrize("fault", [{"fail_at": 7}, {"fail_allocation": 2}])
def test_failing_device_is_reported_and_its_output_removed(cases, tmp_path, fault):
    device = SimulatedDevice(**fault)
    with pytest.raises(DeviceFault):
        write("device", cases[4], tmp_path / "made", slab_bytes=256, device=device)
    gc.collect()
    assert device.live == 0
    assert list((tmp_path / "made").iterdir()) == []


def test_writer_waits_for_a_late_device(cases, tmp_path):
    for seed in range(16):
        case = cases[seed % len(cases)]
        device = SimulatedDevice(seed, eagerness=random.Random(seed).choice([0, 0.1, 0.9]))
        path = write("device", case, tmp_path / str(seed), threads=1 + seed % 3, slab_bytes=512, device=device)
        assert_holds(path, case)
        gc.collect()
        assert (device.live, device.idle) == (0, True)


class Scoped(SimulatedDevice):
    """A device that records the stream for which memory is allocated, or None for the thread's current one."""

    def __init__(self):
        super().__init__()
        self.taken_for = []

    def stream(self):
        stream = super().stream()

        def scratch(nbytes):
            self.taken_for.append(stream)
            return super(Scoped, self).scratch(nbytes)

        stream.scratch = scratch
        return stream

    def scratch(self, nbytes):
        self.taken_for.append(None)
        return super().scratch(nbytes)


def test_each_thread_allocates_on_the_stream_that_uses_the_memory(cases, tmp_path):
    """Memory on a thread's current stream may still be in use there by work that nothing waits for."""
    device = Scoped()
    assert_holds(write("device", cases[4], tmp_path, threads=3, device=device), cases[4])
    assert device.taken_for
    assert None not in device.taken_for
    assert len(set(map(id, device.taken_for))) == len(device.taken_for)


@pytest.mark.parametrize("reads_files", [False, True])
@pytest.mark.parametrize("scratch_bytes", [LEAST_SCRATCH_BYTES, 100_003, 1 << 20, 64 << 20, 256 << 20])
def test_shares_of_a_budget_do_not_exceed_it(scratch_bytes, reads_files):
    for threads in (1, 2, 3, 16, 100):
        share = split_scratch(threads, scratch_bytes, reads_files=reads_files)
        assert 1 <= share.threads <= threads
        assert share.scratch_bytes <= scratch_bytes
        assert share.scratch_bytes >= scratch_bytes // 4
        assert share.slab_bytes % 64 == share.input_bytes % 64 == 0
        assert share.slab_bytes >= 1024
        assert (share.input_bytes >= 1024) == reads_files
    assert 1 <= split_scratch(None, scratch_bytes, reads_files=reads_files).threads <= 16


@pytest.mark.parametrize(
    "options", [(0, 1 << 20), (-1, 1 << 20), (1, LEAST_SCRATCH_BYTES - 1), ("2", 1 << 20), (1, 1e9)]
)
def test_impossible_budgets_are_refused(options):
    with pytest.raises(ConversionError, match=r"threads >= 1, scratch_bytes >= "):
        split_scratch(*options, reads_files=True)


def peak_bytes(work):
    """Return the peak of host memory that torch allocated while ``work`` ran, beyond the memory before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        kept = work()
    level = peak = 0
    for event in seen.profiler.kineto_results.events():
        if event.name() == "[memory]":
            level += event.nbytes()
            peak = max(peak, level)
    del kept
    return peak


def test_measured_peak_subtracts_released_memory():
    assert 3_000_000 <= peak_bytes(lambda: torch.empty(3_000_000, dtype=torch.uint8).numel()) < 3_001_000
    assert peak_bytes(lambda: [torch.empty(1000, dtype=torch.uint8).clone().numel() for _ in range(9)]) < 2500


@pytest.mark.parametrize("kind", ["host", "files"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("wanted", ["BF16", "F32"])
def test_memory_stays_within_the_budget(tmp_path, kind, layout, wanted):
    tensors = experts(2, 300, 200, torch.bfloat16)
    checkpoint = write_checkpoint(tmp_path, {"a.safetensors": tensors})
    sources = columns(checkpoint)
    plan = plan_of(
        sources,
        *(
            target(sources, name, wanted, [[f"experts.0.{name}", f"experts.1.{name}"]], [MERGE, *LAYOUTS[layout]])
            for name in ("gate", "up", "down")
        ),
    )
    case = Case(tensors, checkpoint, plan, {})
    share = split_scratch(1, 100_000, reads_files=kind == "files")
    with producer_of(kind, case, share.slab_bytes, share.input_bytes) as (_, slabs, start):

        def work():
            maker = start()
            for slab in slabs.slabs:
                assert sum(map(len, maker(slab))) == slab.nbytes
            return maker

        peak = peak_bytes(work)
    assert len(slabs.slabs) > 5
    assert share.slab_bytes <= peak <= share.scratch_bytes <= 100_000


def test_device_memory_stays_within_the_budget(cases, tmp_path):
    device = SimulatedDevice()
    write("device", cases[4], tmp_path, threads=3, device=device)
    assert 0 < device.pinned_bytes <= 3 * SLAB
    assert 0 < device.scratch_bytes <= 3 * SLAB


@pytest.mark.parametrize(
    "faults",
    [
        Faults({2: STALL, 3: OTHER_SIZE}, ending="model.safetensors"),
        Faults({2: OTHER_SIZE, 3: STALL}, ending="model.safetensors"),
    ],
)
def test_changed_file_on_a_server_ends_a_conversion_while_another_thread_waits_for_bytes(tmp_path, faults):
    (tmp_path / "served").mkdir()
    save_file({"w": torch.arange(1 << 20, dtype=torch.float32)}, tmp_path / "served" / "model.safetensors")
    with serve(tmp_path / "served", faults=faults) as server:
        url = f"{server.url}/model.safetensors"
        options = {"rules": [], "threads": 2, "scratch_bytes": 1 << 18}
        with pytest.raises(ReadError, match="has changed"):
            within(15, lambda: amc.convert_checkpoint(url, tmp_path / "out", **options))
        assert len(server.requests) >= 4
