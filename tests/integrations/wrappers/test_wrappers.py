"""Tests of models wrapped by torch and accelerate: every public function treats them as the model itself."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

pytest.importorskip("transformers", reason="needs models of transformers")
from torch.distributed.checkpoint.state_dict import get_model_state_dict

import automodel_conv as amc
from automodel_conv.integrations.dcp import HuggingFaceReader, HuggingFaceWriter
from automodel_conv.testing import POISON
from automodel_conv.upstream.wrappers import unwrapped
from tests.comparing import assert_same, assert_same_in_order, contents
from tests.integrations.wrappers.support import SHARDED, WAYS, Published

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    return Published("qwen2_moe-tied", tmp_path_factory.mktemp("tied"))


EACH = [("mixtral", way) for way in WAYS]
EACH += [("tied", way) for way in ("compiled", "a compiled layer", "compiled embeddings", "FSDP2 and compiled")]


@pytest.fixture
def published(request, name):
    return request.getfixturevalue(name)


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def local(tensor):
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def wholes(tensors):
    return {name: whole(tensor) for name, tensor in tensors.items()}


@pytest.mark.parametrize(("name", "way"), EACH)
def test_wrapped_model_is_saved_as_by_transformers(published, way, tmp_path):
    amc.save_checkpoint(published.wrapped(way), tmp_path)
    assert contents(tmp_path) == contents(published.path)


@pytest.mark.parametrize(("name", "way"), EACH)
def test_parameters_of_a_wrapped_model_are_filled_in_place(published, way):
    model = published.wrapped(way, poisoned=True)
    before = {id(p): local(p).data_ptr() for p in model.parameters()}
    report = amc.load_model(model, published.path)
    assert report.missing_keys == report.unexpected_keys == ()
    assert {id(p): local(p).data_ptr() for p in model.parameters()} == before
    assert_same_in_order(wholes(unwrapped(model).state_dict()), published.model.state_dict())


@pytest.mark.parametrize(("name", "way"), EACH)
def test_a_state_dict_for_a_wrapped_model_has_the_names_of_the_model(published, way):
    model = published.wrapped(way)
    assert_same_in_order(wholes(amc.load_state_dict(published.path, model)), published.model.state_dict())
    plan, plain = amc.compile_plan(published.path, model), amc.compile_plan(published.path, published.model)
    assert plan.targets == plain.targets
    if way not in SHARDED:
        assert_same_in_order(amc.convert_state_dict(published.tensors, model), published.model.state_dict())


@pytest.mark.parametrize("way", [way for way in WAYS if way not in SHARDED])
def test_the_state_dict_of_a_wrapped_model_is_reverted_to_published_names(mixtral, way):
    model = mixtral.wrapped(way)
    state = model.state_dict() if way != "averaged" else model.module.state_dict()
    assert_same(amc.revert_state_dict(state, model), mixtral.tensors)
    assert_same(amc.revert_state_dict(state, model, reference=mixtral.path), mixtral.tensors)
    out = {name: torch.empty_like(tensor).fill_(7) for name, tensor in mixtral.tensors.items()}
    assert_same(amc.revert_state_dict(state, model, out=out), mixtral.tensors)


@pytest.mark.parametrize("way", WAYS)
def test_rules_of_a_wrapped_model_are_those_of_the_model(mixtral, way):
    def described(model):
        rules = amc.get_model_conversion_mapping(model)
        return [(type(r), r.source_patterns, r.target_patterns, getattr(r, "scope_prefix", None)) for r in rules]

    model = mixtral.wrapped(way)
    assert described(model) == described(mixtral.model)
    rename, expected = (amc.get_combined_key_mapping("mixtral", model=each) for each in (model, mixtral.model))
    assert {name: rename(name) for name in mixtral.tensors} == {name: expected(name) for name in mixtral.tensors}


@pytest.mark.parametrize(
    "way", ["compiled DDP", "a compiled layer in DDP", "a checkpointed layer", "FSDP2 and compiled"]
)
def test_dcp_saves_and_loads_wrapped_models_under_wrapped_or_own_names(mixtral, way, tmp_path):
    model = mixtral.wrapped(way)
    for called, state in (("own", model.state_dict()), ("torch", get_model_state_dict(model))):
        dcp.save(state, storage_writer=HuggingFaceWriter(tmp_path / called, model))
        assert contents(tmp_path / called) == contents(mixtral.path)
        for tensor in state.values():
            local(tensor).reshape(-1).view(torch.uint8).fill_(POISON)
        dcp.load(state, storage_reader=HuggingFaceReader(mixtral.path, model))
        assert_same_in_order(wholes(unwrapped(model).state_dict()), mixtral.model.state_dict())


@pytest.mark.parametrize("name", ["mixtral", "tied"])
@pytest.mark.parametrize("way", ["compiled", "a compiled layer", "compiled regions", "a checkpointed layer"])
def test_wrapped_model_on_the_meta_device_is_materialized(published, way):
    with torch.device("meta"):
        model = type(published.model)(published.model.config)
    model = WAYS[way](model)
    amc.load_model(model, published.path, dtype=torch.bfloat16)
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    assert_same(unwrapped(model).state_dict(), published.model.state_dict())
    if published.model.config.tie_word_embeddings:
        plain = unwrapped(model)
        assert plain.lm_head.weight is plain.model.embed_tokens.weight


def test_a_dtype_replaces_the_parameters_of_the_wrapped_model_itself(mixtral):
    model = mixtral.wrapped("a compiled layer")
    amc.load_model(model, mixtral.path, dtype=torch.float32)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert len(list(model.parameters())) == len(list(mixtral.model.parameters()))


@pytest.mark.parametrize("name", ["qwen3_vl_moe", "ernie4_5_vl_moe"])
def test_a_compiled_tower_has_the_rules_of_its_scope(name, tmp_path):
    published = Published(name, tmp_path / "published")
    model = copy.deepcopy(published.model)
    model.model.language_model = torch.compile(model.model.language_model)
    amc.save_checkpoint(model, tmp_path / "made")
    assert contents(tmp_path / "made") == contents(published.path)
    for tensor in model.state_dict().values():
        tensor.reshape(-1).view(torch.uint8).fill_(POISON)
    amc.load_model(model, published.path)
    assert_same(unwrapped(model).state_dict(), published.model.state_dict())


def test_unwrapping_returns_the_model_unchanged(mixtral):
    assert unwrapped(mixtral.model) is mixtral.model
    compiled = torch.compile(mixtral.model)
    assert unwrapped(compiled) is mixtral.model
    model = mixtral.wrapped("a compiled layer")
    modules, names = list(model.named_modules()), list(model.state_dict())
    plain = unwrapped(model)
    assert list(plain.state_dict()) == list(mixtral.model.state_dict())
    assert list(model.named_modules()) == modules
    assert list(model.state_dict()) == names
    assert type(plain) is type(mixtral.model)


def test_layer_used_twice_is_one_layer_after_unwrapping():
    layer = nn.Linear(2, 2)
    model = nn.ModuleList([layer, torch.compile(layer), nn.ModuleList()])
    plain = unwrapped(model)
    assert plain[0] is plain[1] is layer
    assert len(plain[2]) == 0
