"""Tests of traces: what is written is recorded, tensors with data keep it, and nothing real changes."""

from __future__ import annotations

import numpy
import pytest
import torch
from torch import Tensor, nn

from automodel_conv.planning.loader_trace import LoaderTrace, is_composite
from automodel_conv.planning.loader_writes import (
    OWN_VALUES,
    UNSEEN,
    Computed,
    Constant,
    View,
    Write,
    key_of,
    view_of,
)
from automodel_conv.planning.value_reads import ValueReads


@pytest.fixture
def source():
    return torch.empty(3, 4, device="meta")


def run(code, *, targets=(), seen=(), **options):
    """Run code under a trace; return the trace and the result of the code."""
    trace = LoaderTrace(targets, **options)
    for tensor in seen:
        trace.keep(tensor)
    with torch.no_grad(), trace, ValueReads(trace):
        return trace, code()


def test_copy_to_a_target_is_recorded_and_not_done(source):
    target = torch.zeros(3, 4)
    trace, _ = run(lambda: target[1:].copy_(source[:2]), targets=[target], seen=[source])
    assert trace.writes == [Write(view_of(target[1:]), view_of(source[:2]))]
    assert not target.any()


def test_constant_is_recorded_and_not_written():
    target = torch.zeros(3, 4)
    trace, _ = run(lambda: target[:, 1].fill_(2), targets=[target])
    assert trace.writes == [Write(view_of(target[:, 1]), Constant(2))]
    assert not target.any()


def test_computed_write_tells_the_operation_and_its_inputs(source):
    target = torch.zeros(3, 4)
    trace, _ = run(lambda: target.mul_(source), targets=[target], seen=[source])
    assert trace.writes == [Write(view_of(target), Computed("aten.mul_.Tensor", (view_of(target), view_of(source))))]


def test_storages_that_stand_in_for_others_get_their_writes(source):
    target, stand_in = torch.zeros(3, 4), torch.empty(3, 4, device="meta")
    keys = {key_of(target): key_of(stand_in)}
    trace, _ = run(lambda: target.copy_(source), targets=[target, stand_in], stand_ins=keys, seen=[source])
    assert trace.writes == [Write(view_of(stand_in), view_of(source))]


def test_tensor_with_data_is_computed_with():
    def code():
        made = torch.zeros(3)
        made.copy_(torch.arange(3))
        return (made + 1).tolist()

    trace, result = run(code)
    assert result == [1, 2, 3]
    assert not trace.writes


def test_tensor_with_data_loses_it_when_something_without_is_written_to_it(source):
    def code():
        made = torch.full((3, 4), 2.0)
        made[1].copy_(source[0])
        return made

    trace, made = run(code, seen=[source])
    assert trace.writes == [
        Write(View(key_of(made), torch.float32, 0, (12,), (1,)), Constant(2)),
        Write(view_of(made[1]), view_of(source[0])),
    ]
    assert not trace.has_data(made)


def test_values_of_its_own_are_told_when_a_tensor_loses_its_data(source):
    def code():
        made = torch.arange(12.0).reshape(3, 4)
        made[1].copy_(source[0])

    trace, _ = run(code, seen=[source])
    assert [one for _, one in trace.writes] == [OWN_VALUES, view_of(source[0])]


def test_unwritten_tensor_has_nothing_to_tell_when_it_loses_its_data(source):
    trace, _ = run(lambda: torch.empty(3, 4).copy_(source), seen=[source])
    assert len(trace.writes) == 1


def changed(make, change):
    tensor = make()
    change(tensor)
    return tensor


def set_all(tensor):
    tensor.numpy()[:] = 5


