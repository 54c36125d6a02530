"""Tests of loading code that asks where tensors are: it finds them where it would if it ran on files."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from automodel_conv import load_with, trace_loader
from automodel_conv.testing import assert_bytes_equal
from tests.loading_code.loads import has_data

QUESTIONS = {
    "is_meta": lambda tensor: tensor.is_meta,
    "device": lambda tensor: tensor.device != torch.device("cpu"),
    "device.type": lambda tensor: tensor.device.type == "meta",
    "is_cpu": lambda tensor: not tensor.is_cpu,
    "is_cuda": lambda tensor: tensor.is_cuda,
}
MADE = {
    "source": lambda tensor: tensor,
    "view": lambda tensor: tensor.t()[1:],
    "copy": lambda tensor: tensor.clone(),
    "cast": lambda tensor: tensor.double(),
    "joined": lambda tensor: torch.cat([tensor, tensor]),
    "alike": lambda tensor: torch.zeros_like(tensor),
    "computed": lambda tensor: tensor * 2,
}


@pytest.fixture
def checkpoint(tmp_path):
    save_file({"a": torch.arange(12.0).reshape(3, 4)}, tmp_path / "model.safetensors")
    return tmp_path


@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize("made", MADE)
def test_tensors_without_data_are_found_on_the_cpu(made, question, checkpoint):
    def load(tensors):
        if QUESTIONS[question](MADE[made](tensors["a"])):
            return {"shape only": torch.empty(3, 4)}
        return {"b": tensors["a"].t()}

    loaded = load_with(load, checkpoint, calls="dict")
    assert_bytes_equal(loaded["b"], torch.arange(12.0).reshape(3, 4).t())
    assert not loaded.report.computed


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_targets_are_found_on_their_own_device(device, checkpoint):
    found = []
    model = nn.Linear(4, 3, bias=False, device=device)

    def load(tensors):
        made = torch.empty_like(model.weight)
        for tensor in (model.weight, model.weight[1:], made, model.weight.clone()):
            found.append((tensor.device.type, tensor.is_meta, tensor.is_cpu))
        model.weight.data.copy_(tensors["a"])

    load_with(load, checkpoint, model, calls="dict")
    assert set(found) == {(device, device == "meta", device == "cpu")}
    assert_bytes_equal(model.weight.detach(), torch.arange(12.0).reshape(3, 4))


def test_copies_to_another_device_are_found_there(checkpoint):
    found = []

    def load(tensors):
        moved = torch.ops.aten._to_copy.default(tensors["a"], device=torch.device("cuda"))
        made = [moved[1:], moved.double(), moved + 1, torch.zeros_like(moved), torch.stack([moved, moved])]
        found.extend(tensor.device.type for tensor in (moved, *made))
        return {"b": moved.t()}

    plan = trace_loader(load, checkpoint, calls="dict")
    assert set(found) == {"cuda"}
    assert plan.target("b").shape == (4, 3)


def test_tensors_of_which_some_have_been_read_are_on_one_device(tmp_path):
    def load(tensors):
        if tensors["scale"].item() > 1:
            assert tensors["scale"].device == tensors["codes"].device
            return {"b": tensors["codes"] * tensors["scale"]}
        return {}

    tensors = {"codes": torch.arange(6.0), "scale": torch.tensor(3.0)}
    save_file(tensors, tmp_path / "model.safetensors")
    loaded = load_with(load, tmp_path, calls="dict")
    assert_bytes_equal(loaded["b"], torch.arange(6.0) * 3)


def test_all_tensors_are_on_one_device_when_some_targets_are_computed(tmp_path):
    def load(tensors):
        found = {(tensor.device, tensor.is_meta) for tensor in tensors.values()}
        if found != {(torch.device("cpu"), False)}:
            raise ValueError("on several devices")
        return {"copied": tensors["a"].t(), "computed": tensors["b"] * 2}

    save_file({"a": torch.arange(12.0).reshape(3, 4), "b": torch.arange(5.0)}, tmp_path / "model.safetensors")
    loaded = load_with(load, tmp_path, calls="dict")
    assert list(loaded.report.computed) == ["computed"]
    assert_bytes_equal(loaded["copied"], torch.arange(12.0).reshape(3, 4).t())
    assert_bytes_equal(loaded["computed"], torch.arange(5.0) * 2)


def test_only_sources_of_computed_targets_have_data(tmp_path):
    have_data = []

    def load(tensors):
        have_data.append({name for name, tensor in tensors.items() if has_data(tensor)})
        return {"copied": tensors["a"].t(), "computed": tensors["b"] * 2}

    save_file({"a": torch.ones(3, 4), "b": torch.ones(5)}, tmp_path / "model.safetensors")
    load_with(load, tmp_path, calls="dict")
    assert have_data == [set(), {"b"}]


def test_returned_tensors_that_are_not_written_are_left_to_the_code(checkpoint):
    def load(tensors):
        return {"b": tensors["a"], "placeholder": torch.empty_like(tensors["a"], dtype=torch.uint8)}

    loaded = load_with(load, checkpoint, calls="dict")
    assert list(loaded) == ["b", "placeholder"]
    assert loaded["placeholder"].shape == (3, 4)
    assert not loaded["placeholder"].is_meta
    assert loaded.report.computed == {"placeholder": "the loading code writes nothing to it"}
