"""Tests of decoding on every path: any scratch, any number of threads, and a late device."""

import importlib.util
import itertools

import pytest
import torch

import automodel_conv as amc
from automodel_conv.execution.buffers import allocate
from automodel_conv.execution.device import load_to_device
from automodel_conv.execution.host import load_to_host
from automodel_conv.planning.copies import Target, group_pieces
from automodel_conv.planning.plan import CopyPlan
from automodel_conv.planning.quantization import quantized_table
from automodel_conv.planning.values import leaf, transpose
from automodel_conv.schedule.host import schedule
from automodel_conv.testing import assert_bytes_equal
from tests.execution.conftest import calls
from tests.execution.simulated import SimulatedDevice
from tests.execution.strict import StrictDevice, first_load, outside_of_modes
from tests.execution.support import columns
from tests.quantized.test_schemes import PRODUCERS, weight, write
from tests.whole.test_memory_budget import torch_peak

pytest.importorskip("transformers", reason="needs transformers, as compressed-tensors does")
__all__ = ["calls", "first_load"]  # fixtures
SCHEMES = ["fp8 32x16", "mxfp8", "int4 g32 with zero points", "nvfp4", "nvfp4 of modelopt, stacked", "gptq v2", "awq"]
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def case(directory, scheme):
    """Write two weights; return a plan of each as it is and transposed, and the expected values."""
    producer = PRODUCERS[scheme.removesuffix(", stacked")]
    weights = {"a.weight": weight(96, 128), "b.weight": weight(64, 224, seed=1)}
    if scheme.endswith(", stacked"):
        weights = {name: value.unflatten(0, (4, -1)) for name, value in weights.items()}
    write(directory, producer, weights)
    checkpoint = amc.open_checkpoint(directory)
    table = quantized_table(columns(checkpoint), producer.config)
    expected, targets = amc.load_state_dict(directory, rules=[], dtype=torch.float32), []
    for row in table.decodes:
        name, value = table.names[row], table.decodes[row].arrangement.view(leaf(0, table.shapes[row]))
        transposed = transpose(value, -2, -1)
        for label, leaves in ((name, value), (name + ".T", transposed)):
            targets.append(Target(label, "F32", leaves.shape, -1, (row,), group_pieces(leaves.pieces)))
        expected[name + ".T"] = expected[name].mT.contiguous()
    plan = CopyPlan(table, tuple(targets))
    plan.validate()
    return checkpoint, plan, expected


def poisoned(plan):
    buffers = allocate(plan.targets)
    for buffer in buffers.values():
        buffer.view(torch.uint8).fill_(0xA5)
    return buffers


def assert_filled(buffers, expected):
    for name, buffer in buffers.items():
        assert_bytes_equal(buffer, expected[name])


@pytest.mark.parametrize("scratch_bytes", [24_000, 100_003, 1 << 20])
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_any_scratch_and_threads_decode_the_same_values(tmp_path, scheme, threads, scratch_bytes):
    checkpoint, plan, expected = case(tmp_path, scheme)
    buffers = poisoned(plan)
    stats = load_to_host(plan, checkpoint, buffers, threads=threads, scratch_bytes=scratch_bytes)
    assert_filled(buffers, expected)
    assert stats.scratch_bytes <= scratch_bytes


@pytest.mark.parametrize("budget", [1 << 18, 1 << 20])
@pytest.mark.parametrize(
    "scheme", ["fp8 128x128", "mxfp8", "int4 g32 with zero points", "fp8 per channel", "nvfp4", "gptq"]
)
def test_torch_allocates_no_more_than_the_budget(tmp_path, scheme, budget):
    write(tmp_path, PRODUCERS[scheme], {"a.weight": weight(1024, 1024)})
    load = lambda: amc.load_state_dict(tmp_path, rules=[], threads=1, memory_budget=budget)  # noqa: E731
    assert load().report.peak_extra_bytes <= budget
    assert torch_peak(load) - 2 * 1024 * 1024 <= budget


@pytest.mark.parametrize("eagerness", [0, 0.5])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_late_device_decodes_the_same_values(tmp_path, scheme, eagerness):
    checkpoint, plan, expected = case(tmp_path, scheme)
    for seed in range(4):
        buffers = poisoned(plan)
        device = SimulatedDevice(seed, eagerness=eagerness)
        limits = {"threads": 2, "scratch_bytes": 16384, "device_scratch_bytes": 1 << 16}
        load_to_device(plan, checkpoint, buffers, device, backend="torch", **limits)
        assert_filled(buffers, expected)
        assert device.idle


@needs_triton
@pytest.mark.usefixtures("first_load")
@pytest.mark.parametrize("scheme", SCHEMES)
def test_kernels_decode_the_same_values_without_waiting(tmp_path, scheme):
    checkpoint, plan, expected = case(tmp_path, scheme)
    buffers = poisoned(plan)
    limits = {"threads": 1, "scratch_bytes": 1 << 17, "device_scratch_bytes": 1 << 19}
    with outside_of_modes():
        stats = load_to_device(plan, checkpoint, buffers, StrictDevice(0), backend="triton", **limits)
    assert_filled(buffers, expected)
    assert stats.counts.by_kernels > 0


def test_unsupported_decoded_dtype_is_refused_before_anything_is_read(tmp_path, calls):
    checkpoint, plan, _ = case(tmp_path, "fp8 32x16")
    plan = CopyPlan(plan.sources, tuple(t._replace(dtype="F64") for t in plan.targets))
    calls.reads = 0
    with pytest.raises(amc.UnsupportedError, match="values of this dtype"):
        load_to_device(plan, checkpoint, poisoned(plan), SimulatedDevice(), backend="torch")
    assert calls.reads == 0


@pytest.mark.parametrize("scheme", SCHEMES)
def test_codes_are_read_once_and_shared_scales_again(tmp_path, scheme):
    checkpoint, plan, _ = case(tmp_path, scheme)
    copies = [target.copies for target in plan.targets]
    jobs = schedule(plan.targets, copies, checkpoint, plan.sources.decodes, threads=2, slot_bytes=1 << 14)
    assert len(jobs) > 4
    for row in plan.sources.decodes:
        begin, file = checkpoint.offsets[row], checkpoint.file_ids[row]
        within = range(begin, begin + checkpoint.nbytes[row])
        reads = [read for job in jobs for read in job.reads.one_by_one()]
        read = sorted(read[1:3] for read in reads if read.file == file and read.offset_bytes in within)
        ends = [offset + nbytes for offset, nbytes in read]
        assert [offset for offset, _ in read] == [checkpoint.offsets[row], *ends[:-1]]
        assert ends[-1] == checkpoint.offsets[row] + checkpoint.nbytes[row]
    assert all(job.scratch_bytes <= 1 << 14 for job in jobs)


def test_plan_of_quantized_sources_round_trips_through_json(tmp_path):
    _, plan, _ = case(tmp_path, "int4 g32 with zero points")
    assert plan.execution_of(plan.target("a.weight")) == "decode"
    assert plan.execution_of(plan.target("a.weight.T")) == "strided, decode"
    assert "int4 [96, 128]" in plan.explain("a.weight")
    again = CopyPlan.from_json(plan.to_json())
    assert again == plan
    sizes = [plan.sources.nbytes(row) for row in itertools.chain(plan.used_sources, *_parts(plan))]
    assert plan.bytes_read == sum(sizes)
    with pytest.raises(amc.UnsupportedError, match="it cannot quantize"):
        plan.inverse()


def _parts(plan):
    return [decode.parts for decode in plan.sources.decodes.values()]
