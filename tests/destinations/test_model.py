"""Tests of the places of loaded tensors in a model: its own tensors, or new ones that replace them afterwards."""

import pytest
import torch
from torch import nn

from automodel_conv.destinations.model import (
    ModelTensors,
    ModuleAttribute,
    device_for,
    devices_of_new,
    find_attributes,
    regions_of,
)
from automodel_conv.errors import ConversionError, UnsupportedError
from automodel_conv.planning.boxes import run_of
from automodel_conv.planning.copies import SourceTable, StridedCopy, Target
from automodel_conv.planning.plan import CopyPlan

CPU = torch.device("cpu")


def plan_for(state, dtype="F32", tied=()):
    """Return a plan that fills each of these tensors from its own source."""
    names, shapes = list(state), [tuple(tensor.shape) for tensor in state.values()]
    targets = tuple(
        Target(name, dtype, shape, -1, (row,), (StridedCopy(run_of(tensor.numel()), (0,), (0,), (0,)),))
        for row, (name, shape, tensor) in enumerate(zip(names, shapes, state.values(), strict=True))
    )
    return CopyPlan(SourceTable(names, [dtype] * len(names), shapes), targets, tied=tied)


def placed(model, plan=None, strict=True):
    state = model.state_dict(keep_vars=True)
    plan = plan or plan_for(state)
    return ModelTensors.prepare(model, state, plan, strict, lambda name: None, lambda plan, devices: {})


def fill(tensors, value=1.0):
    for number, buffer in enumerate(tensors.buffers.values()):
        buffer.fill_(value + number)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
        self.b.weight = self.a.weight


def test_parameters_and_buffers_are_found_by_identity_in_all_their_places():
    model = nn.Sequential(nn.BatchNorm1d(2), Tied())
    state = model.state_dict(keep_vars=True)
    state["copy"] = state["0.weight"].clone()
    state["extra"] = "no tensor"
    found = find_attributes(model, state)
    assert "extra" not in found
    assert found["copy"] == []
    assert [(place.module, place.leaf) for place in found["0.running_mean"]] == [(model[0], "running_mean")]
    assert [place.module for place in found["1.b.weight"]] == [model[1].a, model[1].b]


def test_attribute_is_put_where_it_was():
    norm = nn.BatchNorm1d(2)
    for leaf, new in (("running_mean", torch.ones(2)), ("weight", nn.Parameter(torch.ones(2)))):
        place = ModuleAttribute(norm, leaf)
        assert place.get() is getattr(norm, leaf)
        place.set(new)
        assert place.get() is getattr(norm, leaf) is new
    assert "running_mean" in norm._buffers
    assert "weight" in norm._parameters


def test_models_own_memory_is_written():
    model = nn.Linear(2, 3)
    weight, address = model.weight, model.weight.data_ptr()
    tensors = placed(model)
    assert tensors.new == []
    fill(tensors)
    tensors.install(set())
    assert model.weight is weight
    assert weight.data_ptr() == address
    assert bool((weight == 1).all())


def test_new_tensors_replace_those_on_the_meta_device_and_of_another_dtype():
    model = nn.Linear(2, 3).half()
    model.bias = nn.Parameter(torch.empty(3, device="meta"), requires_grad=False)
    tensors = placed(model)
    assert tensors.new == ["weight", "bias"]
    before = model.weight
    fill(tensors)
    assert model.weight is before
    tensors.install(set())
    assert (model.weight.dtype, model.weight.requires_grad) == (torch.float32, True)
    assert (model.bias.device, model.bias.requires_grad) == (CPU, False)
    assert bool((model.weight == 1).all())
    assert bool((model.bias == 2).all())


def test_parameter_under_two_names_is_loaded_twice_only_to_be_compared():
    model = Tied()
    assert placed(model, strict=False).buffers.keys() == {"a.weight"}
    tensors = placed(model)
    assert tensors.aliases == [("b.weight", "a.weight")]
    assert tensors.extra_bytes == 16
    for buffer in tensors.buffers.values():
        buffer.fill_(5)
    assert tensors.unequal() == set()
    fill(tensors)
    assert tensors.unequal() == {("b.weight", "a.weight")}
    with pytest.raises(ConversionError, match=r"(?s)b\.weight and a\.weight are one parameter.*strict=False"):
        tensors.install(tensors.unequal())


def test_names_that_the_plan_ties_share_the_new_tensor():
    model = Tied().to("meta")
    model.b.weight = nn.Parameter(torch.empty(2, 2, device="meta"))
    tied = plan_for(model.state_dict(keep_vars=True), tied=(("a.weight", "b.weight"),))
    tensors = placed(model, tied)
    fill(tensors)
    assert tensors.unequal() == {("b.weight", "a.weight")}
    tensors.install(tensors.unequal())
    assert model.a.weight is not model.b.weight
    tensors.install(set())
    assert model.a.weight is model.b.weight


def test_tensor_that_a_hook_copies_is_refused_by_name():
    model = nn.Linear(2, 3)
    state = model.state_dict(keep_vars=True)
    state["bias"] = state["bias"].clone()
    with pytest.raises(UnsupportedError, match="bias is neither a parameter nor a buffer"):
        ModelTensors.prepare(model, state, plan_for(state), True, lambda name: None, lambda plan, devices: {})


@pytest.mark.parametrize(("start", "overlaps"), [(3, True), (4, False)])
def test_two_parameters_that_share_memory_are_refused_and_neighbours_are_not(start, overlaps):
    memory = torch.zeros(8)
    model = nn.Module()
    model.a, model.b = nn.Parameter(memory[:4]), nn.Parameter(memory[start : start + 4])
    if overlaps:
        with pytest.raises(ConversionError, match="a and b share memory"):
            placed(model)
    else:
        assert placed(model).buffers.keys() == {"a", "b"}


def test_new_tensors_go_to_the_requested_device_or_the_cpu():
    meta = torch.empty(2, device="meta")
    assert device_for(meta) == device_for(torch.empty(2)) == CPU
    targets = plan_for({"a": meta, "b": meta}).targets
    devices = devices_of_new(targets, {"a": meta}, {"b": torch.device("cuda", 1)}.get)
    assert devices == {"a": CPU, "b": torch.device("cuda", 1)}


def test_model_that_is_not_sharded_has_no_regions():
    state = nn.Linear(2, 3).state_dict()
    assert regions_of(state, plan_for(state)) == {}
