"""Tests of the amount of work of a load, counted: a guard of its speed that a busy machine cannot fail.

Python calls, of C functions too, are counted in the caller's thread for checkpoints of two sizes; the difference is the
cost of one more tensor. The bounds leave a fourth of headroom above the counts with Python 3.11. Lower them when a load
becomes cheaper.
"""

from __future__ import annotations

import json
import resource
import sys
from collections import Counter
from itertools import product

import pytest
import torch

pytest.importorskip("transformers", reason="needs models and rules of transformers")

import automodel_conv as amc
from automodel_conv.cli.demo import DemoModel
from automodel_conv.cli.demo_process import write_checkpoint
from automodel_conv.cli.forecast import forecast
from automodel_conv.cli.measuring import ready_memory
from automodel_conv.execution import host as cpu
from automodel_conv.execution import page_calls
from automodel_conv.execution.buffers import allocate
from automodel_conv.files import system
from automodel_conv.schedule import decoding
from benchmarks.full_size import DEEPSEEK_V3_FP8, deepseek, fp8, write_headers

FEW, MANY = 32, 96


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Write checkpoints of few and of many experts, by the counts of layers and of experts, each in one file."""
    directories = {}
    for layers, experts in product((1, 2), (FEW, MANY)):
        directories[layers, experts] = tmp_path_factory.mktemp("published")
        write_checkpoint(DemoModel(layers, experts, 64, 32, "1GB"), str(directories[layers, experts]))
    return directories


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Write tensors of more than one huge page: 100 MB in one file."""
    directory = tmp_path_factory.mktemp("large")
    write_checkpoint(DemoModel(1, 16, 1024, 1024, "1GB"), str(directory))
    return directory


def python_calls(work):
    """Return the number of functions that ``work`` calls in this thread, and its result."""
    count = 0

    def profile(frame, event, argument):
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(profile)
    try:
        result = work()
    finally:
        sys.setprofile(None)
    return count, result


def calls_by_phase(directory, layout):
    """Return Python calls of opening, planning and executing, after all imports and caches."""
    amc.load_state_dict(directory, layout=layout, threads=1)
    opening, checkpoint = python_calls(lambda: amc.open_checkpoint(directory))
    planning, plan = python_calls(lambda: amc.compile_plan(checkpoint, layout=layout))
    buffers = allocate(plan.targets)
    executing, _ = python_calls(lambda: cpu.load_to_host(plan, checkpoint, buffers, threads=1))
    return opening, planning, executing


@pytest.mark.parametrize(
    ("layers", "layout", "most"),
    [(2, None, (10, 20, 15)), (1, None, (10, 28, 15)), (2, "nemo", (10, 38, 75)), (1, "nemo", (10, 56, 75))],
    ids=["as the model", "one layer as the model", "transposed", "one layer transposed"],
)
def test_python_calls_per_tensor(published, layers, layout, most):
    """Check bounds: equal layers share their plan, and a single layer has nothing to share it with."""
    few, many = (calls_by_phase(published[layers, experts], layout) for experts in (FEW, MANY))
    a_tensor = [(b - a) / (layers * 3 * (MANY - FEW)) for a, b in zip(few, many, strict=True)]
    assert a_tensor[0] <= most[0], "opening"
    assert a_tensor[1] <= most[1], "planning"
    assert a_tensor[2] <= most[2], "executing"


def test_calls_are_counted():
    assert python_calls(lambda: [abs(n) for n in (-1, -2, -3)])[0] >= 4
    assert python_calls(lambda: 7)[1] == 7


@pytest.fixture
def system_calls(monkeypatch):
    """Count the calls of each system function in a load, and all bytes read."""
    counts = Counter()
    reading = [(system, name) for name in ("open_readonly", "preadv", "size")]
    for module, name in [*reading, (page_calls, "advise_huge_pages")]:
        real = getattr(module, name)

        def counted(*arguments, name=name, real=real):
            counts[name] += 1
            result = real(*arguments)
            if name == "preadv":
                counts["bytes"] += result
            return result

        monkeypatch.setattr(module, name, counted)
    real_close = system.File.close

    def close(file):
        counts["close"] += not file.closed
        real_close(file)

    monkeypatch.setattr(system.File, "close", close)
    return counts


@pytest.mark.parametrize("layout", [None, "nemo"])
def test_every_byte_is_read_once_in_the_largest_calls(published, system_calls, layout):
    """Check one file: opened for its header and for its data; 1,024 buffers to a call."""
    checkpoint = amc.open_checkpoint(published[2, MANY])
    header_bytes, opened = system_calls["bytes"], system_calls["open_readonly"]
    plan = amc.compile_plan(checkpoint, layout=layout)
    buffers = allocate(plan.targets)
    system_calls.clear()
    stats = cpu.load_to_host(plan, checkpoint, buffers, threads=1)
    assert header_bytes < checkpoint.offsets[0] + 4096  # includes config.json
    assert opened <= 2
    assert system_calls["open_readonly"] == system_calls["close"] == 1
    assert system_calls["bytes"] == sum(checkpoint.nbytes) + stats.gap_bytes
    assert stats.gap_bytes <= (0 if layout is None else 64 << 10)
    assert system_calls["preadv"] <= 8


