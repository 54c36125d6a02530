"""Tests of stock rules, and of rule objects that are queried and run exactly as in transformers."""

import functools
import re
from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from tests.planning import oracles

pytest.importorskip("transformers", reason="rules are objects of transformers")

from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers import core_model_loading as core
from transformers.core_model_loading import (
    Chunk,
    Concatenate,
    MergeModulelist,
    Transpose,
    WeightConverter,
    WeightRenaming,
)

import automodel_conv as amc
from automodel_conv.planning.operations import NotLowerable, Operation
from automodel_conv.upstream.rules import RuleSet, natural_key
from tests.comparing import assert_same_in_order, contents
from tests.model_zoo import fill, small_config


class Config(SimpleNamespace):
    def get_text_config(self):
        return self


class AnyConfig(Config):
    """A config that has a value for every attribute."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return 4


def experts(operations=None):
    return WeightConverter(
        ["experts.*.w1.weight", "experts.*.w3.weight"],
        "experts.gate_up_proj",
        operations=operations or [MergeModulelist(dim=0), Concatenate(dim=1)],
    )


def operations_of(rule, config=None):
    return RuleSet([rule], SimpleNamespace(config=config)).operations(0)


def test_stock_operations_become_data():
    assert operations_of(experts()) == (
        Operation("MergeModulelist", (("dim", 0),)),
        Operation("Concatenate", (("dim", 1),)),
    )
    swap = WeightConverter("a", "b", operations=[Transpose(1, 2, check_dims=True)])
    assert operations_of(swap) == (Operation("Transpose", (("check_dims", True), ("dim0", 1), ("dim1", 2))),)
    assert str(operations_of(swap)[0]) == "Transpose(check_dims=True, dim0=1, dim1=2)"


def test_every_registered_rule_is_lowerable_given_a_config():
    converters = [r for rules in oracles.registry().values() for r in rules if hasattr(r, "operations")]
    assert len(converters) > 50
    for rule in converters:
        assert len(operations_of(rule, AnyConfig())) == len(rule.operations)
        rule_set = RuleSet([rule])
        assert rule_set.patterns(0) == (tuple(rule.source_patterns), tuple(rule.target_patterns))
        assert all(type(op).__name__ in rule_set.describe(0) for op in rule.operations)


def test_values_from_a_config_are_not_guessed():
    try:
        shards = Chunk(dim=0, num_shards_attribute="shards")
    except TypeError:
        pytest.skip("this transformers reads no number of shards from the config")
    rule = WeightConverter("a", "b.*", operations=[shards])
    with pytest.raises(NotLowerable, match="shards"):
        operations_of(rule)
    assert operations_of(rule, Config(shards=3)) == (Operation("Chunk", (("dim", 0), ("num_shards", 3))),)


class TwoTexts(Config):
    def get_text_config(self):
        raise ValueError("multiple text configs")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (Config(), "no attribute 'shards'"),
        (Config(shards=None), "has None"),
        (Config(shards=[2, 2]), r"has \[2, 2\]"),
        (Config(shards=0), "has 0"),
        (TwoTexts(shards=3), "multiple text configs"),
        (SimpleNamespace(shards=3), "get_text_config"),
    ],
)
def test_missing_config_value_is_the_reason(config, message):
    try:
        shards = Chunk(dim=0, num_shards_attribute="shards")
    except TypeError:
        pytest.skip("this transformers reads no number of shards from the config")
    with pytest.raises(NotLowerable, match=message):
        operations_of(WeightConverter("a", "b.*", operations=[shards]), config)


class OfEachLayer(Config):
    @property
    def num_attention_heads(self):
        raise RuntimeError("a per-layer attribute")


@pytest.mark.parametrize(
    "config",
    [Config(num_attention_heads=None), Config(num_attention_heads=[4, 4]), OfEachLayer()],
    ids=["none", "list", "layers"],
)
def test_heads_that_are_not_one_number_are_the_reason(config):
    try:
        rope = core.PermuteForRope(permute_layer_names=["q_proj"])
    except TypeError:
        pytest.skip("PermuteForRope of this transformers does not run")
    with pytest.raises(NotLowerable, match="num_attention_heads"):
        operations_of(WeightConverter("a", "b", operations=[rope]), config)


class Louder(MergeModulelist):
    def convert(self, *args, **kwargs):
        return {key: value * 2 for key, value in super().convert(*args, **kwargs).items()}


class Quiet(MergeModulelist):
    pass


class OwnConverter(WeightConverter):
    pass


def test_subclass_of_an_operation_is_not_stock():
    for operation in (Louder(dim=0), Quiet(dim=0)):
        with pytest.raises(NotLowerable, match=type(operation).__name__):
            operations_of(experts([operation, Concatenate(dim=1)]))


def test_subclass_of_the_converter_is_not_stock():
    rule = OwnConverter("a.*.b", "c", operations=[MergeModulelist(dim=0)])
    with pytest.raises(NotLowerable, match="OwnConverter"):
        operations_of(rule)


def test_patched_convert_is_not_stock(monkeypatch):
    def convert(self, input_dict, source_patterns, target_patterns, **kwargs):
        raise AssertionError("never called here")

    with monkeypatch.context() as patch:
        patch.setattr(MergeModulelist, "convert", convert)
        with pytest.raises(NotLowerable, match="MergeModulelist"):
            operations_of(experts())
    assert operations_of(experts())
    monkeypatch.setattr(WeightConverter, "convert", convert)
    with pytest.raises(NotLowerable, match="WeightConverter"):
        operations_of(experts())


def test_patched_convert_that_wraps_the_stock_one_is_not_stock(monkeypatch):
    stock = MergeModulelist.convert

    @functools.wraps(stock)
    def doubled(self, *args, **kwargs):
        return {key: value * 2 for key, value in stock(self, *args, **kwargs).items()}

    monkeypatch.setattr(MergeModulelist, "convert", doubled)
    with pytest.raises(NotLowerable, match="MergeModulelist"):
        operations_of(experts())


def test_convert_set_on_one_operation_is_not_stock():
    operation = MergeModulelist(dim=0)
    operation.convert = lambda *args, **kwargs: {}
    with pytest.raises(NotLowerable, match="MergeModulelist"):
        operations_of(experts([operation, Concatenate(dim=1)]))


def test_rule_with_a_quantization_is_not_stock():
    rule = experts()
    rule.quantization_operation = MergeModulelist(dim=0)
    with pytest.raises(NotLowerable, match="quantization"):
        operations_of(rule)


def test_without_rules_names_are_unchanged():
    rules = RuleSet(None)
    assert len(rules) == 0
    assert rules.rename("a.0.b") == ("a.0.b", -1, "a.0.b")
    assert not rules.looks_at_digits("a.0.b")
    assert rules.with_prefix("a", {"model.a": 1}) == "a"


def test_renamings_chain_and_one_converter_gets_the_result():
    rules = RuleSet([WeightRenaming("old", "mid"), experts(), WeightRenaming("mid", "experts")])
    assert rules.rename("old.3.w3.weight") == ("experts.gate_up_proj", 0, "experts.*.w3.weight")
    assert rules.rename("old.norm") == ("experts.norm", -1, "old.norm")


def test_reverse_converts_before_it_renames():
    rules = RuleSet([WeightRenaming("block", "layer"), experts()], reverse=True)
    name, row, pattern = rules.rename("layer.experts.gate_up_proj")
    assert (name, row, pattern) == ("layer.experts.*.w1.weight", 0, "experts.gate_up_proj")
    assert rules.rename_part("layer.experts.3.w1.weight") == "block.experts.3.w1.weight"
    assert rules.rename("layer.norm") == ("block.norm", -1, "layer.norm")


def test_plain_rules_of_the_registry_do_not_read_digits():
    rules = RuleSet(oracles.registry()["mixtral"])
    for name in ("model.layers.0.block_sparse_moe.experts.7.w1.weight", "model.layers.0.mlp.gate.weight"):
        assert not rules.looks_at_digits(name)
    assert RuleSet([WeightRenaming(r"layers\.0\.", "first.")]).looks_at_digits("layers.9.w")


def test_natural_order_compares_numbers_as_numbers():
    names = ["a.10", "a.9", "a_10", "a_9", "a.b"]
    assert sorted(names, key=natural_key) == sorted(names, key=core.dot_natural_key)
    assert sorted(["a.10", "a.9"], key=natural_key) == ["a.9", "a.10"]


def test_convert_of_transformers_can_run_again_and_changes_no_rule():
    rule = experts([Louder(dim=0), Concatenate(dim=1)])
    rules = RuleSet([rule])
    slots = {"experts.*.w1.weight": [0, 1], "experts.*.w3.weight": [2, 3]}
    convert = rules.upstream(0, "m.experts.gate_up_proj", slots, {})
    tensors = {row: torch.arange(6.0).reshape(2, 3) + 10 * row for row in range(4)}
    before = deepcopy(rule.collected_tensors)
    for _ in range(2):
        converted = convert(tensors)
        assert list(converted) == ["m.experts.gate_up_proj"]
        both = [torch.stack([tensors[a], tensors[b]]) for a, b in ((0, 1), (2, 3))]
        assert torch.equal(converted["m.experts.gate_up_proj"], torch.cat(both, 1) * 2)
    assert rule.collected_tensors == before == {}


def in_pairs_of_layers(name):
    """Return the published name of a tensor of Dory, which stores attention and MLP as layers of their own."""
    layer = re.match(r"model\.layers\.(\d+)\.(self_attn|mlp|lambda_1|lambda_2)(.*)", name)
    if layer is None:
        return name.replace("model.embed_tokens.", "backbone.embeddings.").replace("model.", "backbone.")
    block = 2 * int(layer[1]) + (layer[2] in ("mlp", "lambda_2"))
    part = {"lambda_1": "attn_alpha", "lambda_2": "mlp_alpha"}.get(layer[2], "mixer")
    rest = layer[3].replace(".gate_proj.", ".g_proj.") if layer[2] == "self_attn" else layer[3]
    return f"backbone.layers.{block}.{part}{rest}"


@pytest.mark.skipif("dory" not in CONFIG_MAPPING, reason="this transformers has no dory")
def test_layers_that_are_stored_in_pairs_load_and_are_saved_as_by_transformers(tmp_path):
    config = small_config(CONFIG_MAPPING["dory"], num_hidden_layers=24, n_input_layers=4, n_output_layers=4)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    fill(model)
    (tmp_path / "published").mkdir()
    tensors = {in_pairs_of_layers(name): tensor for name, tensor in model.state_dict().items()}
    assert {"backbone.layers.22.mixer.q_proj.weight", "backbone.layers.23.mlp_alpha"} <= tensors.keys()
    save_file(tensors, tmp_path / "published" / "model.safetensors", metadata={"format": "pt"})
    config.architectures = [type(model).__name__]
    config.save_pretrained(tmp_path / "published")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "published")
    assert_same_in_order(stock.state_dict(), model.state_dict())
    assert_same_in_order(amc.load_state_dict(tmp_path / "published"), model.state_dict())
    stock.save_pretrained(tmp_path / "upstream")
    amc.save_checkpoint(stock, tmp_path / "ours")
    assert contents(tmp_path / "ours") == contents(tmp_path / "upstream")
