"""Tests of attributes: after a planned load they are as they are after the loading code itself."""

from __future__ import annotations

import copy
from collections import Counter, deque

import pytest
import torch
from torch import Tensor, nn

from automodel_conv import UnsupportedError, load_with
from automodel_conv.loading_code.attributes import AttributeChange, changes_from, text_of
from tests.loading_code.loads import SOURCES, Model, checkpoint_of, described


def with_attributes():
    model = Model()
    model.is_loaded, model.names, model.seen, model.last = False, ["x"], set(), deque([1], maxlen=2)
    model.first.settings = {"sizes": [1, 2], "old": 3}
    model.counts = Counter("aab")
    model.pair = ([], {"calls": [0]})
    model.first.map = torch.tensor([0, 1])
    del model.first.weight.weight_loader  # another function for each model
    model.first.weight.loader = {"calls": 0}
    return model


def plain(value):
    """Return a value that can be compared, with lists of numbers in the place of tensors."""
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, dict):
        return {key: plain(one) for key, one in value.items()}
    return [plain(one) for one in value] if isinstance(value, (list, tuple, deque)) else value


def attributes(model):
    """Return all attributes of the parts of a module and of its tensors."""
    own = {"_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"}
    parts = dict(model.named_modules())
    of_parts = {
        name: plain({key: value for key, value in vars(part).items() if key not in own}) for name, part in parts.items()
    }
    return of_parts, {name: plain(vars(tensor)) for name, tensor in model.named_parameters()}


def sets(model, given):
    model.is_loaded, model.new = True, "new"


def removes(model, given):
    del model.is_loaded
    del model.first.settings["old"]


def fills_containers(model, given):
    for name in given:
        model.names.append(name)
        model.seen.add(name)
        model.last.append(len(name))
    model.first.settings["sizes"][0] = 7
    model.first.settings["new"] = {"deep": (1, [2])}


def replaces_containers(model, given):
    model.first.settings["sizes"].append(3)
    model.names, model.first.settings = {"a": 1}, []


def counts_at_tensors(model, given):
    model.first.weight.loader["calls"] += 1
    model.first.weight.is_loaded = True


def keeps_own_tensors(model, given):
    model.numbers = torch.tensor([1, 2])
    model.all = [torch.arange(3)]


def changes_own_tensor(model, given):
    model.first.map[0] = 5


def keeps_parameters(model, given):
    model.by_name = {"weights": [model.first.weight], "other": (model.saved,)}


def removes_a_part(model, given):
    model.second = None


def counts(model, given):
    model.counts.update("b")


def fills_containers_of_a_tuple(model, given):
    model.pair[0].append(1)
    model.pair[1]["calls"][0] += 1


def uses_another_part(model, given):
    model.second = model.first


def changes_nothing(model, given):
    model.is_loaded, model.names = False, model.names


CODES = [
    sets,
    removes,
    fills_containers,
    replaces_containers,
    counts_at_tensors,
    keeps_own_tensors,
    changes_own_tensor,
    keeps_parameters,
    removes_a_part,
    counts,
    fills_containers_of_a_tuple,
    uses_another_part,
    changes_nothing,
]


def loader(code, model):
    def load(pairs):
        given = dict(pairs)
        model.first.weight.data.copy_(given["a"])
        code(model, given)

    return load


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("times", [1, 2])
def test_attributes_are_those_of_the_code(code, times, tmp_path):
    """With ``times``, the trace is kept, and the second load may use it."""
    expected = with_attributes()
    loader(code, expected)(SOURCES.items())
    for _ in range(times):
        model = with_attributes()
        first = model.first
        load_with(loader(code, model), checkpoint_of(tmp_path), model, trace_cache=tmp_path / "cache", trace_key="key")
        assert attributes(model) == attributes(expected)
        assert described(model) == described(expected)
        assert model.first is first


def test_parameters_in_attributes_are_those_of_the_module(tmp_path):
    model = with_attributes()
    load_with(loader(keeps_parameters, model), checkpoint_of(tmp_path), model)
    assert model.by_name["weights"][0] is model.first.weight
    assert model.by_name["other"][0] is model.saved


def test_part_that_becomes_another_part_has_its_parameters(tmp_path):
    model = with_attributes()
    weight, bias = model.first.weight, model.first.bias
    load_with(loader(uses_another_part, model), checkpoint_of(tmp_path), model)
    assert model.second is model.first
    assert (model.first.weight is weight, model.first.bias is bias) == (True, True)


def test_buffer_of_a_part_may_be_an_attribute_of_the_module(tmp_path):
    def load(pairs):
        model.table.copy_(dict(pairs)["c"])

    model = with_attributes()
    model.first.register_buffer("table", torch.zeros(3))
    model.__dict__["table"] = model.first.table
    load_with(load, checkpoint_of(tmp_path), model)
    assert model.table is model.first.table
    assert model.table.equal(SOURCES["c"])


def test_attributes_may_be_tensors_of_inference_mode(tmp_path):
    model = with_attributes()
    with torch.inference_mode():
        model.kept = [torch.zeros(2)]
        load_with(loader(sets, model), checkpoint_of(tmp_path), model)
    assert model.first.weight.equal(SOURCES["a"])
    assert model.new == "new"


def test_containers_stay_the_same_objects(tmp_path):
    model = with_attributes()
    names, sizes = model.names, model.first.settings["sizes"]
    load_with(loader(fills_containers, model), checkpoint_of(tmp_path), model)
    assert model.names is names
    assert model.first.settings["sizes"] is sizes
    assert (names, sizes) == (["x", *SOURCES], [7, 2])


def keeps_source(model, given):
    model.first.kept = {"deep": [given["a"]]}


def fills_plain_tensor(model, given):
    model.first.map.copy_(given["c"][:2])


@pytest.mark.parametrize(("code", "where"), [(keeps_source, "first.kept.deep.0"), (fills_plain_tensor, "first.map")])
def test_attribute_that_needs_the_checkpoint_is_refused(code, where, tmp_path):
    model = with_attributes()
    before, values = copy.deepcopy(attributes(model)), described(model)
    with pytest.raises(UnsupportedError, match=rf"tensor of the checkpoint into an attribute\n *where: +{where}\n"):
        load_with(loader(code, model), checkpoint_of(tmp_path), model)
    assert (attributes(model), described(model)) == (before, values)


@pytest.mark.parametrize(
    "put", [{"x": 1}, {"x": [1.5, None, {"y": (b"z", True)}]}, {"x", "y"}, set(), [1], {1: {"y": set()}}]
)
def test_plain_changes_become_text_and_come_back(put):
    changes = (AttributeChange(("first", "names", 0), put, ("old", 1)),)
    text = text_of(changes)
    assert text is not None
    assert changes_from(text) == changes


@pytest.mark.parametrize("value", [torch.ones(1), float("nan"), float("inf"), nn.Identity(), object(), print, deque()])
def test_other_changes_do_not_become_text(value):
    assert text_of([AttributeChange(("",), {"x": value})]) is None
