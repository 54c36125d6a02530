"""Tests of the work to stream quantized layers of published sizes to a device: windows, reads, Python calls."""

from __future__ import annotations

import importlib.util
import json
import sys
import threading
from math import prod
from typing import NamedTuple
from unittest import mock

import pytest
import torch

from automodel_conv.dtypes import itemsize
from automodel_conv.errors import ReadError
from automodel_conv.execution import device as streaming
from automodel_conv.execution.buffers import allocate
from automodel_conv.execution.device import load_to_device, ring_of
from automodel_conv.execution.host import load_to_host
from automodel_conv.files.checkpoint import open_checkpoint
from automodel_conv.kernels import code_tables, launch
from automodel_conv.planning.operations import Operation
from automodel_conv.planning.plan import CopyPlan
from automodel_conv.planning.quantization import quantized_table
from automodel_conv.schedule.device import device_schedule
from automodel_conv.testing import assert_bytes_equal
from benchmarks.full_size import write_header
from tests.execution.simulated import DeviceFault, SimulatedDevice
from tests.execution.strict import NoSynchronization, StrictDevice, Synchronized, first_load, outside_of_modes
from tests.execution.support import CONCATENATE, MERGE, columns, target

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

MIB = 1 << 20
CONFIG = {"quant_method": "fp8", "weight_block_size": [128, 128], "fmt": "e4m3"}


class Layers(NamedTuple):
    """Layers of experts in FP8 with a scale for each 128 x 128."""

    experts: int
    intermediate: int
    hidden: int
    scales: str
    layers: int

    @property
    def shapes(self):
        return {
            "gate_proj": (self.intermediate, self.hidden),
            "up_proj": (self.intermediate, self.hidden),
            "down_proj": (self.hidden, self.intermediate),
        }

    @property
    def codes_bytes(self):
        return self.layers * self.experts * sum(map(prod, self.shapes.values()))


# Sizes and dtypes of scales: config.json of Qwen/Qwen3-30B-A3B-FP8 and of deepseek-ai/DeepSeek-V3.
PUBLISHED = {
    "Qwen3-30B-A3B-FP8": Layers(128, 768, 2048, "BF16", 2),
    "DeepSeek-V3": Layers(256, 2048, 7168, "F32", 2),
}


