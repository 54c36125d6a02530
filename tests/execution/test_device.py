"""Tests of the streaming loader on a simulated device: results, progress, kernels and memory."""

from __future__ import annotations

import importlib.util
import threading
from unittest import mock

import pytest
import torch

from automodel_conv.dtypes import torch_dtype
from automodel_conv.execution import copy_batch
from automodel_conv.execution import device as streaming
from automodel_conv.execution.buffers import allocate
from automodel_conv.execution.device import MOST_COMPILED, load_to_device, ring_of
from automodel_conv.kernels import launch
from automodel_conv.planning.copies import Fallback, Target
from automodel_conv.planning.operations import Operation
from automodel_conv.testing import address_valued, assert_bytes_equal, guarded
from tests.execution.device_loads import SMALL, Case, assert_released, load
from tests.execution.simulated import SimulatedDevice
from tests.execution.slab_writes import padded_case
from tests.execution.support import LAYOUTS, columns, moe, naive, plan_of, target, write_checkpoint

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def test_memory_stays_within_its_budget(cases, calls):
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
def test_slots_have_8_to_16_mib_unless_the_budget_is_smaller(monkeypatch, threads, scratch_bytes, ring):
    monkeypatch.setattr(streaming, "default_reader_threads", lambda most: min(4, most))
    assert ring_of(threads, scratch_bytes) == ring


def test_slots_of_pinned_memory_are_aligned_for_every_element(cases, monkeypatch):
    slots, real = [], streaming._Slot
    monkeypatch.setattr(streaming, "_Slot", lambda memory: slots.append(real(memory)) or slots[-1])
    load(cases[1], SimulatedDevice(), threads=3, scratch_bytes=30001)
    assert len(slots) == 6
    assert all(slot.memory.data_ptr() % 64 == 0 for slot in slots)


@needs_triton
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_inference_tensors_are_filled_in_inference_mode(tmp_path, backend):
    tensors, checkpoint, plan = moe(tmp_path, *LAYOUTS["transposed"], shape=(3, 16, 32))
    with torch.inference_mode():
        buffers = allocate(plan.targets)
        load_to_device(plan, checkpoint, buffers, SimulatedDevice(eagerness=1), backend=backend, **SMALL)
    for name, tensor in naive(plan, tensors).items():
        assert_bytes_equal(buffers[name], tensor)


def test_bytes_that_only_move_need_no_memory_for_copies(tmp_path, calls):
    tensors, checkpoint, plan = moe(tmp_path)
    device = SimulatedDevice()
    stats = load(Case(checkpoint, plan, naive(plan, tensors)), device)
    assert (device.scratch_bytes, stats.counts) == (0, copy_batch.CopyCounts(0, 0))


def test_triton_is_checked_only_if_needed_and_not_by_the_caller(tmp_path, monkeypatch):
    asked = []

    def uses_kernels(backend, tensors):
        asked.append(threading.current_thread().name)
        return False

    monkeypatch.setattr(streaming, "uses_kernels", uses_kernels)
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
def test_kernels_write_the_same_bytes_and_are_compiled_in_advance(tmp_path, layout, code):
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
        assert stats.counts.by_kernels > 0


@needs_triton
def test_load_compiles_at_most_three_kernels_and_leaves_other_copies_to_torch(tmp_path):
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
    assert stats.counts.by_kernels > 0
    assert stats.counts.by_torch > 0
    assert sum(stats.counts) >= len(targets)


def test_buffers_of_any_strides_are_filled(tmp_path):
    tensors, checkpoint, plan = moe(tmp_path, shape=(3, 6, 10))
    guards = {}
    for t in plan.targets:
        strides = [2]
        for size in t.shape[:0:-1]:
            strides.insert(0, strides[0] * size + 3)
        guards[t.name] = guarded(t.shape, torch_dtype(t.dtype), strides=strides)
    load_to_device(plan, checkpoint, {name: guard.tensor for name, guard in guards.items()}, SimulatedDevice(), **SMALL)
    for name, tensor in naive(plan, tensors).items():
        guards[name].check()
        assert_bytes_equal(guards[name].tensor.contiguous(), tensor)


def test_targets_of_transformers_code_are_computed_and_uploaded(tmp_path):
    tensors = {"a": address_valued((3, 4), torch.float32), "b": address_valued((5,), torch.bfloat16)}
    checkpoint = write_checkpoint(tmp_path, {"a.safetensors": tensors})
    sources = columns(checkpoint)
    fallback = Fallback("for a test", lambda sources: {"flat": sources[0].flatten()})
    flat = Target("flat", "F32", (12,), -1, (0,), (), fallback)
    plan = plan_of(sources, flat, target(sources, "b", "BF16", [["b"]]))
    stats = load(Case(checkpoint, plan, {"flat": tensors["a"].flatten(), "b": tensors["b"]}), SimulatedDevice())
    assert stats.bytes_read == plan.bytes_read


def test_progress_counts_all_bytes(cases, capsys):
    load(cases[1], SimulatedDevice(), progress=True)
    assert "100%" in capsys.readouterr().err


@pytest.mark.parametrize("rows", [0, 2, 5])
def test_rows_that_no_copy_fills_are_zero(tmp_path, rows):
    case = padded_case(tmp_path, rows)
    load(Case(case.checkpoint, case.plan, case.expected), SimulatedDevice())