def test_only_transposed_bytes_are_copied_and_only_once(published, monkeypatch):
    copied = Counter()
    real = cpu.copy_equal

    def counted(batches):
        batches = list(batches)
        for copies, source, _ in batches:
            copied["bytes"] += copies.box.numel * len(copies.source_offsets) * source.element_size()
        real(batches)

    monkeypatch.setattr(cpu, "copy_equal", counted)
    amc.load_state_dict(published[2, MANY])
    assert copied["bytes"] == 0
    loaded = amc.load_state_dict(published[2, MANY], layout="nemo")
    assert copied["bytes"] == sum(t.nbytes for name, t in loaded.items() if ".experts." in name)


def faults(work):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    kept = work()
    del kept
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def test_page_faults_are_those_of_new_memory_with_huge_pages(large):
    """Compare with touching buffers of the same sizes: one fault for each 2 MiB, if the system provides huge pages."""
    nbytes = sum(tensor.nbytes for tensor in amc.load_state_dict(large, threads=1).values())
    ready_memory(2 * nbytes)
    plan = amc.compile_plan(large)

    def touched():
        buffers = allocate(plan.targets)
        for buffer in buffers.values():
            page_calls.advise_huge_pages(buffer.data_ptr(), buffer.nbytes)
            buffer.view(-1).view(torch.uint8).fill_(1)
        return buffers

    most = max(faults(touched) for _ in range(3))  # reused memory has no faults
    loading = min(faults(lambda: amc.load_state_dict(large, threads=1, huge_pages=True)) for _ in range(3))
    assert loading < most + 2000  # 8 MB of small pages: headers, plans, Python's own


def test_buffers_of_4_mib_are_advised_once_and_small_ones_never(large, system_calls, monkeypatch):
    monkeypatch.setattr(page_calls, "resident_share", lambda address, nbytes: 0.0)  # all memory counts as new
    loaded = amc.load_state_dict(large, huge_pages=True, threads=1)
    assert system_calls["advise_huge_pages"] == sum(tensor.nbytes >= 4 << 20 for tensor in loaded.values()) > 0


def test_measuring_costs_a_few_calls_more(large, system_calls, monkeypatch):
    monkeypatch.setattr(page_calls, "resident_share", lambda address, nbytes: 0.0)
    loaded = amc.load_state_dict(large, threads=1)
    buffers = sum(tensor.nbytes >= 4 << 20 for tensor in loaded.values())
    # Four tries, and one or two calls if a noisy machine changes which size is faster.
    assert system_calls["advise_huge_pages"] <= 2 * buffers + 48


def quantized_headers(directory, layers, experts):
    """Write headers of DeepSeek-V3 in FP8 with fewer layers and experts; matrices keep their size."""
    config = dict(DEEPSEEK_V3_FP8.config)
    config |= {"num_hidden_layers": layers, "num_nextn_predict_layers": 0, "first_k_dense_replace": 0}
    config |= {"n_routed_experts": experts, "n_group": 1, "topk_group": 1}
    write_headers(directory, deepseek(config, fp8, fp8, kv_scales=False), files=layers)
    (directory / "config.json").write_text(json.dumps(config))
    return amc.open_checkpoint(directory)


def quantized_work(directory, layers, experts, monkeypatch):
    """Return Python calls of planning and of a forecast for two ranks, and how often a source is cut into slabs."""
    checkpoint = quantized_headers(directory, layers, experts)
    amc.compile_plan(checkpoint)  # all imports and caches
    planning, plan = python_calls(lambda: amc.compile_plan(checkpoint))
    forecast(checkpoint, plan, {"ep": 2})
    cuts = []
    stock = decoding.slabs
    with monkeypatch.context() as patched:
        patched.setattr(decoding, "slabs", lambda *arguments: cuts.append(arguments) or stock(*arguments))
        forecasting, _ = python_calls(lambda: forecast(checkpoint, plan, {"ep": 2}))
    return planning, forecasting, len(cuts)


def test_work_for_a_mesh_of_quantized_experts(tmp_path_factory, monkeypatch):
    """Check that each geometry is cut once on a rank, and bounds of the calls for each quantized tensor.

    A tensor of 14.7 million codes is decoded in a dozen slabs. Neither their number nor the number of layers counts.
    """
    _, few, many, deep = (  # the first one fills all caches
        quantized_work(tmp_path_factory.mktemp("quantized"), *size, monkeypatch)
        for size in ((1, 32), (1, 32), (1, 96), (3, 32))
    )
    assert few[2] == many[2] == deep[2] <= 2 * 10  # two ranks; attention and shared experts have most geometries
    tensors = 3 * (96 - 32)
    assert (many[0] - few[0]) / tensors <= 96, "planning, with the scales"
    assert (many[1] - few[1]) / tensors <= 68, "forecasting"