def write_sparse(directory, layers):
    """Write a sparse file for each layer, as large as a published one, larger dtypes first, as safetensors does."""
    weight_map = {}
    for layer in range(layers.layers):
        tensors = {}
        for expert in range(layers.experts):
            for part, (rows, cols) in layers.shapes.items():
                name = f"layers.{layer}.experts.{expert}.{part}.weight"
                tensors[name] = ("F8_E4M3", (rows, cols))
                tensors[f"{name}_scale_inv"] = (layers.scales, (-(-rows // 128), -(-cols // 128)))
        file = f"model-{layer + 1:05d}.safetensors"
        names = sorted(tensors, key=lambda name: (-itemsize(tensors[name][0]), name))
        write_header(directory / file, {name: tensors[name] for name in names})
        weight_map |= dict.fromkeys(names, file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return open_checkpoint(directory)


def plan_for(checkpoint, layers, transposed):
    """Plan gate and up of all experts of a layer as one target, and down as another."""
    table = quantized_table(columns(checkpoint), CONFIG)
    turned = [Operation("Transpose", (("dim0", 1), ("dim1", 2)))] if transposed else []
    targets = []
    for layer in range(layers.layers):
        groups = {
            part: [f"layers.{layer}.experts.{expert}.{part}.weight" for expert in range(layers.experts)]
            for part in layers.shapes
        }
        pair = [groups["gate_proj"], groups["up_proj"]]
        targets.append(target(table, f"{layer}.gate_up", "BF16", pair, [MERGE, CONCATENATE, *turned]))
        targets.append(target(table, f"{layer}.down", "BF16", [groups["down_proj"]], [MERGE, *turned]))
    return CopyPlan(table, tuple(targets))


def scheduled(checkpoint, plan):
    copies = [t.copies for t in plan.targets]
    ring = ring_of(None, None)
    window_bytes = streaming.DEFAULT_DEVICE_SCRATCH_BYTES // 2
    return device_schedule(
        plan.targets,
        copies,
        checkpoint,
        plan.sources.decodes,
        slot_bytes=ring.slot_bytes,
        window_bytes=window_bytes,
    )


@pytest.mark.parametrize("transposed", [False, True], ids=["as stored", "transposed"])
@pytest.mark.parametrize("name", PUBLISHED)
def test_windows_and_chunks_are_few_and_nothing_passes_through_scratch(tmp_path, name, transposed):
    layers = PUBLISHED[name]
    checkpoint = write_sparse(tmp_path, layers)
    plan = plan_for(checkpoint, layers, transposed)
    chunks, windows = scheduled(checkpoint, plan)
    assert len(windows) <= layers.codes_bytes / (32 * MIB)
    assert len(chunks) <= layers.codes_bytes / (8 * MIB) + 2 * layers.layers
    assert not any(window.copies for window in windows)
    # Gate and up share one geometry, down has another. Each is one launch with one table.
    assert all(len(window.rectangles) <= 2 and len(window.scale_groups) == 1 for window in windows)
    assert sum(chunk.reads.total_bytes for chunk in chunks) == sum(checkpoint.nbytes)


__all__ = ["first_load"]  # a fixture


@needs_triton
@pytest.mark.usefixtures("first_load")
@pytest.mark.parametrize("transposed", [False, True], ids=["as stored", "transposed"])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_nothing_waits_for_the_device_between_the_first_read_and_the_end(tmp_path, backend, transposed):
    layers = Layers(2, 128, 256, "F32", 2)
    checkpoint = write_sparse(tmp_path, layers)
    fill_with_random_bytes(checkpoint)
    plan = plan_for(checkpoint, layers, transposed)
    wanted, actual = allocate(plan.targets), allocate(plan.targets)
    with outside_of_modes():
        load_to_device(plan, checkpoint, actual, StrictDevice(), backend=backend, threads=2)
    load_to_host(plan, checkpoint, wanted)
    for name, tensor in wanted.items():
        assert_bytes_equal(actual[name], tensor)


@pytest.mark.parametrize(
    "waits",
    [
        lambda x: x.item(),
        lambda x: bool(x),
        lambda x: torch.tensor([1.0]),
        lambda x: x.cpu(),
        lambda x: x.tolist(),
        lambda x: x.to("cpu"),
        lambda x: x[x > 0],
        lambda x: x.repeat_interleave(x.int()),
    ],
)
def test_wait_for_the_device_is_found(waits):
    tensor = torch.ones(1)
    with NoSynchronization(), pytest.raises(Synchronized):
        waits(tensor)


def test_constant_that_is_uploaded_for_each_window_is_found(tmp_path, monkeypatch):
    layers = Layers(1, 128, 128, "F32", 1)
    checkpoint = write_sparse(tmp_path, layers)
    plan = plan_for(checkpoint, layers, False)
    monkeypatch.setattr(code_tables, "_code_values", code_tables._code_values.__wrapped__)
    with pytest.raises(DeviceFault, match="Synchronized"):
        load_to_device(plan, checkpoint, allocate(plan.targets), StrictDevice(), backend="torch")


def fill_with_random_bytes(checkpoint):
    generator = torch.Generator().manual_seed(0)
    for row, dtype in enumerate(checkpoint.dtypes):
        count = checkpoint.nbytes[row] // itemsize(dtype)
        values = torch.rand(count, generator=generator)
        if dtype == "F8_E4M3":
            values = values.to(torch.float8_e4m3fn)
        with open(checkpoint.files[checkpoint.file_ids[row]], "r+b") as file:
            file.seek(checkpoint.offsets[row])
            file.write(bytes(values.view(torch.uint8).tolist()))


def test_truncated_file_names_the_missing_tensor(tmp_path):
    checkpoint = write_sparse(tmp_path, Layers(4, 128, 256, "F32", 1))
    plan = plan_for(checkpoint, Layers(4, 128, 256, "F32", 1), False)
    row = checkpoint.names.index("layers.0.experts.2.gate_proj.weight")
    with open(checkpoint.files[0], "r+b") as file:
        file.truncate(checkpoint.offsets[row] + 100)
    with pytest.raises(ReadError, match=r"tensor: +layers\.0\.experts\.2\.gate_proj\.weight\n"):
        load_to_device(plan, checkpoint, allocate(plan.targets), SimulatedDevice(), backend="torch")


class Done:
    def synchronize(self):
        pass


class DirectStream:
    """A stream that runs queued work at once."""

    def copy_all(self, pairs):
        for dst, src in pairs:
            dst.copy_(src)

    def run(self, work):
        work()

    def record(self, event=None):
        return event or Done()

    def wait(self, event):
        pass


class DirectDevice:
    def pinned(self, nbytes):
        return torch.empty(nbytes, dtype=torch.uint8)

    scratch = pinned

    def stream(self):
        return DirectStream()


def calls_in_all_threads(work):
    """Count the functions, C functions included, that this thread and threads started meanwhile call."""
    counts: dict[int, int] = {}

    def profile(frame, event, argument):
        if event in ("call", "c_call"):
            thread = threading.get_ident()
            counts[thread] = counts.get(thread, 0) + 1

    threading.setprofile(profile)
    sys.setprofile(profile)
    try:
        work()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    return sum(counts.values())


@needs_triton
@pytest.mark.parametrize(
    ("name", "experts"), [("Qwen3-30B-A3B-FP8", (16, 64)), ("DeepSeek-V3", (2, 8))], ids=["Qwen3-30B", "DeepSeek-V3"]
)
def test_python_calls_for_each_mib_of_codes(tmp_path, name, experts):
    counts = []
    with mock.patch.object(launch, "queue"):
        for run, number in enumerate((experts[0], *experts)):  # the first load imports modules and fills caches
            layers = PUBLISHED[name]._replace(experts=number, layers=1)
            (tmp_path / str(run)).mkdir()
            checkpoint = write_sparse(tmp_path / str(run), layers)
            plan = plan_for(checkpoint, layers, True)
            buffers = allocate(plan.targets)
            load = lambda: load_to_device(plan, checkpoint, buffers, DirectDevice(), backend="triton", threads=2)  # noqa: B023, E731
            counts.append((calls_in_all_threads(load), layers.codes_bytes / MIB))
    _, (few, few_mib), (many, many_mib) = counts
    assert (many - few) / (many_mib - few_mib) <= 40
