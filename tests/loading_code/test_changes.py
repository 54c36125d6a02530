"""Tests of changes: what loading code puts into a module or a mapping is known."""

from __future__ import annotations

import torch
from torch import nn

from automodel_conv.loading_code.changes import Changes, changes_of, is_in_place
from automodel_conv.loading_code.stand_ins import named_tensors, with_stand_ins
from tests.loading_code.loads import Model


def changed(targets, load):
    """Run loading code, and return what it changes."""
    own = named_tensors(targets)
    load(targets)
    found = named_tensors(targets)
    made = {name: tensor for name, tensor in found.items() if not is_in_place(tensor, own.get(name), {})}
    return changes_of(targets, own, found, made)


def test_elements_are_no_changes():
    assert changed(Model(), lambda model: model.first.weight.data.fill_(1)) == Changes()


def test_new_tensors_are_known_and_whether_they_are_saved():
    def load(model):
        model.first.weight = nn.Parameter(torch.ones(3, 4))
        model.register_buffer("new", torch.ones(1))
        model.second.register_buffer("new", torch.ones(1), persistent=False)

    model = Model()
    changes = changed(model, load)
    assert {*changes.made} == {"first.weight", "new", "second.new"}
    assert all(tensor is named_tensors(model)[name] for name, tensor in changes.made.items())
    assert changes.unsaved == {"second.new"}
    assert (changes.removed, changes.same) == ({}, ())


def test_stand_in_of_another_dtype_or_shape_is_not_in_place():
    model = Model()
    with with_stand_ins(model) as replaced:
        own = named_tensors(model)
        model.first.weight.data = model.first.weight.data.half()
        model.second.weight.data = torch.empty(5, 4, device="meta")
        model.saved.data = torch.empty_like(model.saved)
        found = named_tensors(model)
        elsewhere = {name for name in own if not is_in_place(found[name], own[name], replaced)}
    assert elsewhere == {"first.weight", "second.weight"}


def test_removed_and_shared_names_are_known():
    def load(model):
        model.first.bias = None
        del model.saved
        model.second.weight = model.first.weight

    changes = changed(Model(), load)
    assert changes.removed == {"first.bias": True, "saved": False}
    assert changes.same == (("first.weight", "second.weight"),)
    assert {*changes.made} == {"second.weight"}


def test_part_that_is_removed_does_not_matter():
    def load(model):
        del model.second

    assert changed(Model(), load).removed == {}


def test_names_of_a_mapping_are_added_and_removed():
    targets = {"x": torch.zeros(1), "y": torch.zeros(1)}

    def load(targets):
        targets["z"] = targets["new"] = torch.ones(1)
        del targets["x"]

    changes = changed(targets, load)
    assert {*changes.made} == {"z", "new"}
    assert changes.same == (("z", "new"),)
    assert changes.removed == {"x": False}


def test_shared_names_of_returned_tensors_are_known():
    tensor = torch.ones(1)
    returned = {"a": tensor, "b": tensor, "c": torch.ones(1)}
    assert changes_of(None, {}, returned, returned) == Changes(returned, (("a", "b"),))
