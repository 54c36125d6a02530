"""Tests of ``memory_budget``: kept by reported and by allocated bytes, or refused before anything is read."""

from __future__ import annotations

import tracemalloc

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.profiler import ProfilerActivity, profile

import automodel_conv as amc
from automodel_conv.execution import device as streaming
from automodel_conv.execution import filling
from automodel_conv.execution import host as cpu
from automodel_conv.files import system
from automodel_conv.planning.copies import Fallback
from automodel_conv.schedule.jobs import GAP_BYTES
from automodel_conv.testing import POISON, assert_bytes_equal
from tests.execution.simulated import SimulatedDevice

# For a device: the least pinned memory is a quarter of the budget, and a power of two.
LEAST_ON_DEVICE = 5 * streaming.LEAST_SCRATCH_BYTES


class Cast(nn.Module):
    """Parameters to which a bfloat16 checkpoint is cast: all bytes pass through scratch."""

    def __init__(self):
        super().__init__()
        self.wide = nn.Parameter(torch.empty(700, 300))
        self.narrow = nn.Parameter(torch.empty(90_000))
        self.scalar = nn.Parameter(torch.empty(()))
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.reshape(-1).view(torch.uint8).fill_(POISON)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    directory = tmp_path_factory.mktemp("published")
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randn(tensor.shape, generator=generator).to(torch.bfloat16)
        for name, tensor in Cast().state_dict().items()
    }
    save_file(tensors, directory / "model.safetensors")
    return directory, tensors


def assert_loaded(state, tensors):
    for name, tensor in tensors.items():
        assert_bytes_equal(state[name].detach(), tensor.float())


def torch_peak(work):
    """Return the peak of torch's allocations while ``work`` ran, in this thread."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        kept = work()
    level = peak = 0
    for event in seen.profiler.kineto_results.events():
        if event.name() == "[memory]":
            level += event.nbytes()
            peak = max(peak, level)
    del kept
    return peak


def python_peak(work):
    """Return the peak of Python's allocations while ``work`` ran, including bytearrays of threads."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.fixture
def reads(monkeypatch):
    """Record the offsets of all reads of tensor data."""
    seen = []
    real = system.preadv

    def counted(fd, views, offset):
        if offset >= 16:
            seen.append(offset)
        return real(fd, views, offset)

    monkeypatch.setattr(system, "preadv", counted)
    return seen


@pytest.mark.parametrize("budget", [cpu.LEAST_SCRATCH_BYTES, 5000, 65_537, 1 << 20, 1 << 30])
@pytest.mark.parametrize("threads", [1, 2, 7])
def test_the_report_stays_within_the_budget(published, budget, threads):
    directory, tensors = published
    model = Cast()
    report = amc.load_model(model, directory, memory_budget=budget, threads=threads)
    assert 0 < report.peak_extra_bytes <= budget
    assert_loaded(model.state_dict(), tensors)
    loaded = amc.load_state_dict(directory, Cast(), memory_budget=budget, threads=threads)
    assert 0 < loaded.report.peak_extra_bytes <= budget
    assert_loaded(loaded, tensors)


@pytest.mark.parametrize("budget", [cpu.LEAST_SCRATCH_BYTES, 20_000, 300_000])
def test_torch_allocates_no_more_than_the_budget(published, budget):
    directory, _ = published
    model = Cast()
    peak = torch_peak(lambda: amc.load_model(model, directory, memory_budget=budget, threads=1))
    without = torch_peak(lambda: amc.load_model(model, directory, threads=1))
    assert peak <= budget + 1024 < without  # small tensors of the plan


def test_python_allocates_no_more_for_more_threads(published):
    """Check that bytes between wanted ones are read to one place, not to ``GAP_BYTES`` per thread."""
    directory, _ = published
    model = Cast()
    load = lambda threads: amc.load_model(model, directory, memory_budget=1 << 20, threads=threads)  # noqa: E731
    load(1)  # fills caches between loads
    assert python_peak(lambda: load(8)) < python_peak(lambda: load(1)) + 4 * GAP_BYTES


def test_a_budget_does_not_make_scratch_larger(published):
    directory, _ = published
    report = amc.load_model(Cast(), directory, memory_budget=1 << 40, threads=1)
    assert report.peak_extra_bytes <= cpu.DEFAULT_SCRATCH_BYTES


