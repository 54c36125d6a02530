"""From files to host buffers: right bytes, each read once, and clear errors when reading fails."""

from __future__ import annotations

import itertools
import json
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from automodel_conv.dtypes import dtype_code, torch_dtype
from automodel_conv.errors import ConversionError, ReadError, UnsupportedError
from automodel_conv.execution import host as cpu
from automodel_conv.execution import workers
from automodel_conv.execution.buffers import allocate
from automodel_conv.execution.host import load_to_host
from automodel_conv.files.checkpoint import Checkpoint, open_checkpoint
from automodel_conv.planning import values
from automodel_conv.planning.boxes import Box, NotAffine, contiguous_strides
from automodel_conv.planning.copies import Fallback, Target
from automodel_conv.planning.operations import Operation
from automodel_conv.planning.plan import CopyPlan
from automodel_conv.planning.values import Value, leaf
from automodel_conv.schedule import host as schedule
from automodel_conv.schedule.cutting import slabs
from automodel_conv.schedule.jobs import GAP_BYTES, Move
from automodel_conv.testing import (
    Guarded,
    address_valued,
    assert_bytes_equal,
    assert_written,
    guarded,
)
from tests.execution.support import (
    LAYOUTS,
    MERGE,
    TRANSPOSE,
    columns,
    expert_names,
    experts,
    made,
    moe,
    naive,
    plan_of,
    target,
    write_checkpoint,
)


