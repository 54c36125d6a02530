"""Tests of stand-ins: loading code sees tensors like a module's own, and everything is put back."""

from __future__ import annotations

from collections import OrderedDict, deque
from contextlib import suppress

import pytest
import torch
from torch import Tensor, nn

from automodel_conv import UnsupportedError
from automodel_conv.loading_code.stand_ins import (
    as_before,
    check_plain,
    in_class_of,
    is_same_memory,
    named_tensors,
    with_stand_ins,
)
from tests.loading_code.loads import Model, bits, everything_of


class WithLoader(nn.Parameter):
    """A class of parameters, as engines have them."""


def test_names_are_all_names_of_tied_tensors():
    model = Model(tied=True)
    assert {"first.weight", "second.weight", "saved", "unsaved"} <= named_tensors(model).keys()
    assert named_tensors(None) == {}


def test_stand_ins_are_like_the_tensors():
    model = Model(tied=True)
    model.first.weight = WithLoader(torch.empty(4, 3).t(), requires_grad=False)
    model.first.weight.weight_loader = print
    with with_stand_ins(model) as replaced:
        weight = model.first.weight
        assert weight.is_meta
        assert type(weight) is WithLoader
        assert not weight.requires_grad
        assert (weight.shape, weight.stride()) == ((3, 4), (1, 3))
        assert weight.weight_loader is print
        assert replaced[id(weight)] is not weight
        assert type(model.saved) is Tensor


def test_stand_ins_share_memory_as_the_tensors_do():
    memory = torch.zeros(6)
    model = nn.Module()
    model.register_buffer("whole", memory)
    model.register_buffer("part", memory[2:4])
    model.tied = model.other = nn.Parameter(torch.zeros(2))
    with with_stand_ins(model):
        assert model.part.untyped_storage()._cdata == model.whole.untyped_storage()._cdata
        assert model.part.storage_offset() == 2
        assert model.tied is model.other


def test_stand_ins_with_data_are_copies():
    model = Model()
    with with_stand_ins(model, has_data=lambda tensor: tensor.dim() == 1):
        assert bits(model.saved) == bits(torch.full((3,), -5.0))
        model.saved.fill_(8)
        assert model.first.weight.is_meta
    assert bits(model.saved) == bits(torch.full((3,), -5.0))


def test_tensors_that_are_not_replaced_stay():
    model = Model()
    weight = model.first.weight
    with with_stand_ins(model, lambda tensor: tensor is not weight):
        assert model.first.weight is weight
        assert model.second.weight.is_meta


@pytest.mark.parametrize("memory", [False, True])
def test_memory_is_put_back_if_asked(memory):
    targets = {"x": torch.zeros(2, 3)}
    tensor = targets["x"]
    with as_before(targets, memory=memory):
        tensor.data = torch.ones(5)
    assert tensor.shape == ((2, 3) if memory else (5,))


@pytest.mark.parametrize(
    "make",
    [dict, list, set, deque, OrderedDict, lambda: {"nested": [deque(), {"x": []}]}],
    ids=["dict", "list", "set", "deque", "OrderedDict", "nested"],
)
def test_members_of_containers_are_put_back(make):
    def change(value):
        if isinstance(value, (list, deque)):
            value.append(1)
        elif isinstance(value, set):
            value.add(1)
        else:
            for one in list(value.values()):
                change(one)
            value[1] = 1

    model = nn.Module()
    model.kept = make()
    before, kept = repr(model.kept), model.kept
    with suppress(KeyboardInterrupt), as_before(model):
        change(model.kept)
        model.kept = None
        raise KeyboardInterrupt
    assert model.kept is kept
    assert repr(kept) == before


def test_containers_may_contain_themselves():
    model = nn.Module()
    model.kept = []
    model.kept.append(model.kept)
    with as_before(model):
        model.kept.append(1)
    assert model.kept == [model.kept]


def test_attributes_of_tensors_are_put_back():
    targets = {"x": torch.zeros(2)}
    targets["x"].notes = ["first"]
    before = everything_of(targets)
    with as_before(targets):
        targets["x"].notes.append("second")
        targets["x"].other = 1
        targets["x"].requires_grad_(True)
        targets["y"] = targets["x"]
    assert everything_of(targets) == before


def test_tensors_that_are_plain_attributes_are_put_back():
    model = Model()
    before = everything_of(model)
    with with_stand_ins(model):
        model.plain.fill_(3)
    assert everything_of(model) == before


def test_class_and_attributes_are_those_of_another_tensor():
    like = WithLoader(torch.empty(2), requires_grad=False)
    like.weight_loader = print
    memory = torch.zeros(2)
    made = in_class_of(like, memory)
    assert (type(made), made.weight_loader, made.requires_grad) == (WithLoader, print, False)
    assert made.data_ptr() == memory.data_ptr()


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (lambda: nn.LazyLinear(3).weight, "UninitializedParameter"),
        (lambda: torch.zeros(2, 2).to_sparse(), "sparse_coo"),
    ],
)
def test_targets_without_memory_of_their_own_are_refused_by_name(make, found):
    with pytest.raises(UnsupportedError, match=r"where: *layer") as error:
        check_plain({"plain": torch.zeros(2), "layer": make()})
    assert found in str(error.value)


def test_distributed_tensors_are_refused_by_name():
    from torch.distributed.tensor import DTensor, Replicate

    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=torch.distributed.HashStore())
    try:
        tensor = DTensor.from_local(torch.zeros(2, 2), torch.distributed.init_device_mesh("cpu", (1,)), [Replicate()])
        model = nn.Module()
        model.layer = nn.Parameter(tensor)
        with pytest.raises(UnsupportedError, match=r"where: *layer\n *expected: .*\n *found: *DTensor"):
            check_plain(model)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    "change",
    [
        lambda memory: memory.clone(),
        lambda memory: memory[1:3],
        lambda memory: memory[:2].view(torch.int32),
        lambda memory: memory[:1],
        lambda memory: memory[:4:2],
    ],
    ids=["storage", "offset", "dtype", "shape", "strides"],
)
def test_views_that_differ_are_not_the_same_memory(change):
    memory = torch.zeros(4)
    assert is_same_memory(memory[:2], memory[:2])
    changed = change(memory)
    assert not is_same_memory(memory if changed.shape == memory.shape else memory[:2], changed)


def test_names_are_all_names_of_tied_buffers():
    model = nn.Module()
    model.register_buffer("first", torch.zeros(2))
    model.register_buffer("second", model.first)
    assert named_tensors(model).keys() == {"first", "second"}


def test_plain_attributes_that_are_one_tensor_stay_one():
    model = Model()
    model.other = model.plain
    model.same = model.saved
    with with_stand_ins(model):
        assert model.other is model.plain
