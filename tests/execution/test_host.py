"""Tests of loads from files to host buffers: right bytes, each read once, and clear errors when reading fails."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from automodel_conv.dtypes import dtype_code, torch_dtype
from automodel_conv.errors import UnsupportedError
from automodel_conv.execution.buffers import allocate
from automodel_conv.execution.host import load_to_host
from automodel_conv.files.checkpoint import open_checkpoint
from automodel_conv.planning import values
from automodel_conv.planning.boxes import NotAffine
from automodel_conv.planning.copies import Target
from automodel_conv.planning.operations import Operation
from automodel_conv.planning.plan import CopyPlan
from automodel_conv.planning.values import Value, leaf
from automodel_conv.schedule.jobs import GAP_BYTES
from automodel_conv.testing import address_valued, assert_bytes_equal, assert_written, guarded
from tests.execution.host_loads import check_load, outputs
from tests.execution.slab_writes import padded_case
from tests.execution.support import (
    LAYOUTS,
    MERGE,
    TRANSPOSE,
    columns,
    expert_names,
    experts,
    moe,
    naive,
    plan_of,
    target,
    target_from,
    write_checkpoint,
)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("threads", [1, 3])
def test_experts_land_in_grouped_buffers(tmp_path, layout, threads):
    tensors, checkpoint, plan = moe(tmp_path, *LAYOUTS[layout])
    stacked = {p: torch.stack([tensors[n] for n in expert_names(6, p)]) for p in ("gate", "up", "down")}
    gate_up = torch.cat([stacked["gate"], stacked["up"]], dim=1)
    down = stacked["down"]
    if layout == "interleaved":
        gate_up = torch.stack([stacked["gate"], stacked["up"]], dim=2).flatten(1, 2)
        half = down.shape[1] // 2
        down = torch.stack([down[:, :half], down[:, half:]], dim=2).flatten(1, 2)
    if layout != "rows":
        gate_up, down = gate_up.transpose(1, 2), down.transpose(1, 2)
    buffers = allocate(plan.targets)
    load_to_host(plan, checkpoint, buffers, threads=threads)
    assert_bytes_equal(buffers["gate_up"], gate_up.contiguous(), strides=True)
    assert_bytes_equal(buffers["down"], down.contiguous(), strides=True)
    assert_bytes_equal(buffers["norm"], tensors["norm.weight"], strides=True)


def test_files_written_by_safetensors_load(tmp_path):
    tensors = experts(4, 3, 5, torch.float32)
    save_file(tensors, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    sources = columns(checkpoint)
    gate = target(sources, "gate", "F32", [expert_names(4, "gate")], [MERGE])
    plan = plan_of(sources, gate)
    check_load(plan, checkpoint, {"gate": torch.stack([tensors[n] for n in expert_names(4, "gate")])})


@pytest.mark.parametrize("pad", range(1, 8))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_data_may_start_at_any_byte(tmp_path, pad, layout):
    tensors, checkpoint, plan = moe(tmp_path, *LAYOUTS[layout], pad=pad, dtype=torch.float32, shape=(3, 5, 4))
    assert any(offset % 4 for offset in checkpoint.offsets) == bool(pad % 4)
    check_load(plan, checkpoint, naive(plan, tensors))


@pytest.mark.parametrize("code", ["BOOL", "U8", "F8_E4M3", "F8_E8M0", "F4", "I16", "F64", "C64", "U64"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_width_of_element_loads(tmp_path, code, layout):
    dtype = torch_dtype(code)
    if dtype is None:
        pytest.skip(f"this torch has no {code}")
    raw = {"F4": "U8", "F8_E4M3": "U8", "F8_E8M0": "U8"}.get(code, code)
    tensors, checkpoint, plan = moe(tmp_path, *LAYOUTS[layout], dtype=dtype, shape=(2, 3, 4))
    as_raw = CopyPlan(
        type(plan.sources)(plan.sources.names, [raw] * len(tensors), plan.sources.shapes),
        tuple(t._replace(dtype=raw) for t in plan.targets),
    )
    expected = naive(as_raw, {n: t.view(torch_dtype(raw)) for n, t in tensors.items()})
    check_load(plan, checkpoint, {n: t.view(dtype) for n, t in expected.items()})


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("options", [{}, {"scratch_bytes": 4096, "threads": 8}])
def test_each_byte_is_read_once(tmp_path, calls, layout, options):
    tensors, checkpoint, plan = moe(tmp_path, *LAYOUTS[layout], shape=(3, 8, 30))
    expected = naive(plan, tensors)
    before = calls.nbytes
    stats = check_load(plan, checkpoint, expected, **options)
    assert stats.bytes_read == plan.bytes_read
    assert calls.nbytes - before == stats.bytes_read + stats.gap_bytes
    assert stats.gap_bytes == 0
    assert stats.scratch_bytes <= options.get("scratch_bytes", 64 << 20)
    assert not calls.open


def test_gate_and_up_from_interleaved_rows_are_read_once(tmp_path, calls):
    """Check that both targets use every slab of their source, which is far larger than the scratch."""
    fused = address_valued((3, 40, 50), torch.int32)
    checkpoint = write_checkpoint(tmp_path, {"a.safetensors": {"gate_up": fused}})
    sources = columns(checkpoint)
    chain = [Operation("Interleave", (("dim", 1),)), Operation("Chunk", (("dim", 1),))]
    plan = plan_of(
        sources,
        *(target(sources, name, "I32", [["gate_up"]], chain, outputs=("gate", "up")) for name in ("gate", "up")),
    )
    expected = naive(plan, {"gate_up": fused})
    before = calls.nbytes
    stats = check_load(plan, checkpoint, expected, scratch_bytes=4096, threads=2)
    assert calls.nbytes - before == fused.nbytes
    assert stats.scratch_bytes <= 4096


@pytest.mark.parametrize("threads", [1, 2, 64])
def test_source_larger_than_the_scratch_is_read_in_slabs(tmp_path, calls, threads):
    source = address_valued((5, 33, 41), torch.int32)
    checkpoint = write_checkpoint(tmp_path, {"a.safetensors": {"w": source}})
    sources = columns(checkpoint)
    plan = plan_of(
        sources,
        target(sources, "t", "I32", [["w"]], [TRANSPOSE]),
        target(sources, "r", "I32", [["w"]], [Operation("Transpose", (("dim0", 0), ("dim1", 2)))]),
        target(sources, "c", "I32", [["w"]]),
    )
    expected = {"t": source.transpose(1, 2), "r": source.transpose(0, 2), "c": source}
    before = calls.nbytes
    check_load(plan, checkpoint, expected, scratch_bytes=4096, threads=threads)
    assert calls.nbytes - before == source.nbytes


def test_targets_that_share_a_source_get_it_from_one_read(tmp_path, calls):
    source = address_valued((6, 8), torch.bfloat16)
    checkpoint = write_checkpoint(tmp_path, {"a.safetensors": {"w": source, "other": source + 1}})
    sources = columns(checkpoint)
    plan = plan_of(
        sources,
        target(sources, "first", "BF16", [["w"]]),
        target(sources, "second", "BF16", [["w"]]),
        target(sources, "third", "F32", [["w"]]),
        target(sources, "other", "BF16", [["other"]]),
    )
    expected = naive(plan, {"w": source, "other": source + 1})
    before = calls.nbytes
    check_load(plan, checkpoint, expected)
    assert calls.nbytes - before == plan.bytes_read


def test_targets_that_share_bytes_that_only_move_get_them_from_one_read(tmp_path, calls):
    source = address_valued((6, 8), torch.bfloat16)
    checkpoint = write_checkpoint(tmp_path, {"a.safetensors": {"w": source}})
    sources = columns(checkpoint)
    plan = plan_of(sources, *(target(sources, n, "BF16", [["w"]]) for n in ("first", "second")))
    before = calls.nbytes
    check_load(plan, checkpoint, {"first": source, "second": source})
    assert calls.nbytes - before == source.nbytes


def test_sources_of_different_widths_share_a_scratch(tmp_path):
    tensors = {
        "a": address_valued((1, 3, 5), torch.uint8),
        "b": address_valued((1, 4, 3), torch.float64),
        "c": address_valued((1, 7, 3), torch.int16),
    }
    checkpoint = write_checkpoint(tmp_path, {"a.safetensors": tensors})
    sources = columns(checkpoint)
    plan = plan_of(
        sources,
        *(target(sources, n, dtype_code(t.dtype), [[n]], [TRANSPOSE]) for n, t in tensors.items()),
    )
    check_load(plan, checkpoint, {n: t.transpose(1, 2) for n, t in tensors.items()})


def test_small_gaps_are_read_through_and_counted_and_large_ones_skipped(tmp_path, calls):
    tensors = {
        "a": address_valued((100,), torch.uint8),
        "small gap": torch.zeros(1000, dtype=torch.uint8),
        "b": address_valued((50,), torch.uint8, 100),
        "large gap": torch.zeros(GAP_BYTES + 1, dtype=torch.uint8),
        "c": address_valued((10,), torch.uint8, 150),
    }
    checkpoint = write_checkpoint(tmp_path, {"a.safetensors": tensors})
    sources = columns(checkpoint)
    plan = plan_of(sources, *(target(sources, n, "U8", [[n]]) for n in "abc"))
    before, reads = calls.nbytes, calls.reads
    stats = check_load(plan, checkpoint, tensors)
    assert stats[:3] == (160, 1000, 0)
    assert calls.nbytes - before == 1160
    assert calls.reads - reads == 2


@pytest.mark.parametrize("scratch_bytes", [1 << 20, None])
def test_only_the_wanted_part_of_a_source_is_read(tmp_path, calls, scratch_bytes):
    """Check columns of a source that are further apart than a small gap, in several slabs and in one."""
    wide = GAP_BYTES + 8
    source = address_valued((3, 2 * wide), torch.uint8)
    checkpoint = write_checkpoint(tmp_path, {"a.safetensors": {"w": source}})
    value = values.narrow(leaf(0, (3, 2 * wide)), 1, 0, wide)
    plan = plan_of(columns(checkpoint), target_from("t", "U8", value, [0]))
    before = calls.nbytes
    check_load(plan, checkpoint, {"t": source[:, :wide]}, scratch_bytes=scratch_bytes)
    assert calls.nbytes - before == 3 * wide


@pytest.mark.usefixtures("small_portions")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_large_tensors_are_split_between_threads(tmp_path, calls, layout):
    tensors, checkpoint, plan = moe(tmp_path, *LAYOUTS[layout], shape=(2, 10, 200))
    expected = naive(plan, tensors)
    before, reads = calls.nbytes, calls.reads
    check_load(plan, checkpoint, expected, threads=4)
    assert calls.nbytes - before == plan.bytes_read
    assert calls.reads - reads > plan.bytes_read / 256 / 2


@pytest.mark.parametrize(("source", "result"), [("BF16", "F32"), ("F32", "BF16"), ("F16", "F64")])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("scratch_bytes", [4096, None])
def test_casts_equal_tensor_to(tmp_path, source, result, transposed, scratch_bytes):
    torch.manual_seed(0)
    tensor = torch.randn(1, 70, 90).to(torch_dtype(source))
    tensor[0, 0, :3] = torch.tensor([float("inf"), -0.0, 3e-39])
    checkpoint = write_checkpoint(tmp_path, {"a.safetensors": {"w": tensor}})
    sources = columns(checkpoint)
    chain = [TRANSPOSE] if transposed else []
    plan = plan_of(sources, target(sources, "t", result, [["w"]], chain))
    expected = tensor.to(torch_dtype(result))
    check_load(
        plan,
        checkpoint,
        {"t": expected.transpose(1, 2) if transposed else expected},
        scratch_bytes=scratch_bytes,
    )


def test_zero_sized_targets_and_scalars_load(tmp_path, calls):
    tensors = {"empty": torch.empty(0, 4), "scalar": torch.tensor(2.5), "none": torch.empty(3, 0)}
    checkpoint = write_checkpoint(tmp_path, {"a.safetensors": tensors})
    sources = columns(checkpoint)
    plan = plan_of(sources, *(target(sources, n, "F32", [[n]]) for n in tensors))
    check_load(plan, checkpoint, tensors)
    only_empty = plan_of(sources, target(sources, "empty", "F32", [["empty"]]))
    reads = calls.reads
    check_load(only_empty, checkpoint, tensors)
    assert calls.reads == reads


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["BF16", "F32"])
@pytest.mark.parametrize("order", [(0, 2, 1), (2, 1, 0), (1, 2, 0)])
def test_buffers_of_any_strides_are_written_in_place(tmp_path, layout, dtype, order):
    tensors, checkpoint, plan = moe(tmp_path, *LAYOUTS[layout], shape=(3, 5, 6))
    plan = plan_of(plan.sources, *(t._replace(dtype=dtype) for t in plan.targets))
    finite = {n: torch.arange(t.numel()).reshape(t.shape).to(t.dtype) for n, t in tensors.items()}
    names = [[n for n in tensors if checkpoint.file_ids[checkpoint.position[n]] == f] for f in (0, 1)]
    checkpoint = write_checkpoint(
        tmp_path,
        {f: {n: finite[n] for n in part} for f, part in zip(("a.safetensors", "b.safetensors"), names, strict=True)},
    )
    guards = {}
    for t in plan.targets:
        strides, step = [0] * len(t.shape), 2 if dtype == "F32" else 1
        for d in [d for d in order if d < len(t.shape)]:
            strides[d], step = step, step * t.shape[d] + 1
        guards[t.name] = guarded(t.shape, torch_dtype(dtype), strides=strides)
    load_to_host(plan, checkpoint, {n: g.tensor for n, g in guards.items()})
    expected = naive(plan, finite)
    for name, guard in guards.items():
        guard.check()
        assert_bytes_equal(guard.tensor, expected[name])


def test_parameter_that_requires_grad_is_written(tmp_path):
    tensors = {"w": torch.randn(3, 4)}
    checkpoint = write_checkpoint(tmp_path, {"a.safetensors": tensors})
    sources = columns(checkpoint)
    parameter = torch.nn.Parameter(torch.empty(4, 3, dtype=torch.float64))
    transpose = Operation("Transpose", (("dim0", 0), ("dim1", 1)))
    plan = plan_of(sources, target(sources, "t", "F64", [["w"]], [transpose]))
    load_to_host(plan, checkpoint, {"t": parameter})
    assert_bytes_equal(parameter, tensors["w"].t().to(torch.float64))
    assert parameter.grad_fn is None


def test_allocate_returns_the_shapes_and_dtypes_of_the_plan():
    targets = [
        Target("big", "F32", (3, 1 << 20), -1, (), ()),
        Target("s", "F8_E4M3", (), -1, (), ()),
    ]
    tensors = allocate(targets)
    assert (tensors["big"].shape, tensors["big"].dtype) == ((3, 1 << 20), torch.float32)
    assert (tensors["s"].shape, tensors["s"].dtype) == ((), torch.float8_e4m3fn)
    with pytest.raises(UnsupportedError, match="odd"):
        allocate([Target("odd", "F6_E2M3", (4,), -1, (), ())])


@st.composite
def random_plans(draw):
    """Draw sources of one shape, a chain of operations, and targets that read parts of the result."""
    code = draw(st.sampled_from(["U8", "BF16", "F32", "F64"]))
    shape = tuple(draw(st.lists(st.sampled_from([0, 1, 2, 3, 5, 8]), min_size=1, max_size=3)))
    count = draw(st.integers(1, 4))
    # Small integers, which every dtype holds exactly.
    tensors = {
        f"s{i}": (torch.arange(torch.Size(shape).numel()) + i * 50).remainder(251).to(torch_dtype(code)).reshape(shape)
        for i in range(count)
    }
    leaves = [leaf(i, shape) for i in range(count)]
    join = draw(st.sampled_from(["stack", "concatenate"]))
    dim = draw(st.integers(0, len(shape) - 1))
    value: Value = getattr(values, join)(leaves, dim)
    for _ in range(draw(st.integers(0, 2))):
        rank = len(value.shape)
        a, b = draw(st.integers(0, rank - 1)), draw(st.integers(0, rank - 1))
        if draw(st.booleans()):
            value = values.transpose(value, a, b)
        else:
            value = values.reshape(value, (*value.shape[:a], *[1] * (a == b), *value.shape[a:]))
    parts = [value]
    if draw(st.booleans()):
        axis = draw(st.integers(0, len(value.shape) - 1))
        at = draw(st.integers(0, value.shape[axis]))
        halves = ((0, at), (at, value.shape[axis] - at))
        parts = [values.narrow(value, axis, start, length) for start, length in halves]
    if draw(st.booleans()):
        parts.append(value)
    results = [draw(st.sampled_from([code, *(["F32"] if code != "U8" else [])])) for _ in parts]
    orders = [draw(st.permutations(range(len(part.shape)))) for part in parts]
    return tensors, parts, results, orders


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    drawn=random_plans(),
    pad=st.integers(0, 7),
    threads=st.sampled_from([1, 3, 40]),
    split=st.integers(0, 4),
)
def test_any_chain_of_operations_loads_like_the_oracle(tmp_path_factory, drawn, pad, threads, split):
    tensors, parts, results, orders = drawn
    names = list(tensors)
    files = {"a.safetensors": names[:split], "b.safetensors": names[split:]}
    checkpoint = write_checkpoint(
        tmp_path_factory.mktemp("any"),
        {f: {n: tensors[n] for n in part} for f, part in files.items() if part},
        pad,
    )
    try:
        plan = plan_of(
            columns(checkpoint),
            *(
                target_from(f"t{i}", result, part, range(len(tensors)))
                for i, (part, result) in enumerate(zip(parts, results, strict=True))
            ),
        )
    except NotAffine:
        reject()
    guards = {}
    for t, order in zip(plan.targets, orders, strict=True):
        strides, step = [0] * len(t.shape), 1
        for d in order:
            strides[d], step = step, step * max(t.shape[d], 1)
        guards[t.name] = guarded(t.shape, torch_dtype(t.dtype), strides=strides)
    buffers = {n: g.tensor for n, g in guards.items()}
    stats = load_to_host(plan, checkpoint, buffers, threads=threads, scratch_bytes=4096)
    assert stats.scratch_bytes <= 4096
    expected = naive(plan, tensors)
    for name, guard in guards.items():
        guard.check()
        assert_bytes_equal(guard.tensor, expected[name])


def test_no_element_keeps_its_poison(tmp_path):
    _, checkpoint, plan = moe(tmp_path, TRANSPOSE)
    guards = outputs(plan)
    load_to_host(plan, checkpoint, {n: g.tensor for n, g in guards.items()}, threads=2)
    for guard in guards.values():
        assert_written(guard.tensor)


def test_support_writes_files_that_safetensors_reads(tmp_path):
    from safetensors.torch import load_file

    tensors = {"w": address_valued((3, 5), torch.bfloat16), "v": torch.tensor(True)}
    checkpoint = write_checkpoint(tmp_path, {"a.safetensors": tensors}, pad=3)
    assert json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    for name, tensor in load_file(checkpoint.files[0]).items():
        assert_bytes_equal(tensor, tensors[name])


@pytest.mark.parametrize("rows", [0, 2, 5])
def test_rows_that_no_copy_fills_are_zero(tmp_path, rows):
    case = padded_case(tmp_path, rows)
    check_load(case.plan, case.checkpoint, case.expected)
