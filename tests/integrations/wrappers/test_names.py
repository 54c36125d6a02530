"""Tests of the names of wrapped models in files and state dicts, and of rules that match none of them."""

from __future__ import annotations

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

pytest.importorskip("transformers", reason="needs models of transformers")
from safetensors.torch import load_file, save_file

import automodel_conv as amc
from automodel_conv.errors import NameProblems, UnsupportedError
from automodel_conv.integrations.dcp import HuggingFaceReader
from automodel_conv.upstream.wrappers import unwrapped
from tests.comparing import assert_same, assert_same_in_order, contents
from tests.model_zoo import build_model

pytestmark = pytest.mark.filterwarnings("ignore")


def named(tensors, rename):
    return {rename(name): tensor for name, tensor in tensors.items()}


def in_layers(name):
    return name.replace("layers.0.", "layers.0._orig_mod.").replace("experts.", "experts._orig_mod.")


NAMES = {
    "compiled": lambda name: f"_orig_mod.{name}",
    "parts": in_layers,
    "DDP": lambda name: f"module.{name}",
    "compiled DDP": lambda name: f"_orig_mod.module.{in_layers(name)}",
}


@pytest.mark.parametrize("kind", NAMES)
def test_files_of_a_wrapped_model_load_and_convert_as_those_of_the_model(mixtral, tmp_path, kind):
    source = tmp_path / "source"
    source.mkdir()
    for file, data in contents(mixtral.path).items():
        (source / file).write_bytes(data)
    save_file(named(mixtral.tensors, NAMES[kind]), source / "model.safetensors", metadata={"format": "pt"})
    expected = mixtral.model.state_dict()
    assert_same_in_order(amc.load_state_dict(source), expected)
    assert_same_in_order(amc.load_state_dict(source, mixtral.model), expected)
    model = mixtral.wrapped("a compiled layer", poisoned=True)
    amc.load_model(model, source)
    assert_same_in_order(unwrapped(model).state_dict(), expected)
    assert_same_in_order(amc.convert_state_dict(load_file(source / "model.safetensors"), mixtral.model), expected)
    for layout in (None, "nemo", "per_expert"):
        amc.convert_checkpoint(source, tmp_path / f"made {layout}", layout=layout)
        amc.convert_checkpoint(mixtral.path, tmp_path / f"plain {layout}", layout=layout)
        assert contents(tmp_path / f"made {layout}") == contents(tmp_path / f"plain {layout}")
    assert amc.open_checkpoint(source).names == sorted(map(NAMES[kind], mixtral.tensors)) or kind == "parts"


@pytest.mark.parametrize("kind", ["compiled", "parts"])
def test_state_dicts_of_a_wrapped_model_are_split_by_rules(mixtral, tmp_path, kind):
    state = named(mixtral.model.state_dict(), NAMES[kind])
    rules = amc.get_model_conversion_mapping(mixtral.model)
    assert_same(amc.revert_state_dict(state, rules=rules), mixtral.tensors)
    amc.save_checkpoint(state, tmp_path, rules=rules)
    assert_same(load_file(tmp_path / "model.safetensors"), mixtral.tensors)


def test_reference_restores_its_own_names(mixtral, tmp_path):
    file = tmp_path / "model.safetensors"
    stored = named(mixtral.tensors, NAMES["compiled DDP"])
    save_file(stored, file)
    assert_same(amc.revert_state_dict(mixtral.model.state_dict(), mixtral.model, reference=file), stored)
    amc.save_checkpoint(mixtral.model, tmp_path / "made", reference=file)
    assert_same(load_file(tmp_path / "made" / "model.safetensors"), stored)


def test_names_are_kept_without_rules_or_reference(mixtral, tmp_path):
    state = named(mixtral.model.state_dict(), NAMES["compiled DDP"])
    amc.save_checkpoint(state, tmp_path, rules=[])
    assert load_file(tmp_path / "model.safetensors").keys() == state.keys()
    assert amc.load_state_dict(tmp_path, rules=[]).keys() == state.keys()


def test_names_that_collide_are_named():
    model = nn.Sequential(nn.Linear(2, 2, bias=False))
    state = {"0.weight": torch.ones(2, 2), "0._orig_mod.weight": torch.ones(2, 2)}
    with pytest.raises(NameProblems, match=r"0\.weight <- 0\.weight, 0\._orig_mod\.weight") as caught:
        amc.convert_state_dict(state, model)
    assert caught.value.duplicated == (("0.weight", ("0.weight", "0._orig_mod.weight")),)


