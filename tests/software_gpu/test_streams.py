"""Tests of the streaming loader on the software GPU: right bytes on any schedule, and every planted race is found."""

from __future__ import annotations

import itertools
import random
import threading

import pytest
import torch

pytest.importorskip("triton")

import automodel_conv as amc
from automodel_conv.dtypes import torch_dtype
from automodel_conv.execution.buffers import allocate
from automodel_conv.execution.device import load_to_device
from automodel_conv.testing import assert_bytes_equal, guarded
from tests.execution import simulated
from tests.execution.simulated import DeviceFault
from tests.execution.support import LAYOUTS, moe, naive, plan_of
from tests.software_gpu import device as devices
from tests.software_gpu.accesses import GpuFault
from tests.software_gpu.device import SoftwareDevice

SMALL = {"scratch_bytes": 8192, "device_scratch_bytes": 8192}


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    """Return each layout, with and without a cast, over several windows and many chunks."""
    loads = []
    for layout, code in itertools.product(LAYOUTS, ("BF16", "F32")):
        directory = tmp_path_factory.mktemp("case")
        tensors, checkpoint, plan = moe(directory, *LAYOUTS[layout], pad=len(loads) % 3, shape=(7, 18, 26))
        plan = plan_of(plan.sources, *(t._replace(dtype=code) if t.name != "norm" else t for t in plan.targets))
        loads.append((checkpoint, plan, naive(plan, tensors)))
    return loads


def load(case, device, **options):
    """Fill guarded buffers with kernels, and compare them."""
    checkpoint, plan, expected = case
    guards = {t.name: guarded(t.shape, torch_dtype(t.dtype)) for t in plan.targets}
    buffers = {name: guard.tensor for name, guard in guards.items()}
    stats = load_to_device(plan, checkpoint, buffers, device, backend="triton", **{**SMALL, **options})
    for name, guard in guards.items():
        guard.check()
        assert_bytes_equal(guard.tensor, expected[name])
    return stats


def run_schedules(cases, gpu, make=None, seeds=range(40)):
    kernels = 0
    for seed in seeds:
        draw = random.Random(seed)
        device = (make or gpu.new_device)(seed=seed, eagerness=draw.choice([0, 0.1, 0.5, 0.9]))
        options = {"threads": draw.randint(1, 3), "scratch_bytes": draw.choice([8192, 20000, 40000])}
        options["device_scratch_bytes"] = draw.choice([8192, 8192, 16384])
        stats = load(draw.choice(cases), device, **options)
        assert device.idle
        kernels += stats.counts.by_kernels
    return kernels


def test_random_schedules_write_every_byte_through_kernels_without_races(cases, gpu):
    assert run_schedules(cases, gpu) > 300
    assert gpu.executor.variants
    # Only variants that were compiled while the first bytes were read.
    assert gpu.executor.variants <= gpu.executor.compiled_ahead


class OneRegion(SoftwareDevice):
    """A device whose two windows share memory."""

    def scratch(self, nbytes):
        if not hasattr(self, "region"):
            self.region = super().scratch(nbytes)
        return self.region


class SharedEnds(SoftwareDevice):
    """A device whose second window begins in the last bytes of the first."""

    def scratch(self, nbytes):
        if not hasattr(self, "both"):
            self.both = super().scratch(2 * nbytes)
            return self.both[:nbytes]
        return self.both[nbytes - 256 : 2 * nbytes - 256]


class OneSlot(SoftwareDevice):
    """A device whose slots all share the same pinned memory."""

    def pinned(self, nbytes):
        memory = super().pinned(nbytes)
        memory.view = lambda count, each: [memory[:each]] * count
        return memory


@pytest.mark.parametrize("planted", [OneRegion, SharedEnds, OneSlot])
def test_memory_used_by_two_streams_at_once_is_detected(cases, gpu, planted):
    def make(**how):
        gpu.devices.append(planted(gpu.memory, **how))
        return gpu.devices[-1]

    text = "two streams at once" if planted is not OneSlot else "pinned memory is written while it is uploaded"
    with pytest.raises((GpuFault, DeviceFault), match=text):
        run_schedules(cases, gpu, lambda **how: make(**how | {"eagerness": 0.9}))


