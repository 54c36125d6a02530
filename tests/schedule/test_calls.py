"""Tests of ``calls_of_load``: its calls are those of the jobs of a load, one by one."""

from __future__ import annotations

import pytest
import torch

from automodel_conv.planning.quantization import quantized_table
from automodel_conv.schedule import decoding
from automodel_conv.schedule.calls import calls_of_load
from automodel_conv.schedule.host import schedule
from automodel_conv.testing import address_valued
from tests.execution.support import LAYOUTS, columns, moe, plan_of, target, write_checkpoint

FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}


def assert_calls_match(plan, checkpoint, threads, slot_bytes):
    """Compare with the jobs of a load, and return the number of calls."""
    arguments = (plan.targets, [t.copies for t in plan.targets], checkpoint, plan.sources.decodes)
    jobs = schedule(*arguments, threads=threads, slot_bytes=slot_bytes)
    expected = [
        (int(call.file[0]), int(call.stop_bytes[-1] - call.offset_bytes[0]))
        for job in jobs
        for call in job.reads.calls()
    ]
    calls = calls_of_load(*arguments, threads=threads, slot_bytes=slot_bytes)
    assert sorted(zip(calls.file.tolist(), calls.nbytes.tolist(), strict=True)) == sorted(expected)
    return len(expected)


def quantized(tmp_path, sources):
    """Write quantized matrices and plan to load them: as they are, transposed, or both."""
    tensors, weights = {}, []
    for n, (rows, cols) in enumerate(sources):
        tensors[f"s{n}.weight"] = torch.zeros(rows, cols, dtype=torch.float8_e4m3fn)
        tensors[f"s{n}.weight_scale_inv"] = torch.ones(-(-rows // 128), -(-cols // 128))
        weights.append(f"s{n}.weight")
    tensors["norm"] = address_valued((70,), torch.bfloat16)
    files = {f"{half}.safetensors": {k: v for k, v in tensors.items() if (k < "s2") == half} for half in (False, True)}
    checkpoint = write_checkpoint(tmp_path, {file: part for file, part in files.items() if part})
    table = quantized_table(columns(checkpoint), FP8)
    targets = [target(table, f"t{n}", "BF16", [[name]]) for n, name in enumerate(weights)]
    return checkpoint, plan_of(table, *targets, target(table, "norm", "BF16", [["norm"]]))


@pytest.mark.parametrize("dtype", ["BF16", "F32"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("slot_bytes", [4096, 1 << 20])
def test_calls_are_those_of_the_jobs(tmp_path, layout, dtype, slot_bytes):
    _, checkpoint, plan = moe(tmp_path, *LAYOUTS[layout], shape=(2, 96, 128), pad=1)
    plan = plan_of(plan.sources, *(t._replace(dtype=dtype) for t in plan.targets))
    for threads in (1, 64):
        assert assert_calls_match(plan, checkpoint, threads, slot_bytes)


@pytest.mark.parametrize("slot_bytes", [8192, 1 << 20])
def test_calls_for_quantized_sources_are_those_of_the_jobs(tmp_path, slot_bytes):
    checkpoint, plan = quantized(tmp_path, [(256, 384), (256, 384), (256, 384), (130, 1), (1, 1), (256, 256)])
    assert assert_calls_match(plan, checkpoint, 2, slot_bytes) > 3


def test_no_targets_need_no_calls(tmp_path):
    _, checkpoint, plan = moe(tmp_path)
    assert assert_calls_match(plan_of(plan.sources), checkpoint, 2, 4096) == 0


def test_equal_quantized_sources_are_cut_once(tmp_path, monkeypatch):
    cut = []
    stock = decoding.slabs
    monkeypatch.setattr(decoding, "slabs", lambda *arguments: cut.append(arguments) or stock(*arguments))
    checkpoint, plan = quantized(tmp_path, [(256, 384)] * 9 + [(128, 384)] * 2)
    assert_calls_match(plan, checkpoint, 2, 1 << 20)
    assert len(cut) == 2 * 2  # two geometries, by the schedule and by the calls