class Held(nn.Module):
    def __init__(self):
        super().__init__()
        self.module = nn.Linear(2, 2)


def test_a_model_with_a_module_called_module_keeps_it():
    state = Held().state_dict()
    assert_same_in_order(amc.convert_state_dict(state, Held()), state)
    assert_same_in_order(amc.revert_state_dict(state, Held()), state)
    wrapped = nn.DataParallel(Held()).state_dict()  # module.module.weight: either part could be the model's
    with pytest.raises(NameProblems, match=r"module\.module\.weight"):
        amc.convert_state_dict(wrapped, Held())


class Original(nn.Module):
    """A module that is not a wrapper although it has ``_orig_mod``: it has other tensors too."""

    def __init__(self, extra):
        super().__init__()
        self._orig_mod = nn.Linear(2, 2)
        if extra == "a module":
            self.other = nn.Linear(2, 2)
        if extra == "a parameter":
            self.other = nn.Parameter(torch.ones(2))
        if extra == "a buffer":
            self.register_buffer("other", torch.ones(2))


@pytest.mark.parametrize("wrap", [lambda model: model, torch.compile, nn.DataParallel])
@pytest.mark.parametrize("extra", ["a module", "a parameter", "a buffer"])
def test_model_with_orig_mod_and_other_tensors_keeps_all(extra, wrap, tmp_path):
    model = Original(extra)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    wrapped = wrap(model)
    amc.save_checkpoint(wrapped, tmp_path)
    assert_same(load_file(tmp_path / "model.safetensors"), state)
    assert_same_in_order(amc.convert_state_dict(state, wrapped), state)
    assert_same_in_order(amc.revert_state_dict(state, wrapped), state)
    for tensor in model.state_dict().values():
        tensor.fill_(7)
    amc.load_model(wrapped, tmp_path)
    assert_same(model.state_dict(), state)
    for tensor in model.state_dict().values():
        tensor.fill_(7)
    dcp.load(model.state_dict(), storage_reader=HuggingFaceReader(tmp_path, model))
    assert_same(model.state_dict(), state)


def test_module_prefix_is_removed_only_if_all_names_have_it():
    state = {"module.0.weight": torch.ones(2, 2), "1.weight": torch.ones(2, 2)}
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    with pytest.raises(NameProblems, match=r"module\.0\.weight"):
        amc.convert_state_dict(state, model)


@pytest.mark.parametrize("model_type", ["qwen3_vl_moe", "nemotron_h"])
def test_grouped_experts_that_rules_do_not_match_are_named(model_type, tmp_path):
    model = build_model(model_type)
    rules = amc.get_model_conversion_mapping(model)
    assert amc.revert_state_dict(model.state_dict(), rules=rules)
    # Without modules other than experts that patterns of this type match.
    odd = {
        name.replace("mlp.experts", "moe.experts").replace("mixer.experts", "moe.experts"): t
        for name, t in model.state_dict().items()
    }
    with pytest.raises(UnsupportedError, match=r"(?s)no rule splits these experts.*moe\.experts\..*_proj"):
        amc.revert_state_dict(odd, rules=rules)
    with pytest.raises(UnsupportedError, match="no rule splits these experts"):
        amc.save_checkpoint(odd, tmp_path / "made", rules=rules)
    assert not (tmp_path / "made").exists()


def test_rules_that_match_nothing_are_accepted_without_experts(mixtral):
    state = {name: tensor for name, tensor in mixtral.model.state_dict().items() if "experts" not in name}
    expected = {name: tensor for name, tensor in mixtral.tensors.items() if "experts" not in name}
    assert_same(amc.revert_state_dict(state, mixtral.model), expected)
    assert amc.revert_state_dict({}, mixtral.model) == {}


def test_pipeline_stage_is_split_without_the_missing_layers(mixtral):
    state = {name: tensor for name, tensor in mixtral.model.state_dict().items() if ".layers.1." in name}
    expected = {name: tensor for name, tensor in mixtral.tensors.items() if ".layers.1." in name}
    assert_same(amc.revert_state_dict(state, mixtral.model), expected)