def in_a_reader():
    return threading.current_thread().name.startswith("automodel_conv")


def test_slot_that_is_reused_early_is_found(cases, gpu, monkeypatch):
    waited = simulated.Event.synchronize
    monkeypatch.setattr(simulated.Event, "synchronize", lambda event: in_a_reader() or waited(event))
    with pytest.raises(GpuFault, match="pinned memory is written while it is uploaded"):
        run_schedules(cases, gpu, lambda **how: gpu.new_device(**how | {"eagerness": 0.9}))
    # A late device shows the fault by wrong bytes.
    with pytest.raises(AssertionError, match="elements differ"):
        run_schedules(cases, gpu, lambda **how: gpu.new_device(**how | {"eagerness": 0}))


def test_missing_wait_between_streams_is_detected_even_if_all_bytes_are_right(cases, gpu, monkeypatch):
    monkeypatch.setattr(devices.Stream, "wait", lambda stream, event: None)
    with pytest.raises(DeviceFault, match="two streams at once"):
        run_schedules(cases, gpu, lambda **how: gpu.new_device(**how | {"eagerness": 1}))


def test_fault_of_a_kernel_ends_a_load(cases, gpu, monkeypatch):
    from automodel_conv.kernels import transpose

    real = transpose.transpose_variant
    monkeypatch.setattr(transpose, "transpose_variant", lambda dst, src, *alignments: real(dst, src, 16, 16))
    with pytest.raises((GpuFault, DeviceFault), match=r"promises|cannot count"):
        run_schedules(cases, gpu)


@pytest.mark.parametrize("scheme", ["fp8 32x16", "mxfp8", "int4 g32 with zero points", "nvfp4"])
def test_codes_are_decoded_by_kernels_as_on_the_cpu(tmp_path, gpu, scheme):
    pytest.importorskip("transformers", reason="transformers and compressed-tensors write them")
    from tests.quantized.producers import PRODUCERS
    from tests.quantized.test_schemes import weight, write

    producer = PRODUCERS[scheme]
    write(tmp_path, producer, {f"{name}.weight": weight(64, 128, seed=seed) for seed, name in enumerate("abc")})
    with gpu.on_host():
        expected = amc.load_state_dict(tmp_path, rules=[])
    for seed in range(4):
        before = gpu.executor.launches
        loaded = amc.load_state_dict(
            tmp_path, rules=[], threads=1 + seed % 2, scratch_bytes=1 << 15, device_scratch_bytes=1 << 16
        )
        assert gpu.executor.launches > before
        for name, tensor in expected.items():
            assert_bytes_equal(loaded[name], tensor)
    assert any(variant.details for variant in gpu.executor.variants)
    assert all(device.live == 0 for device in gpu.devices)


def test_host_may_use_the_software_gpus_memory_in_on_host(tmp_path, gpu):
    tensors, checkpoint, plan = moe(tmp_path)
    with gpu.on_host():
        amc.load_state_dict(tmp_path, rules=[])
    assert not gpu.devices
    amc.load_state_dict(tmp_path, rules=[])
    assert len(gpu.devices) == 1
    assert allocate(plan.targets)
    assert tensors
    assert checkpoint


def test_two_streams_that_wait_for_each_other_do_not_race(gpu):
    device = gpu.new_device(eagerness=0)
    first, second = device.stream(), device.stream()
    memory = torch.zeros(64, dtype=torch.uint8)
    first.run(lambda: memory.fill_(1))
    second.wait(first.record())
    second.run(lambda: memory.add_(1))
    second.record().synchronize()
    first.run(lambda: memory.add_(1))  # the host has waited
    first.record().synchronize()
    assert memory.tolist() == [3] * 64
    second.run(lambda: memory.add_(1))
    first.run(lambda: memory.add_(1))
    events = [first.record(), second.record()]
    events[0].synchronize()
    with pytest.raises(DeviceFault, match="two streams at once"):
        events[1].synchronize()
