"""Tests of places: what loading code fills is filled where it is, and what it makes gets where it puts it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from automodel_conv import UnsupportedError
from automodel_conv.loading_code.changes import Changes
from automodel_conv.loading_code.dry_run import traced
from automodel_conv.loading_code.places import install, places_of
from automodel_conv.planning.copies import SourceTable
from tests.loading_code.loads import Model, same_names

SOURCES = SourceTable(["a", "c"], ["F32", "F32"], [(3, 4), (3,)])


def traced_into(targets, load):
    return traced(lambda pairs: load(targets, dict(pairs)), SOURCES, targets, "pairs", lambda rows: [])


def test_tensors_with_data_are_filled_in_place():
    model = Model()
    trace = traced_into(model, lambda model, given: model.first.weight.data.copy_(given["a"]))
    places = places_of(model, trace, None)
    assert places.buffers["first.weight"].data_ptr() == model.first.weight.data_ptr()
    assert not places.new


def test_tensors_without_data_are_made():
    model = Model(device="meta")
    trace = traced_into(model, lambda model, given: model.first.weight.data.copy_(given["a"]))
    places = places_of(model, trace, None)
    assert places.buffers["first.weight"].device == torch.device("cpu")
    assert places.new["first.weight"] is model.first.weight


def test_new_tensors_are_on_the_device_that_is_asked_for():
    model = Model(device="meta")
    trace = traced_into(model, lambda model, given: model.first.weight.data.copy_(given["a"]))
    assert places_of(model, trace, torch.device("meta")).buffers["first.weight"].is_meta


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_names_of_one_tensor_share_a_place(device):
    def load(model, given):
        model.second.weight = model.first.weight
        model.first.weight.data.copy_(given["a"])

    model = Model(device=device)
    places = places_of(model, traced_into(model, load), None)
    assert places.buffers["first.weight"].data_ptr() == places.buffers["second.weight"].data_ptr()


def test_target_without_data_in_a_mapping_is_named():
    targets = {"x": torch.empty(3, 4, device="meta")}
    trace = traced_into(targets, lambda targets, given: targets["x"].copy_(given["a"]))
    with pytest.raises(UnsupportedError, match="x is on the meta device"):
        places_of(targets, trace, None)


def test_added_part_is_named():
    def load(model, given):
        model.first.inner = nn.Linear(4, 3)

    model = Model()
    with pytest.raises(UnsupportedError, match=r"adds a part to the module\n *where: *first\.inner\.weight"):
        places_of(model, traced_into(model, load), None)


def test_class_and_attributes_are_kept():
    model = Model()
    like = nn.Parameter(torch.empty(3, 4, device="meta"), requires_grad=False)
    like.note = 1
    install(model, Changes(), {"first.weight": (torch.ones(3, 4), like)})
    weight = model.first.weight
    assert (type(weight), weight.note, weight.requires_grad, weight.sum().item()) == (nn.Parameter, 1, False, 12)


@pytest.mark.parametrize("saved", [True, False])
def test_new_buffers_are_buffers(saved):
    model = Model()
    value = torch.ones(2)
    changes = Changes(unsaved=frozenset() if saved else frozenset(["first.new"]))
    install(model, changes, {"first.new": (value, value)})
    assert model.first.new is value
    assert ("first.new" in model.state_dict()) == saved
    assert "new" in model.first._buffers


def test_parameters_and_buffers_take_the_place_of_each_other():
    model = Model()
    parameter, buffer = nn.Parameter(torch.ones(3)), torch.ones(3, 4)
    install(model, Changes(), {"saved": (parameter, parameter)})
    assert isinstance(model.saved, nn.Parameter)
    assert "saved" not in model._buffers
    install(model, Changes(), {"other": (buffer, buffer)})
    assert type(model.other) is Tensor


def test_names_of_one_tensor_are_one_object():
    model = Model()
    value = nn.Parameter(torch.ones(3, 4))
    changes = Changes(same=(("first.weight", "second.weight"),))
    install(model, changes, {"second.weight": (value, value)})
    assert model.second.weight is model.first.weight
    assert model.first.weight.sum().item() == -12


def test_groups_that_are_not_new_stay():
    model = Model(tied=True)
    before = same_names(model)
    install(model, Changes(same=(("first.weight", "second.weight"),)), {})
    assert same_names(model) == before


def test_removed_names_go():
    model = Model()
    install(model, Changes(removed={"first.bias": True, "second.weight": False, "saved": True}), {})
    assert model.first.bias is model.saved is None
    assert not hasattr(model.second, "weight")
    targets = {"x": torch.zeros(1), "y": torch.zeros(1)}
    install(targets, Changes(removed={"x": False}), {"z": (targets["y"], targets["y"])})
    assert list(targets) == ["y", "z"]


def test_buffers_of_parameters_need_no_gradients():
    model = Model()
    trace = traced_into(model, lambda model, given: model.first.weight.data.copy_(given["a"]))
    assert not places_of(model, trace, None).buffers["first.weight"].requires_grad


def test_group_keeps_the_tensor_that_is_not_new():
    model = Model()
    kept = model.second.weight
    value = nn.Parameter(torch.ones(3, 4))
    install(model, Changes(same=(("first.weight", "second.weight"),)), {"first.weight": (value, value)})
    assert model.first.weight is model.second.weight is kept


def test_buffer_that_is_saved_stays_saved():
    model = Model()
    value = torch.ones(3)
    install(model, Changes(unsaved=frozenset(["saved"])), {"saved": (value, value)})
    assert "saved" in model.state_dict()
