"""Tests of dry runs: what loading code does to targets is known, and of what it reads only that is read."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn

from automodel_conv import ConversionError, UnsupportedError
from automodel_conv.loading_code.dry_run import traced
from automodel_conv.planning.copies import SourceTable
from automodel_conv.planning.loader_trace import LoaderTrace
from tests.loading_code.loads import Model, everything_of

COUNT = 4
SOURCES = SourceTable(
    [*(f"layers.{number}.weight" for number in range(COUNT)), "scale"],
    ["F32"] * (COUNT + 1),
    [*[(3, 4)] * COUNT, (1,)],
)


class Reads:
    """Returns sources with data, and notes which."""

    def __init__(self):
        self.rows = []

    def __call__(self, rows):
        self.rows.append(list(rows))
        return [torch.full(SOURCES.shapes[row], float(row)) for row in rows]


def trace_of(load, targets=None, reads=None):
    return traced(load, SOURCES, targets, "dict", Reads() if reads is None else reads)


def test_copies_need_no_data():
    reads = Reads()
    trace = trace_of(lambda given: {"x": given["layers.1.weight"].t()}, reads=reads)
    assert trace.plan.target("x").shape == (4, 3)
    assert trace.names == ("x",)
    assert reads.rows == []


def test_tensors_that_are_alike_are_read_at_once():
    def load(given):
        assert all(tensor.isfinite().all() for tensor in given.values())
        return given

    reads = Reads()
    trace = trace_of(load, reads=reads)
    assert reads.rows == [[0, 1, 2, 3], [4]]
    assert trace.values_read == {0, 1, 2, 3, 4}


def test_tensors_of_another_shape_or_dtype_are_not_alike():
    sources = SourceTable(["x.1", "x.2", "x.3", "y.1"], ["F32", "F16", "F32", "F32"], [(2,), (2,), (3,), (2,)])
    rows_read = []

    def read(rows):
        rows_read.append(list(rows))
        return [torch.ones(2) for _ in rows]

    traced(lambda given: {"x": torch.full((2,), given["x.1"].sum().item())}, sources, None, "dict", read)
    assert rows_read == [[0]]


def test_target_that_is_read_has_its_values():
    def load(given):
        seen.append(model.saved.tolist())
        model.first.weight.data.copy_(given["layers.0.weight"])

    seen = []
    model = Model()
    trace = trace_of(load, model)
    assert seen == [[-5.0] * 3]
    assert trace.targets_read == {"saved"}
    assert trace.computed == {}
    assert "saved" in trace.plan.missing


def test_target_that_is_read_from_elsewhere_than_the_module_has_its_values():
    def load(given):
        seen.append(known.tolist())
        known.fill_(3)
        model.saved.add_(1)
        seen.append(known.tolist())

    seen = []
    model = Model()
    known = model.saved
    trace = trace_of(load, model)
    assert seen == [[-5.0] * 3, [4.0] * 3]
    assert trace.targets_read == {"saved"}
    assert model.saved is known
    assert known.tolist() == [-5.0] * 3


def test_targets_that_are_alike_are_read_at_once():
    def load(given):
        for number in range(2):
            model[number].weight.data.copy_(given[f"layers.{number}.weight"])
            assert not model[number].weight.isnan().any()

    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(4, 3))
    reads = Reads()
    trace = trace_of(load, model, reads)
    assert trace.targets_read == {"0.weight", "1.weight"}
    assert reads.rows == [[0, 1, 2, 3]]
    assert {*trace.computed} == {"0.weight", "1.weight"}


def test_values_that_are_read_through_a_target_are_those_of_its_source():
    def load(given):
        model.first.weight.data.copy_(given["layers.2.weight"])
        seen.append(model.first.weight.sum().item())

    seen = []
    model = Model()
    trace_of(load, model)
    assert seen == [24.0]


def test_changes_of_the_module_are_known():
    def load(given):
        model.first.weight = nn.Parameter(given["layers.0.weight"])
        model.second.weight.data.copy_(given["layers.1.weight"])
        del model.saved

    model = Model()
    trace = trace_of(load, model)
    assert {*trace.changes.made} == {"first.weight"}
    assert trace.changes.removed == {"saved": False}


def test_parameters_that_share_memory_are_filled_through_each_other():
    def load(given):
        model.whole.data.copy_(given["layers.0.weight"].flatten())
        model.part.data.fill_(2)

    model = nn.Module()
    memory = torch.zeros(12)
    model.whole, model.part = nn.Parameter(memory), nn.Parameter(memory[4:8])
    trace = trace_of(load, model)
    assert [sum(len(list(copy.pieces())) for copy in target.copies) for target in trace.plan.targets] == [2, 0]
    assert [len(target.fills) for target in trace.plan.targets] == [1, 1]


def test_target_moved_to_other_memory_is_computed():
    def load(given):
        targets["x"].t_()

    targets = {"x": torch.zeros(3, 4)}
    trace = trace_of(load, targets)
    assert trace.computed["x"].reason == "changes the memory of a target"
    assert targets["x"].shape == (3, 4)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, GeneratorExit])
def test_modes_end_with_an_error(error):
    def load(given):
        model.first.weight.data.copy_(given["layers.0.weight"])
        raise error

    model = Model()
    before = everything_of(model)
    with pytest.raises(error):
        trace_of(load, model)
    assert everything_of(model) == before
    assert not isinstance(torch.utils._python_dispatch._get_current_dispatch_mode(), LoaderTrace)


def test_errors_of_the_code_are_its_own():
    with pytest.raises(KeyError, match="metadata"):
        trace_of(lambda given: given["metadata"])
    with pytest.raises(ValueError, match="bad metadata") as error:
        trace_of(lambda given: (_ for _ in ()).throw(ValueError("bad metadata")))
    assert type(error.value) is ValueError


def test_generator_that_is_not_finished_leaves_everything_as_it_was():
    def load(given):
        for name, tensor in given.items():
            model.first.weight.data = tensor
            yield name, tensor
            if name.endswith("1.weight"):
                raise ValueError("half way")

    model = Model()
    before = everything_of(model)
    with pytest.raises(ValueError, match="half way"):
        trace_of(load, model)
    assert everything_of(model) == before


def at_most(count, load):
    """Return loading code that fails if it is called more often."""
    calls = []

    def counted(given):
        calls.append(1)
        assert len(calls) <= count
        return load(given)

    return counted


def test_targets_that_are_read_one_after_the_other_all_have_their_values():
    def load(given):
        seen.append((model.saved.tolist(), model.first.bias.tolist()))

    seen = []
    model = Model()
    trace = trace_of(at_most(3, load), model)
    assert seen == [([-5.0] * 3, [-2.0] * 3)]
    assert trace.targets_read == {"saved", "first.bias"}


@pytest.mark.parametrize(
    "mixed",
    [lambda saved, unknown: saved + unknown, lambda saved, unknown: saved.copy_(unknown)],
    ids=["computed", "overwritten"],
)
def test_values_of_a_target_and_of_what_nothing_has_are_an_error(mixed):
    unknown = torch.empty(3, device="meta")
    model = Model()
    with pytest.raises(ConversionError, match="reads values that nothing has"):
        trace_of(at_most(4, lambda given: mixed(model.saved, unknown).sum().item()), model)


def test_sources_whose_values_are_read_are_no_constants():
    def load(given):
        assert given["scale"].item() >= 0
        return {"x": given["scale"][0], "y": given["scale"]}

    trace = trace_of(load)
    assert {name: unknown.reason for name, unknown in trace.computed.items()} == dict.fromkeys(
        "xy", "the loading code reads values"
    )


def test_targets_that_computed_ones_are_made_of_need_all_their_sources():
    def load(given):
        model.first.weight.data[:2].copy_(given["layers.0.weight"][:2])
        model.first.weight.data[2:].copy_(given["layers.1.weight"][2:])
        model.first.bias.data.copy_(given["layers.2.weight"][:, 0])
        model.second.weight.data.copy_(model.first.weight[:1] * 2)

    model = Model()
    trace = trace_of(load, model)
    assert {*trace.computed} == {"second.weight"}
    assert trace.needed == {"first.weight", "second.weight"}
    assert trace.rows_for_computed == {0, 1}


def test_sources_whose_values_are_read_are_needed_for_computed_targets():
    def load(given):
        assert given["scale"].item() > 0
        return {"x": given["layers.3.weight"] * 2}

    trace = trace_of(load)
    assert trace.values_read == {4}
    assert trace.rows_for_computed == {3, 4}


def test_targets_that_are_written_twice_are_named():
    def load(given):
        for name in ("layers.0.weight", "layers.1.weight"):
            model.first.weight.data.copy_(given[name])
        model.second.weight.data.copy_(given["layers.2.weight"])

    model = Model()
    assert trace_of(load, model).rewritten == ("first.weight",)


def test_targets_without_memory_of_their_own_are_refused_before_the_code_runs():
    with pytest.raises(UnsupportedError, match=r"where: *x"):
        trace_of(at_most(0, lambda given: None), {"x": torch.zeros(2, 2).to_sparse()})


@pytest.mark.parametrize("is_enabled", [False, True])
def test_collector_is_off_in_the_code_and_as_before_after_it(is_enabled):
    def load(given):
        assert not gc.isenabled()
        return given

    was_enabled = gc.isenabled()
    (gc.enable if is_enabled else gc.disable)()
    try:
        trace_of(load)
        assert gc.isenabled() == is_enabled
    finally:
        (gc.enable if was_enabled else gc.disable)()


def test_target_without_data_has_no_old_values():
    """What was in a target counts only if there was something."""

    def load(given):
        model.second.weight.data.copy_(model.first.weight)
        model.first.weight.data.copy_(given["layers.0.weight"])

    model = Model()
    assert (
        trace_of(load, model).computed["second.weight"].reason
        == "the loading code reads a target that it has not filled"
    )
    model = Model(device="meta")
    assert trace_of(load, model).plan.missing.count("second.weight") == 1


def test_target_that_is_moved_needs_the_sources_that_are_in_it():
    def load(given):
        targets["x"].copy_(given["layers.2.weight"])
        targets["x"].t_()

    targets = {"x": torch.zeros(3, 4)}
    assert trace_of(load, targets).rows_for_computed == {2}


def test_tensor_that_is_returned_unwritten_needs_all_sources():
    trace = trace_of(lambda given: {"x": torch.empty(3), "y": given["scale"]})
    assert {*trace.computed} == {"x"}
    assert trace.rows_for_computed == {0, 1, 2, 3, 4}


@pytest.mark.parametrize("form", [torch.zeros(3, 4, dtype=torch.float16), torch.zeros(12)], ids=["dtype", "shape"])
def test_parameter_that_gets_another_form_is_made(form):
    def load(given):
        model.first.weight.data = given["layers.0.weight"].reshape(form.shape).to(form.dtype)

    model = Model()
    trace = trace_of(load, model)
    made = trace.changes.made["first.weight"]
    assert (made.dtype, made.shape) == (form.dtype, form.shape)


def test_values_of_large_tensors_of_the_code_are_found():
    def load(given):
        mask = torch.zeros(100_000)
        mask[1:3] = 1
        return {"x": given["layers.0.weight"][: int(mask.sum().item())]}

    trace = trace_of(load)
    assert trace.computed == {}
    assert trace.plan.target("x").shape == (2, 4)
