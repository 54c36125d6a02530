"""Tests of what a module of the engine has to be filled with: by its names, a layout, or a loader."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from automodel_conv.errors import NameProblems, UnsupportedError
from automodel_conv.refitting.engine import engine_of
from tests.planning.oracles import addressed, execute
from tests.refitting.support import module, published, zeros

SHAPES = {"a": (2, 3), "b": (4,), "c.d": (1,)}


def made_of(of_trainer, engine, *, rules=(), layout=None, loader=None, experts=None, num_experts=0):
    rules = None if loader is not None else list(rules)
    return engine_of(published(of_trainer), engine, rules, layout, loader, experts, num_experts)


def load_into(made, change=lambda name, tensor: tensor):
    def load(pairs):
        own = dict(made.named_parameters())
        for name, tensor in pairs:
            own[name].data.copy_(change(name, tensor))

    return load


@pytest.mark.parametrize("by_loader", [False, True])
def test_tensors_of_the_same_names_are_copied(by_loader):
    made = zeros(SHAPES)
    engine = made_of(SHAPES, made, loader=load_into(made) if by_loader else None)
    source = published(SHAPES).plan.sources
    assert execute(engine.plan, addressed(source)) == addressed(source)
    assert engine.unchanged == ()
    assert engine.held.regions.keys() == SHAPES.keys()


@pytest.mark.parametrize(
    ("of_trainer", "of_engine", "names"),
    [
        ({"a": (2,)}, {"a": (2,), "b": (3,)}, ["missing", "b"]),
        ({"a": (2,), "b": (3,)}, {"a": (2,)}, ["unexpected", "b"]),
        ({"a": (2,)}, {"a": (3,)}, [r"a: expected \[3\], found \[2\]"]),
        ({"a": (2,), "x": (1,)}, {"a": (3,), "y": (1,)}, ["missing", "y", "unexpected", "x", "wrong shape", "a"]),
    ],
    ids=["missing", "unexpected", "shape", "all"],
)
def test_all_names_that_do_not_fit_are_in_one_error(of_trainer, of_engine, names):
    with pytest.raises(NameProblems, match="the trainer's tensors and the engine's module") as error:
        made_of(of_trainer, zeros(of_engine))
    for name in names:
        error.match(name)


def test_dtypes_are_those_of_the_engine():
    engine = made_of({"a": (2,)}, zeros({"a": (2,)}, torch.bfloat16))
    assert [target.dtype for target in engine.plan.targets] == ["BF16"]


def test_persistent_buffers_are_filled_and_others_are_not():
    made = zeros({"a": (2,)})
    made.register_buffer("steps", torch.zeros(3))
    made.register_buffer("cache", torch.zeros(3), persistent=False)
    engine = made_of({"a": (2,), "steps": (3,)}, made)
    assert [target.name for target in engine.plan.targets] == ["a", "steps"]
    with pytest.raises(NameProblems, match="steps"):
        made_of({"a": (2,)}, made)


def test_buffer_that_a_loader_does_not_write_is_unchanged():
    made = zeros({"a": (2,)})
    made.register_buffer("cache", torch.zeros(3), persistent=False)
    engine = made_of({"a": (2,), "mtp": (7,)}, made, loader=lambda pairs: made.a.data.copy_(dict(pairs)["a"]))
    assert engine.unchanged == ("cache",)
    assert engine.plan.left_out == ("mtp",)


def test_parameter_that_a_loader_does_not_write_is_named():
    made = zeros({"a": (2,), "b": (3,)})
    with pytest.raises(NameProblems, match="the loader writes nothing to b"):
        made_of({"a": (2,)}, made, loader=load_into(made))


def test_parameter_that_a_loader_adds_or_replaces_is_named():
    made = zeros({"a": (2,), "b": (3,)})

    def load(pairs):
        tensors = dict(pairs)
        made.c = nn.Parameter(torch.empty(3))
        made.c.data.copy_(tensors["b"])
        made.b.data.copy_(tensors["b"])
        made.a = nn.Parameter(torch.empty(1))
        made.a.data.copy_(tensors["a"][:1])

    with pytest.raises(NameProblems, match=r"(?s)the loader adds c.*the loader puts shape \[1\] in place of a \[2\]"):
        made_of({"a": (2,), "b": (3,)}, made, loader=load)


def test_loader_that_computes_or_reads_values_is_refused():
    made = zeros({"a": (2,)})
    with pytest.raises(UnsupportedError, match=r"(?s)copies do not fill all parameters of the engine.*a: aten.mul"):
        made_of({"a": (2,)}, made, loader=load_into(made, lambda name, tensor: tensor * 2))

    def load(pairs):
        for _, tensor in pairs:
            if tensor[0].item() > 0:
                made.a.data.copy_(tensor)

    with pytest.raises(UnsupportedError, match="the loader reads values of tensors"):
        made_of({"a": (2,)}, made, loader=load)


def test_tensors_that_a_state_dict_creates_are_refused():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Parameter(torch.zeros(2))

        def state_dict(self, *args, **options):
            return {"a": self.a.detach() * 2}

    with pytest.raises(UnsupportedError, match="a is neither a parameter nor a buffer of the module"):
        made_of({"a": (2,)}, Scaled())


def test_names_of_one_tensor_are_filled_once():
    made = zeros({"a": (2, 2)})
    made.b = made.a
    engine = made_of({"a": (2, 2)}, made)
    assert [target.name for target in engine.plan.targets] == ["a"]
    with pytest.raises(NameProblems, match="a and b are one tensor of the engine, and different ones of the trainer"):
        made_of({"a": (2, 2), "b": (2, 2)}, made)


def test_empty_tensors_are_no_aliases_of_each_other():
    engine = made_of({"a": (0,), "b": (0,)}, zeros({"a": (0,), "b": (0,)}))
    assert [target.name for target in engine.plan.targets] == ["a", "b"]


def test_part_of_a_parameter_is_another_tensor():
    memory = torch.zeros(6)
    engine = made_of({"a": (3,), "b": (3,)}, module({"a": memory[:3], "b": memory[3:]}))
    assert [target.name for target in engine.plan.targets] == ["a", "b"]


def test_own_experts_of_an_engine_are_rows_of_the_whole():
    shapes = {"experts.down_proj": (4, 3, 2), "norm": (2,)}
    made = zeros({"experts.down_proj": (2, 3, 2), "norm": (2,)})
    engine = made_of(shapes, made, experts=[3, 1], num_experts=4)
    assert engine.plan.target("experts.down_proj").shape == (4, 3, 2)
    assert engine.held.regions["experts.down_proj"].local_shape == (2, 3, 2)
    with pytest.raises(NameProblems, match="wrong shape"):
        made_of(shapes, made)
