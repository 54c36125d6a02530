"""Tests of conversions in memory: the same plans as for files, with sources and buffers of any strides."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from unittest import mock

import pytest
import torch
from hypothesis import given, reject
from hypothesis import strategies as st
from torch import Tensor

from automodel_conv.dtypes import torch_dtype
from automodel_conv.errors import ConversionError, UnsupportedError
from automodel_conv.execution import copy_batch
from automodel_conv.execution import memory as memory_executor
from automodel_conv.execution.buffers import allocate
from automodel_conv.execution.memory import CopyCounts, convert_tensors
from automodel_conv.kernels import verbs
from automodel_conv.planning import boxes, values
from automodel_conv.planning.boxes import NotAffine
from automodel_conv.planning.copies import Fallback, SourceTable, Target
from automodel_conv.planning.operations import Operation
from automodel_conv.planning.plan import CopyPlan
from automodel_conv.planning.values import leaf
from automodel_conv.testing import address_valued, assert_bytes_equal, guarded
from tests.execution.slab_writes import padded_case
from tests.execution.support import (
    CONCATENATE,
    INTERLEAVE,
    MERGE,
    TRANSPOSE,
    expert_names,
    experts,
    naive,
    plan_of,
    table,
    target,
    target_from,
)

BACKENDS = ("torch",) if importlib.util.find_spec("triton") is None else ("torch", "triton")
needs_triton = pytest.mark.skipif("triton" not in BACKENDS, reason="triton is not installed")
LAYOUTS = {"rows": (), "transposed": (TRANSPOSE,), "interleaved": (INTERLEAVE, TRANSPOSE)}


def check_conversion(
    plan: CopyPlan, tensors: dict[str, Tensor], sources: list[Tensor], backends=BACKENDS
) -> list[CopyCounts]:
    expected, counts = naive(plan, tensors), []
    for backend in backends:
        guards = {t.name: guarded(t.shape, torch_dtype(t.dtype)) for t in plan.targets}
        counts.append(
            convert_tensors(plan, sources, {name: guard.tensor for name, guard in guards.items()}, backend=backend)
        )
        for name, guard in guards.items():
            guard.check()
            assert_bytes_equal(guard.tensor, expected[name])
    return counts


def laid_out(tensor: Tensor, order: tuple[int, ...], step: int = 1) -> Tensor:
    """Return the same values with other strides: dimensions in ``order``, the fastest first."""
    strides = [0] * tensor.dim()
    for d in order:
        strides[d], step = step, step * tensor.shape[d]
    other = guarded(tensor.shape, tensor.dtype, strides=strides).tensor
    other.copy_(tensor)
    return other


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("source_layout", ["contiguous", "transposed", "sliced"])
def test_experts_are_grouped(layout, source_layout):
    tensors = experts(5, 6, 20, torch.bfloat16)
    sources = table(tensors)
    gate, up, down = (expert_names(5, p) for p in ("gate", "up", "down"))
    chain = LAYOUTS[layout]
    plan = plan_of(
        sources,
        target(sources, "gate_up", "BF16", [gate, up], [MERGE, CONCATENATE, *chain]),
        target(sources, "down", "BF16", [down], [MERGE, *chain]),
    )
    lay = {
        "contiguous": lambda t: t.clone(),
        "transposed": lambda t: laid_out(t, (0, 1)),
        "sliced": lambda t: laid_out(t, (1, 0), step=3),
    }[source_layout]
    check_conversion(plan, tensors, [lay(t) for t in tensors.values()])


@needs_triton
def test_layers_of_one_geometry_are_one_launch_for_each_verb():
    tensors = experts(3, 16, 24, torch.bfloat16)
    layers = {f"{n}.{name}": tensor + 0 for n in range(4) for name, tensor in tensors.items()}
    sources = table(layers)
    targets = []
    for n in range(4):
        gate, up, down = ([f"{n}.{name}" for name in expert_names(3, p)] for p in ("gate", "up", "down"))
        targets += [
            target(sources, f"{n}.gate_up", "BF16", [gate, up], [MERGE, CONCATENATE, TRANSPOSE]),
            target(sources, f"{n}.down", "BF16", [down], [MERGE]),
        ]
    launched = []
    spied = tuple(replace(verb, launches=spy(verb.launches, launched)) for verb in verbs.VERBS)
    with mock.patch.object(verbs, "VERBS", spied):
        (counts,) = check_conversion(plan_of(sources, *targets), layers, list(layers.values()), ["triton"])
    assert sorted(launched) == [("strided_copy_launches", 12), ("transpose_launches", 24)]
    assert counts == CopyCounts(by_kernels=36, by_torch=0)


@needs_triton
def test_copies_without_a_kernel_are_run_by_torch_and_counted():
    tensors = {"alternating": address_valued((6, 10), torch.float32), "wide": address_valued((3, 5), torch.int64)}
    sources = table(tensors)
    apart = Operation("Interleave", (("dim", 1), ("inverse", False)))
    plan = plan_of(
        sources,
        target(sources, "apart", "F32", [["alternating"]], [apart]),
        target(sources, "turned", "I64", [["wide"]], [Operation("Transpose", (("dim0", 0), ("dim1", 1)))]),
        target(sources, "same", "I64", [["wide"]], []),
    )
    torch_work, triton_work = check_conversion(plan, tensors, list(tensors.values()))
    assert torch_work.by_kernels == 0
    assert triton_work.by_kernels == 1
    assert triton_work.by_torch >= 2


@needs_triton
def test_conjugate_views_arrive_conjugated():
    tensors = {"z": torch.tensor([[1 + 2j, 3 - 4j]], dtype=torch.complex64)}
    sources = table(tensors)
    plan = plan_of(sources, target(sources, "z", "C64", [["z"]], []))
    for backend in BACKENDS:
        filled = torch.zeros(1, 2, dtype=torch.complex64)
        convert_tensors(plan, [tensors["z"].conj()], {"z": filled}, backend=backend)
        assert_bytes_equal(filled, tensors["z"].conj().resolve_conj())


def spy(verb, launched):
    def call(*operands):
        launched.append((verb.__name__, len(operands[0].addresses)))
        return verb(*operands)

    return call


def test_explicit_backend_never_falls_back():
    tensors = [torch.zeros(2), torch.zeros(2)]
    with mock.patch.object(copy_batch, "why_not", return_value="no compiler"):
        with pytest.raises(UnsupportedError, match="no compiler"):
            copy_batch.uses_kernels("triton", tensors)
        assert not copy_batch.uses_kernels("auto", tensors)
    with pytest.raises(UnsupportedError, match="several devices"):
        copy_batch.uses_kernels("triton", [*tensors, torch.zeros(2, device="meta")])
    with pytest.raises(UnsupportedError, match="unknown backend 'cuda'"):
        copy_batch.uses_kernels("cuda", tensors)
    assert not copy_batch.uses_kernels("torch", tensors)


def test_auto_uses_kernels_on_one_gpu_if_they_run():
    class OnGpu:
        def __init__(self, index):
            self.device = torch.device("cuda", index)

    with mock.patch.object(copy_batch, "why_not", return_value=None):
        assert copy_batch.uses_kernels("auto", [OnGpu(0), OnGpu(0)])
        assert not copy_batch.uses_kernels("auto", [OnGpu(0), OnGpu(1)])
        assert not copy_batch.uses_kernels("auto", [torch.zeros(1)])
    with mock.patch.object(copy_batch, "why_not", return_value="triton is not installed"):
        assert not copy_batch.uses_kernels("auto", [OnGpu(0)])


def test_tensors_large_enough_for_fast_transposes_arrive_whole():
    tensors = {f"w{i}": address_valued((130, 257), torch.int32, i * 130 * 257) for i in range(3)}
    sources = table(tensors)
    plan = plan_of(sources, target(sources, "t", "I32", [list(tensors)], [MERGE, TRANSPOSE]))
    buffers = allocate(plan.targets)
    convert_tensors(plan, list(tensors.values()), buffers)
    expected = torch.stack(list(tensors.values())).transpose(1, 2).contiguous()
    assert_bytes_equal(buffers["t"], expected, strides=True)


@pytest.mark.parametrize("result", ["F32", "BF16"])
def test_sources_of_different_dtypes_are_cast_to_the_target(result):
    tensors = {"a": torch.randn(5, 7), "b": torch.randn(5, 7).to(torch.bfloat16)}
    sources = table(tensors)
    plan = plan_of(sources, target(sources, "t", result, [["a", "b"]], [MERGE, TRANSPOSE]))
    check_conversion(plan, tensors, list(tensors.values()))


def test_parameter_that_requires_grad_is_written_and_read():
    source = torch.nn.Parameter(torch.randn(3, 4))
    output = torch.nn.Parameter(torch.empty(4, 3))
    sources = table({"w": source})
    transpose = Operation("Transpose", (("dim0", 0), ("dim1", 1)))
    plan = plan_of(sources, target(sources, "t", "F32", [["w"]], [transpose]))
    convert_tensors(plan, [source], {"t": output})
    assert_bytes_equal(output, source.t())
    assert output.grad_fn is None


def test_sources_without_targets_are_ignored():
    tensors = {"w": torch.randn(3), "odd": torch.randn(2)}
    sources = table(tensors)
    plan = plan_of(sources, target(sources, "t", "F32", [["w"]]))
    check_conversion(plan, tensors, [tensors["w"], torch.empty(9, dtype=torch.int8)])


def test_zero_sized_targets_and_scalars_convert():
    tensors = {"empty": torch.empty(0, 4), "scalar": torch.tensor(2.5)}
    sources = table(tensors)
    plan = plan_of(sources, *(target(sources, n, "F32", [[n]]) for n in tensors))
    check_conversion(plan, tensors, list(tensors.values()))


def one_to_one(*shapes: tuple[int, ...]) -> CopyPlan:
    names = [f"s{i}" for i in range(len(shapes))]
    sources = SourceTable(names, ["F32"] * len(shapes), list(shapes))
    return plan_of(sources, *(target(sources, n.replace("s", "t"), "F32", [[n]]) for n in names))


def test_buffer_in_the_memory_of_a_source_is_refused_and_both_are_named():
    memory = torch.arange(40, dtype=torch.float32)
    before = memory.clone()
    plan = one_to_one((10,), (10,), (10,))
    sources = [memory[:10], memory[10:20], torch.ones(10)]
    buffers = {"t0": memory[20:30], "t1": memory[30:40], "t2": memory[19:29]}
    with pytest.raises(ConversionError, match="t2") as error:
        convert_tensors(plan, sources, buffers)
    assert "s1" in str(error.value)
    assert_bytes_equal(memory, before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_buffer_that_is_its_own_unchanged_source_is_left_as_it_is(backend):
    memory = torch.arange(40, dtype=torch.float32)
    before = memory.clone()
    plan = one_to_one((10,), (2, 5), (10,))
    sources = [memory[:10], memory[10:20].view(2, 5), torch.ones(10)]
    buffers = {"t0": memory[:10], "t1": memory[10:20].view(2, 5), "t2": memory[30:]}
    assert convert_tensors(plan, sources, buffers, backend=backend) in (CopyCounts(1, 0), CopyCounts(0, 1))
    assert_bytes_equal(memory, torch.cat([before[:30], torch.ones(10)]))


@pytest.mark.parametrize("other", ["part", "transposed", "buffer", "reordered"])
def test_buffer_at_its_source_is_refused_unless_nothing_is_written(other):
    memory = torch.arange(36, dtype=torch.float32)
    before, square = memory.clone(), memory.view(6, 6)
    plan, source, buffer, third = one_to_one((6, 6), (6, 6)), square, square, torch.empty(6, 6)
    if other == "part":
        plan, source, buffer = one_to_one((5, 6), (6, 6)), square[:5], square[1:]
    elif other == "transposed":
        buffer = square.t()
    elif other == "buffer":
        third = square  # both targets would be in the memory of the first source
    else:
        sources, swapped = table({"s0": square, "s1": square}), Operation("Transpose", (("dim0", 0), ("dim1", 1)))
        plan = plan_of(
            sources, target(sources, "t0", "F32", [["s0"]], [swapped]), target(sources, "t1", "F32", [["s1"]])
        )
    with pytest.raises(ConversionError, match="overlaps the memory of the source s0"):
        convert_tensors(plan, [source, torch.ones(6, 6)], {"t0": buffer, "t1": third})
    assert_bytes_equal(memory, before)


def test_conjugate_view_of_a_source_is_not_the_source():
    source = torch.tensor([1 + 2j, 3 - 4j], dtype=torch.complex64)
    sources = table({"z": source})
    with pytest.raises(ConversionError, match="overlaps the memory"):
        convert_tensors(plan_of(sources, target(sources, "z", "C64", [["z"]])), [source], {"z": source.conj()})


def test_small_buffer_inside_a_long_source_is_refused():
    memory = torch.arange(100, dtype=torch.float32)
    plan = one_to_one((100,), (2,), (2,))
    buffers = {"t0": torch.empty(100), "t1": torch.empty(2), "t2": memory[90:92]}
    with pytest.raises(ConversionError, match=r"t2.*s0"):
        convert_tensors(plan, [memory, memory[3:5], torch.empty(2)], buffers)


def test_neighbours_in_one_memory_and_sources_that_overlap_are_fine():
    memory = torch.arange(40, dtype=torch.float32)
    plan = one_to_one((10,), (10,))
    sources = [memory[0:10], memory[5:15]]
    expected = [s.clone() for s in sources]
    convert_tensors(plan, sources, {"t0": memory[15:25], "t1": memory[25:35]})
    assert_bytes_equal(memory[15:35], torch.cat(expected))


def test_buffers_that_share_elements_are_refused_and_both_are_named():
    memory = torch.arange(40, dtype=torch.float32)
    before = memory.clone()
    sources = [torch.ones(4, 3), torch.ones(10), torch.ones(2, 3)]
    plan = one_to_one((4, 3), (10,), (2, 3))
    columns = memory.view(4, 10)
    for other in (columns[:2, 2:5], columns[2:, 0:9:4], columns.t()[:2, 1:]):
        buffers = {"t0": columns[:, :3], "t1": torch.empty(10), "t2": other}
        with pytest.raises(ConversionError, match="buffers of t0 and t2 share memory"):
            convert_tensors(plan, sources, buffers)
        assert_bytes_equal(memory, before)


INTERLOCKED = {
    "adjacent columns": lambda m: (m[..., :4], m[..., 4:]),
    "columns that alternate": lambda m: (m[..., 0::2], m[..., 1::2]),
    "rows that alternate": lambda m: (m[:, 0::2, :4], m[:, 1::2, :4]),
    "blocks of a matrix": lambda m: (m[:, :3, 4:], m[:, 3:, 4:]),
    "adjacent slices": lambda m: (m[:2], m[2:]),
    "transposed, alternating": lambda m: (m[..., 0::2].transpose(1, 2), m[..., 1::2].transpose(1, 2)),
    "one in a gap of the other": lambda m: (m[..., 0::3], m[1, 2, 1:3]),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", INTERLOCKED)
def test_views_of_one_storage_that_share_no_element_are_all_written(name, backend):
    memory = torch.zeros(4, 6, 8)
    first, second = INTERLOCKED[name](memory)
    plan = one_to_one(tuple(first.shape), tuple(second.shape))
    sources = [address_valued(tuple(t.shape), torch.float32, 1 + 200 * k) for k, t in enumerate((first, second))]
    convert_tensors(plan, sources, {"t0": first, "t1": second}, backend=backend)
    assert_bytes_equal(first, sources[0])
    assert_bytes_equal(second, sources[1])
    assert int((memory != 0).sum()) == first.numel() + second.numel()


@pytest.mark.parametrize("name", INTERLOCKED)
def test_buffer_between_the_elements_of_a_source_is_written(name):
    source, buffer = INTERLOCKED[name](torch.arange(4 * 6 * 8, dtype=torch.float32).reshape(4, 6, 8))
    before, other = source.clone(), torch.ones(buffer.shape)
    plan = one_to_one(tuple(source.shape), tuple(buffer.shape))
    convert_tensors(plan, [source, other], {"t0": torch.empty(source.shape), "t1": buffer})
    assert_bytes_equal(source, before)
    assert_bytes_equal(buffer, other)


def test_tied_buffers_pass_if_they_come_from_one_tensor():
    weight, filled = torch.randn(3, 4), torch.zeros(3, 4)
    plan = one_to_one((3, 4), (3, 4))
    convert_tensors(plan, [weight, weight], {"t0": filled, "t1": filled})
    assert_bytes_equal(filled, weight)
    with pytest.raises(ConversionError, match="buffers of t0 and t1 share memory"):
        convert_tensors(plan, [weight, weight.clone()], {"t0": filled, "t1": filled})
    with pytest.raises(ConversionError, match="buffers of t0 and t1 share memory"):
        convert_tensors(one_to_one((3, 3), (3, 3)), [weight[:, :3]] * 2, {"t0": filled[:, :3], "t1": filled[:, 1:]})


def test_undecided_strides_pass():
    memory, shape = torch.zeros(1000), (5, 5, 5)
    plan = one_to_one(shape, shape)
    buffers = {"t0": memory.as_strided(shape, (150, 39, 9)), "t1": memory.as_strided(shape, (170, 31, 11), 7)}
    with pytest.raises(ConversionError, match="buffers of t0 and t1 share memory"):
        convert_tensors(plan, [torch.ones(shape)] * 2, buffers)
    with mock.patch.object(memory_executor, "_MOST_WORK", 10):
        convert_tensors(plan, [torch.ones(shape)] * 2, buffers)


def test_overlap_of_tensors_is_checked_without_reading_them():
    class Elsewhere:
        """A view with an address that the host cannot read, as of a GPU tensor."""

        def __init__(self, view):
            self.shape, self.stride, self.element_size = view.shape, view.stride, view.element_size
            self.data_ptr = lambda: 0x7F0000000000 + view.data_ptr() % 2**20

    view = torch.zeros(1 << 20)[: 1 << 10]
    scalar = view[3]
    assert memory_executor.share_bytes(Elsewhere(view), Elsewhere(scalar))
    assert not memory_executor.share_bytes(Elsewhere(view[4:]), Elsewhere(scalar))


@pytest.mark.parametrize("source", [torch.empty(4, 3), torch.empty(3, 4, dtype=torch.float64)])
def test_source_that_does_not_match_the_plan_is_named(source):
    plan = one_to_one((3, 4))
    with pytest.raises(ConversionError, match="s0 does not match the plan"):
        convert_tensors(plan, [source], {"t0": torch.empty(3, 4)})


def test_buffer_with_unsupported_strides_is_named(monkeypatch):
    monkeypatch.setattr(boxes, "_MOST_STEPS", 4)
    sources = SourceTable(["s"], ["F32"], [(3, 10)])
    # Written in threes, but the buffer has rows of five.
    value = values.reshape(values.transpose(leaf(0, (3, 10)), 0, 1), (6, 5))
    plan = plan_of(sources, target_from("t", "F32", value, [0]))
    buffer = torch.empty(5, 6).t()
    with pytest.raises(UnsupportedError, match="t cannot be written straight"):
        convert_tensors(plan, [torch.randn(3, 10)], {"t": buffer})


def test_buffer_with_strides_that_do_not_divide_is_written_step_by_step():
    tensor = torch.arange(30, dtype=torch.float32).reshape(3, 10)
    value = values.reshape(values.transpose(leaf(0, (3, 10)), 0, 1), (6, 5))
    plan = plan_of(table({"s": tensor}), target_from("t", "F32", value, [0]))
    buffer = torch.full((5, 6), -1.0).t()
    convert_tensors(plan, [tensor], {"t": buffer})
    assert_bytes_equal(buffer, tensor.t().reshape(6, 5))


@pytest.mark.parametrize("most_steps", [4, 4096])
def test_source_with_unsupported_strides_is_copied_first(monkeypatch, most_steps):
    monkeypatch.setattr(boxes, "_MOST_STEPS", most_steps)
    tensor = torch.arange(30, dtype=torch.float32).reshape(6, 5)
    value = values.transpose(values.reshape(leaf(0, (6, 5)), (10, 3)), 0, 1)
    plan = plan_of(table({"s": tensor}), target_from("t", "F32", value, [0]))
    check_conversion(plan, {"s": tensor}, [laid_out(tensor, (0, 1))])


def test_copied_sources_stay_alive_until_kernels_read_them():
    tensors = {f"s{i}": address_valued((6, 5), torch.float32, 30 * i) for i in range(6)}
    value = values.transpose(values.reshape(leaf(0, (6, 5)), (10, 3)), 0, 1)
    plan = plan_of(table(tensors), *(target_from(f"t{i}", "F32", value, [i]) for i in range(6)))
    check_conversion(plan, tensors, [laid_out(t, (0, 1)) for t in tensors.values()])


def test_transformers_code_runs_once_and_gets_the_tensors_themselves():
    seen = []

    def convert(sources):
        seen.append(sources)
        return {"a": sources[0] + 1, "b": sources[0].t()}

    source = torch.randn(2, 3)
    fallback = Fallback("for a test", convert)
    targets = [
        Target("a", "F32", (2, 3), -1, (0,), (), fallback),
        Target("b", "BF16", (3, 2), -1, (0,), (), fallback),
    ]
    plan = plan_of(table({"s": source}), *targets)
    buffers = allocate(plan.targets)
    convert_tensors(plan, [source], buffers)
    assert_bytes_equal(buffers["a"], source + 1)
    assert_bytes_equal(buffers["b"], source.t().to(torch.bfloat16))
    assert len(seen) == 1
    assert seen[0][0].data_ptr() == source.data_ptr()


@given(
    data=st.data(),
    shape=st.lists(st.sampled_from([0, 1, 2, 3, 6]), min_size=1, max_size=3),
    count=st.integers(1, 3),
    result=st.sampled_from(["F32", "BF16"]),
)
def test_any_chain_from_any_strides_to_any_strides(data, shape, count, result):
    tensors = {
        f"s{i}": torch.arange(i * 40, i * 40 + torch.Size(shape).numel(), dtype=torch.float32)
        .remainder(250)
        .reshape(shape)
        for i in range(count)
    }
    value = values.concatenate([leaf(i, tuple(shape)) for i in range(count)], data.draw(st.integers(0, len(shape) - 1)))
    dims = st.integers(0, len(shape) - 1)
    value = values.transpose(value, data.draw(dims), data.draw(dims))
    try:
        plan = plan_of(table(tensors), target_from("t", result, value, range(count)))
    except NotAffine:
        reject()
    orders = st.permutations(range(len(shape)))
    sources = [laid_out(t, data.draw(orders), data.draw(st.integers(1, 2))) for t in tensors.values()]
    strides, step = [0] * len(shape), data.draw(st.integers(1, 2))
    for d in data.draw(orders):
        strides[d], step = step, step * max(value.shape[d], 1)
    guard = guarded(value.shape, torch_dtype(result), strides=strides)
    convert_tensors(plan, sources, {"t": guard.tensor})
    guard.check()
    assert_bytes_equal(guard.tensor, naive(plan, tensors)["t"])


@pytest.mark.parametrize("rows", [0, 2, 5])
def test_rows_that_no_copy_fills_are_zero(tmp_path, rows):
    case = padded_case(tmp_path, rows)
    guards = {t.name: guarded(t.shape, torch_dtype(t.dtype)) for t in case.plan.targets}
    convert_tensors(
        case.plan, [case.tensors[name] for name in case.plan.sources.names], {n: g.tensor for n, g in guards.items()}
    )
    for name, guard in guards.items():
        guard.check()
        assert_bytes_equal(guard.tensor, case.expected[name])