@pytest.mark.parametrize("budget", [0, 1, cpu.LEAST_SCRATCH_BYTES - 1])
def test_a_budget_that_is_too_small_is_refused_before_anything_is_read(published, reads, budget):
    directory, _ = published
    model = Cast()
    with pytest.raises(amc.ConversionError, match=f"at least {cpu.LEAST_SCRATCH_BYTES} bytes"):
        amc.load_model(model, directory, memory_budget=budget)
    with pytest.raises(amc.ConversionError, match=rf"found: *{budget}\n"):
        amc.load_state_dict(directory, model, memory_budget=budget)
    assert reads == []
    assert all((p.reshape(-1).view(torch.uint8) == POISON).all() for p in model.parameters())
    amc.load_model(model, directory)
    assert reads


def test_explicit_scratch_is_kept_and_must_fit(published, reads):
    directory, tensors = published
    model = Cast()
    report = amc.load_model(model, directory, memory_budget=50_000, scratch_bytes=30_000, threads=1)
    assert cpu.LEAST_SCRATCH_BYTES < report.peak_extra_bytes <= 30_000
    assert_loaded(model.state_dict(), tensors)
    reads.clear()
    with pytest.raises(amc.ConversionError, match="at least 50001 bytes"):
        amc.load_model(model, directory, memory_budget=50_000, scratch_bytes=50_001)
    assert reads == []


def test_second_copies_of_one_parameter_count_in_the_budget(tmp_path):
    """Load a checkpoint with both names of a tied parameter: one is read to a second buffer and compared."""
    model = nn.Module()
    model.one, model.other = nn.Linear(40, 30, bias=False), nn.Linear(40, 30, bias=False)
    model.other.weight = model.one.weight
    weight = torch.randn(30, 40)
    save_file({"one.weight": weight, "other.weight": weight.clone()}, tmp_path / "model.safetensors")
    least = weight.nbytes + cpu.LEAST_SCRATCH_BYTES
    with pytest.raises(amc.ConversionError, match=f"at least {least} bytes"):
        amc.load_model(model, tmp_path, memory_budget=least - 1)
    report = amc.load_model(model, tmp_path, memory_budget=least)
    assert weight.nbytes <= report.peak_extra_bytes <= least
    assert_bytes_equal(model.other.weight.detach(), weight)


def test_targets_computed_by_transformers_are_refused(published, monkeypatch, reads):
    directory, _ = published
    model = Cast()
    checkpoint = amc.open_checkpoint(directory)
    plan = amc.compile_plan(checkpoint, model)
    fallback = Fallback("a test", lambda tensors: {})
    plan = type(plan)(plan.sources, (plan.targets[0]._replace(copies=(), fallback=fallback), *plan.targets[1:]))
    with pytest.raises(
        amc.UnsupportedError,
        match=r"memory_budget cannot be kept: only transformers' own code[\s\S]*" + plan.targets[0].name,
    ):
        filling.limits_in_budget(1 << 30, filling.Limits(), plan, model.state_dict())
    assert filling.limits_in_budget(None, filling.Limits(), plan, model.state_dict()) == filling.Limits()


class Watched(SimulatedDevice):
    """A simulated device that records pinned memory as torch allocates it: rounded up to a power of two."""

    def __init__(self):
        super().__init__()
        self.rounded_bytes = 0

    def pinned(self, nbytes):
        self.rounded_bytes += 1 << (nbytes - 1).bit_length()
        return super().pinned(nbytes)


@pytest.fixture
def devices(monkeypatch):
    created = []

    def device(of):
        created.append(Watched())
        return created[-1]

    monkeypatch.setattr(filling, "transfer_device", device)
    return created


def allocated(devices):
    return sum(device.rounded_bytes + device.scratch_bytes for device in devices)


@pytest.mark.parametrize("budget", [LEAST_ON_DEVICE, 50_000, 100_000, 123_457, 1 << 20, 1 << 24, 1 << 40])
@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_host_and_device_together_stay_within_the_budget(published, devices, budget, threads):
    directory, tensors = published
    model = Cast()
    report = amc.load_model(model, directory, memory_budget=budget, threads=threads)
    assert 0 < report.peak_extra_bytes <= budget
    assert 0 < allocated(devices) <= budget
    assert_loaded(model.state_dict(), tensors)


