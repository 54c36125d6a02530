"""Tests of modules without the wrappers of torch around them, on the same parameters."""

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from automodel_conv.errors import UnsupportedError
from automodel_conv.upstream.wrappers import plain_model, stand_in, unwrapped, without_adapters


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(2, 3)
        self.none = None
        self.register_module("absent", None)
        self.register_buffer("scale", torch.ones(1))


def model():
    return nn.Sequential(Block(), Block())


def compiled(module):
    return torch.compile(module, backend="eager")


@pytest.mark.parametrize("wrap", [compiled, nn.DataParallel, AveragedModel])
def test_wrapper_around_the_whole_model_is_removed(wrap):
    inner = model()
    plain = unwrapped(wrap(inner))
    assert plain.state_dict().keys() == inner.state_dict().keys()
    assert not any("_orig_mod" in name or name.startswith("module.") for name in plain.state_dict())


def test_model_without_wrappers_is_returned_unchanged():
    inner = model()
    assert unwrapped(inner) is inner
    assert plain_model(inner) is inner


def test_wrapper_in_the_middle_leaves_the_model_unchanged_and_shares_its_tensors():
    wrapped = model()
    wrapped[1] = compiled(wrapped[1])
    names = list(wrapped.state_dict())
    plain = unwrapped(wrapped)
    assert list(wrapped.state_dict()) == names
    assert type(plain) is nn.Sequential
    assert plain is not wrapped
    assert plain[0] is wrapped[0]
    assert plain[1] is wrapped[1]._orig_mod
    assert list(plain.state_dict()) == list(model().state_dict())


def test_module_that_is_used_twice_is_one_module_afterwards():
    block = compiled(Block())
    plain = unwrapped(nn.ModuleList([block, block]))
    assert plain[0] is plain[1]


def test_module_that_only_has_the_name_of_a_wrapper_is_kept():
    own = nn.Module()
    own._orig_mod = nn.Linear(2, 2)
    own.weight = nn.Parameter(torch.ones(1))
    assert unwrapped(own) is own


@pytest.mark.parametrize("thing", [nn.Linear, {}, None])
def test_something_that_is_no_module_is_named(thing):
    with pytest.raises(UnsupportedError, match=r"not a model(.|\n)*(the class Linear|a dict|a NoneType)"):
        unwrapped(thing)


def test_stand_in_shares_attributes_and_has_its_own_children():
    block = Block()
    replacement = stand_in(block, nn.Module, {"other": None})
    assert replacement.scale is block.scale
    assert list(replacement._modules) == ["other"]
    assert list(block._modules) == ["proj", "absent"]
    assert type(replacement) is nn.Module


@pytest.mark.parametrize(
    ("child", "text"), [("base_layer", "PEFT"), ("_fsdp_wrapped_module", "FullyShardedDataParallel")]
)
def test_parameters_that_are_not_those_of_the_model_are_refused(child, text):
    adapted = model()
    adapted[1].proj.add_module(child, nn.Linear(2, 3))
    with pytest.raises(UnsupportedError, match=rf"(?s){text}.*1\.proj|1\.proj.*{text}"):
        plain_model(adapted)


def adapted(inner, **settings):
    """Return a model with adapters of PEFT."""
    peft = pytest.importorskip("peft", reason="makes models of PEFT")
    return peft.get_peft_model(inner, peft.LoraConfig(r=2, **{"target_modules": ["proj"]} | settings))


@pytest.mark.parametrize("wrap", [lambda model: model, compiled, nn.DataParallel])
@pytest.mark.parametrize("settings", [{}, {"modules_to_save": ["1.proj"], "target_modules": ["0.proj"]}], ids=str)
def test_model_without_adapters_has_its_own_names_and_parameters(wrap, settings):
    inner = model()
    before = {name: tensor.data_ptr() for name, tensor in inner.state_dict().items()}
    plain = without_adapters(wrap(adapted(inner, **settings)))
    assert {name: tensor.data_ptr() for name, tensor in plain.state_dict().items()} == before
    assert type(plain) is nn.Sequential
    assert type(plain[0].proj) is nn.Linear


def test_adapted_model_itself_does_not_change():
    wrapped = adapted(model())
    names = list(wrapped.state_dict())
    without_adapters(wrapped)
    assert list(wrapped.state_dict()) == names


def test_adapted_module_that_is_used_twice_is_one_module_afterwards():
    block = Block()
    plain = without_adapters(adapted(nn.ModuleList([block, block])))
    assert plain[0] is plain[1]


def test_parameters_that_are_targets_are_those_of_their_module():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Parameter(torch.ones(2, 3, 4)), nn.Parameter(torch.ones(2, 4, 3))

        def forward(self, x):
            return x @ self.up @ self.down

    inner = nn.Sequential(nn.Module())
    inner[0].experts = Experts()
    names = list(inner.state_dict())
    wrapped = adapted(inner, target_modules=[], target_parameters=["experts.up", "experts.down"])
    assert list(wrapped.state_dict()) != names
    plain = without_adapters(wrapped)
    assert list(plain.state_dict()) == names
    assert type(plain[0].experts) is Experts


def test_model_without_adapters_is_returned_unchanged():
    inner = model()
    assert without_adapters(inner) is inner