CONTENTS = {
    "zeros": (lambda: torch.zeros(2), Constant(0.0)),
    "full": (lambda: torch.full((2,), 0.5), Constant(0.5)),
    "rounded": (lambda: torch.full((2,), 0.1, dtype=torch.bfloat16), Constant(0.10009765625)),
    "cut": (lambda: torch.empty(2, dtype=torch.int8).fill_(1.7), Constant(1)),
    "cast": (lambda: torch.full((2,), 300, dtype=torch.int32).view(torch.int8), OWN_VALUES),
    "bytes": (lambda: changed(lambda: torch.empty(4), lambda t: t.view(torch.uint8).fill_(0)), Constant(0.0)),
    "expanded": (lambda: torch.tensor(3.0).expand(2, 2), Constant(3.0)),
    "one": (lambda: torch.tensor(3.0), Constant(3.0)),
    "nothing": (lambda: torch.zeros(0), Constant(0)),
    "nan": (lambda: torch.full((2,), float("nan")), None),
    "another nan": (lambda: torch.full((2,), -1, dtype=torch.int32).view(torch.float32), OWN_VALUES),
    "complex": (lambda: torch.full((2,), 1j), OWN_VALUES),
    "negative zero": (lambda: torch.full((2,), -0.0), Constant(-0.0)),
    "large": (lambda: torch.full((2,), 2**60 + 1), Constant(2**60 + 1)),
    "truth": (lambda: torch.ones(2, dtype=torch.bool), Constant(True)),
    "values": (lambda: torch.arange(2.0), OWN_VALUES),
    "filled in part": (lambda: changed(lambda: torch.zeros(4), lambda t: t[1:].fill_(1)), OWN_VALUES),
    "filled in part by the same": (lambda: changed(lambda: torch.zeros(4), lambda t: t[1:].fill_(0)), Constant(0.0)),
    "filled in part as bytes": (
        lambda: changed(lambda: torch.ones(4), lambda t: t.view(torch.uint8)[1:3].fill_(0)),
        OWN_VALUES,
    ),
    "filled anew": (lambda: changed(lambda: torch.arange(4.0), lambda t: t.fill_(2)), Constant(2.0)),
    "filled with nothing": (lambda: changed(lambda: torch.zeros(4), lambda t: t[:0].fill_(1)), Constant(0.0)),
    "filled in part while empty": (lambda: changed(lambda: torch.empty(4), lambda t: t[1:].fill_(1)), OWN_VALUES),
    "changed": (lambda: changed(lambda: torch.zeros(4), lambda t: t.add_(1)), OWN_VALUES),
    "copied to": (lambda: changed(lambda: torch.zeros(4), lambda t: t.copy_(torch.arange(4.0))), OWN_VALUES),
    "resized": (lambda: changed(lambda: torch.zeros(1), lambda t: t.resize_(4).view(-1)[1:].fill_(2)), OWN_VALUES),
    "grown": (lambda: changed(lambda: torch.zeros(1), lambda t: t.resize_(4)), OWN_VALUES),
    "shared with NumPy": (lambda: changed(lambda: torch.zeros(4), set_all), OWN_VALUES),
    "seen by NumPy": (lambda: changed(lambda: torch.zeros(4), numpy.asarray), OWN_VALUES),
    "with an address": (lambda: changed(lambda: torch.zeros(4), Tensor.data_ptr), OWN_VALUES),
    "exported": (lambda: changed(lambda: torch.zeros(4), torch.from_dlpack), OWN_VALUES),
}


@pytest.mark.parametrize(("code", "content"), CONTENTS.values(), ids=CONTENTS)
def test_content_of_tensors_with_data(code, content):
    trace, made = run(code)
    found = trace.content(made)
    if content is None:
        assert found.value != found.value
    else:
        assert found == content
        assert repr(found) == repr(content)


def test_filled_tensor_that_numpy_shares_is_no_constant():
    def code():
        made = torch.zeros(4)
        made.numpy()
        made.fill_(3)
        return made

    trace, made = run(code)
    assert trace.content(made) == OWN_VALUES


def test_content_of_a_tensor_that_no_trace_saw_is_told(source):
    trace, _ = run(lambda: None)
    assert trace.content(source) == UNSEEN
    assert trace.content(source) == UNSEEN
    trace.keep(source)
    assert trace.content(source) == view_of(source)


@pytest.mark.parametrize(
    "make",
    [
        lambda source: torch.empty(2, device="meta"),
        lambda source: source + 1,
        lambda source: source.clone(),
        lambda source: source[torch.tensor([], dtype=torch.long)],
        lambda source: torch.stack([source, source]),
        lambda source: torch.rand(3, device="meta"),
        lambda source: nn.Parameter(source),
    ],
)
def test_tensors_that_the_code_makes_are_seen(make, source):
    trace, made = run(lambda: make(source), seen=[source])
    assert trace.content(made) == view_of(made)