@pytest.mark.parametrize("threads", [None, 1, 3, 5, 6, 7, 8])
@pytest.mark.parametrize("mib", [40, 255, 256, 257, 300, 384, 512, 1000])
def test_pinned_memory_rounded_by_torch_stays_within_the_budget(published, devices, monkeypatch, mib, threads):
    monkeypatch.setattr(streaming, "default_reader_threads", lambda most: 3)
    plan = amc.compile_plan(published[0], Cast())
    limits = filling.limits_in_budget(mib << 20, filling.Limits(threads), plan, Cast().state_dict())
    ring = streaming.ring_of(limits.threads, limits.scratch_bytes)
    assert (1 << (ring.nbytes - 1).bit_length()) + limits.device_scratch_bytes <= mib << 20


@pytest.mark.parametrize("budget", [0, 10_000, 2 * streaming.LEAST_SCRATCH_BYTES - 1])
def test_a_budget_too_small_for_a_device_is_refused_before_anything_is_read(published, devices, reads, budget):
    directory, _ = published
    with pytest.raises(amc.ConversionError, match=r"at least \d+ bytes"):
        amc.load_model(Cast(), directory, memory_budget=budget)
    assert reads == []
    assert allocated(devices) == 0


def test_budget_named_in_an_error_is_enough(published, devices):
    directory, tensors = published
    given = [
        {},
        {"scratch_bytes": 16_384},
        {"device_scratch_bytes": 20_000},
        {"scratch_bytes": 16_384, "device_scratch_bytes": 20_000},
    ]
    for scratch in given:
        with pytest.raises(amc.ConversionError, match="at least") as caught:
            amc.load_model(Cast(), directory, memory_budget=100, **scratch)
        needed = int(str(caught.value).split("at least ")[1].split()[0])
        devices.clear()
        model = Cast()
        report = amc.load_model(model, directory, memory_budget=needed, threads=1, **scratch)
        assert report.peak_extra_bytes <= needed
        assert allocated(devices) <= needed
        assert_loaded(model.state_dict(), tensors)


@pytest.mark.parametrize(
    "scratch",
    [
        {"scratch_bytes": 16_384},
        {"device_scratch_bytes": 30_000},
        {"scratch_bytes": 16_384, "device_scratch_bytes": 30_000},
    ],
    ids=str,
)
def test_explicit_scratch_sizes_are_kept_on_a_device(published, devices, reads, scratch):
    directory, tensors = published
    model = Cast()
    report = amc.load_model(model, directory, memory_budget=100_000, threads=1, **scratch)
    assert report.peak_extra_bytes <= 100_000
    assert sum(device.pinned_bytes for device in devices) <= scratch.get("scratch_bytes", 100_000)
    assert sum(device.scratch_bytes for device in devices) <= scratch.get("device_scratch_bytes", 100_000)
    assert_loaded(model.state_dict(), tensors)
    reads.clear()
    with pytest.raises(amc.ConversionError, match="memory_budget is too small"):
        amc.load_model(model, directory, memory_budget=16_383, **scratch)
    assert reads == []


@pytest.mark.parametrize("layout", [None, "nemo", "gpt_oss"])
@pytest.mark.parametrize("budget", [LEAST_ON_DEVICE, 200_000])
@pytest.mark.parametrize("on_device", [False, True], ids=["host", "device"])
def test_every_layout_of_experts_stays_within_the_budget(tmp_path, request, layout, budget, on_device):
    pytest.importorskip("transformers", reason="needs a transformers model")
    from tests.model_zoo import build_model, write_checkpoint

    write_checkpoint(build_model("mixtral"), tmp_path)
    wanted = amc.load_state_dict(tmp_path, layout=layout)
    devices = request.getfixturevalue("devices") if on_device else []
    loaded = amc.load_state_dict(tmp_path, layout=layout, memory_budget=budget)
    assert loaded.report.peak_extra_bytes <= budget
    assert allocated(devices) <= budget
    assert loaded.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert_bytes_equal(loaded[name], tensor)
