"""Tests of published tensors: for every type of model they are what a save writes, and experts are views."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import automodel_conv as amc
from automodel_conv.errors import ConversionError, CoverageError, UnsupportedError
from automodel_conv.testing import address_valued, assert_bytes_equal
from tests.comparing import assert_same, tensors_of

try:
    from tests.model_zoo import EXCLUDED, build_model, write_checkpoint, zoo_names
except ModuleNotFoundError:
    NAMES: list[str] = []
else:
    NAMES = [name for name in zoo_names() if name not in EXCLUDED]
needs_transformers = pytest.mark.skipif(not NAMES, reason="transformers is not installed")

E, I, H = 3, 5, 7  # noqa: E741
SHAPES = {
    "transformers": {"gate_up_proj": (E, 2 * I, H), "down_proj": (E, H, I)},
    "nemo": {"gate_and_up_projs": (E, H, 2 * I), "down_projs": (E, I, H)},
    "gpt_oss": {"gate_up_proj": (E, H, 2 * I), "down_proj": (E, I, H)},
    "vllm": {"w13_weight": (E, 2 * I, H), "w2_weight": (E, H, I)},
}


# Types whose published experts have gate and up rows in turn, which is no view of one after the other.
INTERLEAVED = {name for name in NAMES if name.startswith("inkling")}


def layer_of_experts(layout):
    """Return a layer with experts in a layout, and a norm."""
    experts = nn.Module()
    for number, (name, shape) in enumerate(SHAPES[layout].items()):
        experts.register_parameter(name, nn.Parameter(address_valued(shape, torch.bfloat16, 1000 * number)))
    return nn.ModuleDict({"mlp": nn.ModuleDict({"experts": experts}), "norm": nn.RMSNorm(H, dtype=torch.bfloat16)})


def memory_of(model):
    return {tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values()}


@pytest.mark.parametrize("name", NAMES)
def test_tensors_of_every_type_are_those_of_the_save(name, tmp_path):
    model = build_model(name)
    amc.save_checkpoint(model, tmp_path)
    pairs = list(amc.published_tensors(model))
    tensors = dict(pairs)
    assert len(pairs) == len(tensors)
    assert_same(tensors, tensors_of(tmp_path))
    for path, tensor in tensors.items():
        if ".experts." in path and name not in INTERLEAVED:
            assert tensor.untyped_storage().data_ptr() in memory_of(model), path


@needs_transformers
@pytest.mark.parametrize("layout", SHAPES)
def test_experts_in_every_layout_are_views(layout):
    layer = layer_of_experts(layout)
    rules = amc.get_checkpoint_conversion_mapping("qwen3_moe")
    tensors = dict(amc.published_tensors(layer, rules=rules, layout=layout))
    wanted = amc.revert_state_dict(layer.state_dict(), rules=rules, layout=layout)
    assert_same(tensors, dict(wanted))
    assert {tensor.untyped_storage().data_ptr() for tensor in tensors.values()} == memory_of(layer)
    is_transposed = layout in ("nemo", "gpt_oss")
    assert tensors["mlp.experts.1.up_proj.weight"].is_contiguous() != is_transposed
    assert tensors["mlp.experts.1.down_proj.weight"].is_contiguous() != is_transposed


@needs_transformers
@pytest.mark.parametrize("name", ["qwen3_moe", "qwen3_vl_moe", "deepseek_v3"])
def test_names_and_shapes_of_a_reference_are_restored(name, tmp_path):
    write_checkpoint(build_model(name), tmp_path)
    model = type(build_model(name)).from_pretrained(tmp_path)
    tensors = dict(amc.published_tensors(model, reference=tmp_path))
    assert_same(tensors, tensors_of(tmp_path))
    assert {t.untyped_storage().data_ptr() for n, t in tensors.items() if ".experts." in n} <= memory_of(model)


@needs_transformers
def test_dtype_casts_as_a_save_does(tmp_path):
    model = build_model("deepseek_v3")
    amc.save_checkpoint(model, tmp_path, dtype=torch.float16)
    tensors = dict(amc.published_tensors(model, dtype=torch.float16))
    assert_same(tensors, tensors_of(tmp_path))
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16, torch.float32}


@needs_transformers
def test_contiguous_copies_only_strided_views():
    layer = layer_of_experts("nemo")
    rules = amc.get_checkpoint_conversion_mapping("qwen3_moe")
    views = dict(amc.published_tensors(layer, rules=rules, layout="nemo"))
    tensors = dict(amc.published_tensors(layer, rules=rules, layout="nemo", contiguous=True))
    for name, view in views.items():
        assert_bytes_equal(tensors[name], view)
        assert tensors[name].is_contiguous()
        assert (tensors[name].data_ptr() == view.data_ptr()) == view.is_contiguous()


def test_names_are_kept_without_rules():
    model = nn.Linear(3, 2)
    tensors = dict(amc.published_tensors(model, rules=[]))
    assert [(name, tensor.data_ptr()) for name, tensor in tensors.items()] == [
        ("weight", model.weight.data_ptr()),
        ("bias", model.bias.data_ptr()),
    ]


def test_pass_reads_the_values_of_its_time():
    model = nn.Linear(3, 2)
    pairs = amc.published_tensors(model, rules=[])
    model.weight.data = address_valued((2, 3), torch.float32)
    assert_bytes_equal(dict(pairs)["weight"], address_valued((2, 3), torch.float32))


@pytest.mark.parametrize("change", ["dtype", "shape", "name"])
def test_model_that_changes_before_the_pass_is_named(change):
    model = nn.Linear(3, 2)
    pairs = amc.published_tensors(model, rules=[])
    if change == "dtype":
        model.weight.data = model.weight.data.double()
    elif change == "shape":
        model.weight = nn.Parameter(torch.ones(2, 4))
    else:
        model.other = nn.Parameter(torch.ones(1))
    with pytest.raises(ConversionError, match=r"the model was changed after(.|\n)*(weight|other): torch"):
        next(pairs)


@pytest.mark.parametrize(
    ("module", "text"),
    [(nn.Linear(3, 2, device="meta"), "has no data"), ({"a": torch.ones(1)}, "not a model")],
    ids=["meta", "state dict"],
)
def test_what_cannot_be_saved_is_refused_at_once(module, text):
    with pytest.raises(UnsupportedError, match=text):
        amc.published_tensors(module, rules=[])


@needs_transformers
def test_experts_of_one_rank_are_refused():
    model = copy.deepcopy(build_model("qwen3_moe"))
    experts = next(module for path, module in model.named_modules() if path.endswith("mlp.experts"))
    experts.down_proj = nn.Parameter(experts.down_proj.data[::2])
    with pytest.raises(CoverageError, match=r"down_proj does not hold all experts"):
        amc.published_tensors(model)


@needs_transformers
def test_tied_weights_come_once():
    model = build_model("qwen2_moe-tied")
    names = [name for name, _ in amc.published_tensors(model)]
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names