def test_sources_with_data_are_computed_from():
    given = torch.ones(3)
    trace, _ = run(lambda: None, sources=[key_of(given)])
    assert trace.content(given) == Computed("the loading code reads values", (view_of(given),))


def test_targets_with_values_are_unwritten_until_they_are_written():
    target = torch.ones(3)
    trace, _ = run(lambda: target[:0].fill_(1), values=[target])
    assert trace.is_unwritten(target)
    trace, _ = run(lambda: target.add_(1), values=[target])
    assert not trace.is_unwritten(target)
    assert trace.content(target).reason == "the loading code reads values"


def test_targets_with_values_are_written_when_they_lose_their_data(source):
    target = torch.ones(3, 4)
    trace, _ = run(lambda: target.copy_(source), values=[target], seen=[source])
    assert not trace.is_unwritten(target)
    assert trace.writes == [Write(view_of(target), view_of(source))]


def test_bytes_of_storages_grow_with_them():
    def code():
        made = torch.empty(0, device="meta")
        return made.resize_(5)

    trace, made = run(code)
    assert trace.nbytes[key_of(made)] == 20


def test_operations_of_others_may_write_to_their_inputs():
    def code():
        with torch.library._scoped_library("automodel_conv_test", "DEF") as library:
            library.define("touch(Tensor a) -> ()")
            library.impl("touch", lambda tensor: tensor.numpy().fill(3), "CPU")
            made = torch.zeros(4)
            torch.ops.automodel_conv_test.touch(made)
            return made

    trace, made = run(code)
    assert trace.content(made) == OWN_VALUES


def test_operations_in_inference_mode_are_seen(source):
    def code():
        with torch.inference_mode():
            return source.t().reshape(-1)

    trace, made = run(code, seen=[source])
    assert view_of(source.t()) in [one for _, one in trace.writes]
    assert trace.content(made) == view_of(made)


def test_composite_operations_are_told_only_in_inference_mode():
    assert not is_composite(torch.ops.aten.reshape.default)
    with torch.inference_mode():
        assert is_composite(torch.ops.aten.reshape.default)
        assert not is_composite(torch.ops.aten.add.Tensor)


@pytest.mark.parametrize(
    "operation",
    [
        lambda a, b: a + b,
        lambda a, b: a * b[:, :1],
        lambda a, b: b[0] - 1,
        lambda a, b: a / 2,
        lambda a, b: a > b,
        lambda a, b: a.int() >> 2,
        lambda a, b: torch.where(a > 0, a, b.double()),
        lambda a, b: a.masked_fill(b > 0, 1),
        lambda a, b: a.clamp(0, 1),
        lambda a, b: a.t() * b.t(),
        lambda a, b: a.abs().sum(0),
    ],
)
def test_results_without_data_have_the_form_of_results(operation):
    a, b = torch.ones(3, 4, dtype=torch.bfloat16), torch.ones(3, 4)
    without = [tensor.to("meta") for tensor in (a, b)]
    _, made = run(lambda: operation(*without), seen=without)
    expected = operation(a, b)
    assert (made.dtype, made.shape, made.stride()) == (expected.dtype, expected.shape, expected.stride())


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.zeros(1000, 300),
        lambda: torch.ones(1000, 300, dtype=torch.bfloat16),
        lambda: torch.full((1000, 300), 2.5),
        lambda: torch.zeros(3, 4).new_zeros(1000, 300),
        lambda: torch.zeros_like(torch.empty(1000, 300)),
    ],
)
def test_large_tensors_of_numbers_take_no_memory(make, source):
    trace, made = run(make, seen=[source])
    assert made.is_meta
    assert (made.dtype, made.shape, made.stride()) == (make().dtype, (1000, 300), (300, 1))
    assert trace.writes[-1].source == Constant(make()[0, 0].item())
    _, filled = run(make, fills_large=True)
    assert torch.equal(filled, make())


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.bool])
def test_large_indices_have_their_values(dtype):
    _, made = run(lambda: torch.ones(200_000, dtype=dtype))
    assert made.all()