@pytest.fixture
def small_portions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs of a few hundred bytes, so that a small checkpoint makes many."""
    monkeypatch.setattr(schedule, "_LEAST_JOB_BYTES", 256)
    monkeypatch.setattr(schedule, "RUN_BYTES", 256)
    monkeypatch.setattr(schedule, "_SLAB_BYTES", 256)


def outputs(plan: CopyPlan) -> dict[str, Guarded]:
    return {t.name: guarded(t.shape, torch_dtype(t.dtype)) for t in plan.targets}


def check_load(plan: CopyPlan, checkpoint: Checkpoint, expected: dict[str, Tensor], **options: int) -> cpu.LoadStats:
    guards = outputs(plan)
    stats = load_to_host(plan, checkpoint, {n: g.tensor for n, g in guards.items()}, **options)
    for name, guard in guards.items():
        guard.check()
        assert_bytes_equal(guard.tensor, expected[name])
    return stats


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


# --- reading once ---------------------------------------------------------------------------------


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
    """Both targets read every slab of the one source, which is far larger than the scratch."""
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
def test_a_source_larger_than_the_scratch_goes_through_in_slabs(tmp_path, calls, threads):
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
    """Columns of a source that lie further apart than a small gap, in several slabs and in one."""
    wide = GAP_BYTES + 8
    source = address_valued((3, 2 * wide), torch.uint8)
    checkpoint = write_checkpoint(tmp_path, {"a.safetensors": {"w": source}})
    value = values.narrow(leaf(0, (3, 2 * wide)), 1, 0, wide)
    plan = plan_of(columns(checkpoint), made("t", "U8", value, [0]))
    before = calls.nbytes
    check_load(plan, checkpoint, {"t": source[:, :wide]}, scratch_bytes=scratch_bytes)
    assert calls.nbytes - before == 3 * wide


@pytest.mark.usefixtures("small_portions")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_large_tensors_are_shared_out_to_threads(tmp_path, calls, layout):
    tensors, checkpoint, plan = moe(tmp_path, *LAYOUTS[layout], shape=(2, 10, 200))
    expected = naive(plan, tensors)
    before, reads = calls.nbytes, calls.reads
    check_load(plan, checkpoint, expected, threads=4)
    assert calls.nbytes - before == plan.bytes_read
    assert calls.reads - reads > plan.bytes_read / 256 / 2


# --- slabs ----------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_slabs_hold_each_move_element_once_and_stay_small(data):
    size = st.integers(1, 6)
    moves = []
    for number in range(data.draw(st.integers(1, 3))):
        shape = tuple(data.draw(st.lists(size, max_size=3)))
        strides = tuple(data.draw(st.integers(0, 12)) for _ in shape)
        places = contiguous_strides(shape)
        start = data.draw(st.integers(0, 9))
        moves.append(Move(number, "U8", Box(shape, strides, places), start, 0))
    capacity = data.draw(st.integers(1, 20))

    def pairs(some):
        found = []
        for move in some:
            for index in (
                torch.cartesian_prod(*map(torch.arange, move.box.shape)).reshape(-1, len(move.box.shape)).tolist()
                if move.box.shape
                else [[]]
            ):
                read = move.source_offset + sum(i * s for i, s in zip(index, move.box.source_strides, strict=True))
                write = move.target_offset + sum(i * s for i, s in zip(index, move.box.target_strides, strict=True))
                found.append((move.target, write, read))
        return found

    cut = list(slabs(moves, capacity))
    assert sorted(p for _, _, part in cut for p in pairs(part)) == sorted(pairs(moves))
    ends = [(start, stop) for start, stop, _ in cut]
    for start, stop, part in cut:
        assert stop - start <= capacity
        assert all(start <= read < stop for _, _, read in pairs(part))
    assert all(before[1] <= after[0] for before, after in itertools.pairwise(ends))


# --- casts, empty tensors, odd buffers ------------------------------------------------------------


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


def test_a_parameter_that_requires_grad_is_written(tmp_path):
    tensors = {"w": torch.randn(3, 4)}
    checkpoint = write_checkpoint(tmp_path, {"a.safetensors": tensors})
    sources = columns(checkpoint)
    parameter = torch.nn.Parameter(torch.empty(4, 3, dtype=torch.float64))
    transpose = Operation("Transpose", (("dim0", 0), ("dim1", 1)))
    plan = plan_of(sources, target(sources, "t", "F64", [["w"]], [transpose]))
    load_to_host(plan, checkpoint, {"t": parameter})
    assert_bytes_equal(parameter, tensors["w"].t().to(torch.float64))
    assert parameter.grad_fn is None


@pytest.mark.parametrize(
    ("buffer", "text"),
    [
        (None, "no buffer for down"),
        (torch.empty(3, 5, 4), "does not fit"),
        (torch.empty(3, 4, 5, dtype=torch.float64), "does not fit"),
        (torch.empty(1, 4, 5).expand(3, 4, 5), "share memory"),
    ],
)
def test_a_buffer_that_does_not_fit_is_named_before_anything_is_read(tmp_path, calls, buffer, text):
    _, checkpoint, plan = moe(tmp_path, dtype=torch.float32, shape=(3, 5, 4))
    buffers: dict[str, Tensor] = allocate(plan.targets)
    del buffers["down"]
    if buffer is not None:
        buffers["down"] = buffer
    reads = calls.reads
    with pytest.raises(ConversionError, match=text) as error:
        load_to_host(plan, checkpoint, buffers)
    assert "down" in str(error.value)
    assert calls.reads == reads


@pytest.mark.parametrize("options", [{"threads": 0}, {"scratch_bytes": 100}])
def test_impossible_options_are_refused(tmp_path, options):
    _, checkpoint, plan = moe(tmp_path)
    with pytest.raises(ConversionError, match="scratch_bytes"):
        load_to_host(plan, checkpoint, allocate(plan.targets), **options)


def test_allocate_gives_the_shapes_and_dtypes_of_the_plan():
    targets = [
        Target("big", "F32", (3, 1 << 20), -1, (), ()),
        Target("s", "F8_E4M3", (), -1, (), ()),
    ]
    tensors = allocate(targets)
    assert (tensors["big"].shape, tensors["big"].dtype) == ((3, 1 << 20), torch.float32)
    assert (tensors["s"].shape, tensors["s"].dtype) == ((), torch.float8_e4m3fn)
    with pytest.raises(UnsupportedError, match="odd"):
        allocate([Target("odd", "F6_E2M3", (4,), -1, (), ())])


# --- trouble --------------------------------------------------------------------------------------


@pytest.mark.usefixtures("small_portions")
@pytest.mark.parametrize("layout", ["rows", "transposed"])
def test_any_read_that_fails_is_one_error_and_leaves_no_file_open(tmp_path, calls, layout):
    tensors, checkpoint, plan = moe(tmp_path, *LAYOUTS[layout], shape=(3, 8, 20))
    expected = naive(plan, tensors)
    calls.reads = 0
    load_to_host(plan, checkpoint, allocate(plan.targets), threads=2)
    total = calls.reads
    assert total > 4
    complete = []
    for number in range(1, total + 1):
        calls.reads, calls.fail_read = 0, number
        buffers = {n: g.tensor for n, g in outputs(plan).items()}
        with pytest.raises(ReadError, match="Input/output error") as error:
            load_to_host(plan, checkpoint, buffers, threads=2)
        assert not calls.open
        text = str(error.value)
        assert ".safetensors" in text
        assert "experts." in text or "norm.weight" in text
        written = [line.strip() for line in text.partition("filled:")[2].splitlines()[1:]]
        assert f"{len(written)} of 3 targets" in text
        for name in written:
            assert_bytes_equal(buffers[name], expected[name])
        complete.append(len(written))
    assert max(complete) > min(complete)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("short_bytes", [1, 7, 300])
def test_short_reads_are_continued(tmp_path, calls, layout, short_bytes):
    tensors, checkpoint, plan = moe(tmp_path, *LAYOUTS[layout], shape=(2, 5, 8))
    calls.short_bytes = short_bytes
    check_load(plan, checkpoint, naive(plan, tensors))


@pytest.mark.parametrize("layout", ["rows", "transposed"])
def test_a_file_cut_after_it_was_opened_names_file_and_tensor(tmp_path, calls, layout):
    _, checkpoint, plan = moe(tmp_path, *LAYOUTS[layout])
    row = checkpoint.position["experts.4.gate"]
    path = Path(checkpoint.files[checkpoint.file_ids[row]])
    path.write_bytes(path.read_bytes()[: checkpoint.offsets[row] + 3])
    with pytest.raises(ReadError, match="ends too early") as error:
        load_to_host(plan, checkpoint, allocate(plan.targets), threads=1)
    assert str(path) in str(error.value)
    assert "experts.4.gate" in str(error.value)
    assert "one of" not in str(error.value)
    assert not calls.open


def test_a_file_that_is_gone_is_named(tmp_path, calls):
    _, checkpoint, plan = moe(tmp_path)
    Path(checkpoint.files[1]).unlink()
    with pytest.raises(ReadError, match=r"b\.safetensors"):
        load_to_host(plan, checkpoint, allocate(plan.targets))
    assert not calls.open


def test_ctrl_c_propagates_and_closes_files(tmp_path, calls, monkeypatch):
    _, checkpoint, plan = moe(tmp_path)

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(workers, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load_to_host(plan, checkpoint, allocate(plan.targets), threads=2)
    assert not calls.open
    assert not [t for t in threading.enumerate() if t.name.startswith("automodel_conv")]


@pytest.mark.parametrize("number", [1, 2])
def test_a_thread_of_a_load_is_one_thread_of_torch_which_keeps_its_number(tmp_path, monkeypatch, number):
    within = []
    real = cpu.copy_equal
    monkeypatch.setattr(cpu, "copy_equal", lambda batches: [within.append(torch.get_num_threads()), real(batches)])
    _, checkpoint, plan = moe(tmp_path, TRANSPOSE)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        load_to_host(plan, checkpoint, allocate(plan.targets), threads=number)
        assert set(within) == {1}
        seen = [torch.get_num_threads()]
        thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        assert seen == [3, 3]
    finally:
        torch.set_num_threads(before)


def test_progress_counts_all_bytes_and_is_off_by_default(tmp_path, capsys):
    _, checkpoint, plan = moe(tmp_path)
    load_to_host(plan, checkpoint, allocate(plan.targets))
    assert capsys.readouterr() == ("", "")
    load_to_host(plan, checkpoint, allocate(plan.targets), progress=True)
    shown = capsys.readouterr().err
    assert "100%" in shown
    assert "B/s" in shown


# --- targets made by upstream's own code ----------------------------------------------------------


def fallback_plan(tmp_path: Path, convert):
    tensors = {
        "a": address_valued((3, 4), torch.float32),
        "b": address_valued((5,), torch.bfloat16),
    }
    checkpoint = write_checkpoint(tmp_path, {"a.safetensors": tensors})
    sources = columns(checkpoint)
    fallback = Fallback("a test says so", convert)
    plan = plan_of(
        sources,
        Target("sum", "F64", (3, 4), -1, (0,), (), fallback),
        Target("flat", "F32", (12,), -1, (0,), (), fallback),
        target(sources, "b", "BF16", [["b"]]),
    )
    return tensors, checkpoint, plan


def test_modes_of_the_calling_thread_change_nothing(tmp_path):
    tensors, checkpoint, plan = fallback_plan(tmp_path / "upstream", lambda sources: made_of(sources[0]))
    with torch.inference_mode(), torch.device("meta"):
        found = allocate(plan.targets)
        load_to_host(plan, checkpoint, found)
    for name, tensor in {**made_of(tensors["a"]), "b": tensors["b"]}.items():
        assert_bytes_equal(found[name], tensor.to(found[name].dtype))
    tensors, checkpoint, plan = moe(tmp_path / "copies", *LAYOUTS["transposed"])
    with torch.inference_mode(), torch.device("meta"):
        found = allocate(plan.targets)
        load_to_host(plan, checkpoint, found)
    for name, tensor in naive(plan, tensors).items():
        assert_bytes_equal(found[name], tensor)


def made_of(a):
    return {"sum": a * 2, "flat": a.flatten()}


def test_upstream_code_runs_once_for_all_its_targets(tmp_path):
    seen = []

    def convert(sources):
        seen.append({row: t.clone() for row, t in sources.items()})
        return {"sum": sources[0] * 2, "flat": sources[0].flatten()}

    tensors, checkpoint, plan = fallback_plan(tmp_path, convert)
    a = tensors["a"]
    expected = {"sum": (a * 2).to(torch.float64), "flat": a.flatten(), "b": tensors["b"]}
    check_load(plan, checkpoint, expected)
    assert len(seen) == 1
    assert seen[0].keys() == {0}
    assert_bytes_equal(seen[0][0], a)


@pytest.mark.parametrize(
    ("made_by_upstream", "text"),
    [
        ({"sum": torch.zeros(3, 4)}, "did not make flat"),
        ({"sum": torch.zeros(4, 3), "flat": torch.zeros(12)}, "made sum differently"),
        (
            {"sum": torch.zeros(3, 4), "flat": torch.zeros(12, dtype=torch.int32)},
            "made flat differently",
        ),
    ],
)
def test_upstream_code_that_makes_something_else_is_an_error(tmp_path, made_by_upstream, text):
    _, checkpoint, plan = fallback_plan(tmp_path, lambda sources: made_by_upstream)
    with pytest.raises(ConversionError, match=text):
        load_to_host(plan, checkpoint, allocate(plan.targets))


# --- anything -------------------------------------------------------------------------------------


@st.composite
def random_plans(draw):
    """Sources of one shape, a chain of operations, and targets that read parts of the result."""
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
def test_any_chain_of_operations_loads_as_the_oracle_says(tmp_path_factory, drawn, pad, threads, split):
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
                made(f"t{i}", result, part, range(len(tensors)))
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


def test_support_writes_what_safetensors_reads(tmp_path):
    from safetensors.torch import load_file

    tensors = {"w": address_valued((3, 5), torch.bfloat16), "v": torch.tensor(True)}
    checkpoint = write_checkpoint(tmp_path, {"a.safetensors": tensors}, pad=3)
    assert json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    for name, tensor in load_file(checkpoint.files[0]).items():
        assert_bytes_equal(tensor, tensors[name])
