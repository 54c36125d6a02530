"""Tests that every public function reports each tensor of a checkpoint as used, carried or left out.

The checkpoints are those of the zoo with additional tensors of published ones: layers for multi-token prediction with
their own experts, and a draft head.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file

pytest.importorskip("transformers", reason="needs models of transformers")

import transformers

import automodel_conv as amc
from automodel_conv.integrations.dcp import HuggingFaceReader, HuggingFaceWriter
from automodel_conv.planning.layouts import holds_grouped_experts
from automodel_conv.testing import POISON, address_valued
from automodel_conv.upstream.models import expert_layouts
from tests.comparing import assert_same, numel_of, tensors_of
from tests.model_zoo import EXCLUDED, build_model, write_checkpoint, zoo_names

pytestmark = [pytest.mark.sweep, pytest.mark.filterwarnings("ignore")]

ALWAYS = {"deepseek_v3", "qwen3_vl_moe", "gpt_oss", "nemotron_h"}


def extra_tensors():
    """Return tensors that no model has a place for; experts of a prediction layer are stored one by one."""
    extra = {"mtp.fc.weight": address_valued((16, 32), torch.bfloat16, 1)}
    for expert in range(2):
        for number, part in enumerate(("gate_proj", "up_proj", "down_proj")):
            name = f"mtp.layers.0.mlp.experts.{expert}.{part}.weight"
            extra[name] = address_valued((8, 16), torch.bfloat16, 3 * expert + number)
    extra["draft_head.d2t"] = torch.arange(7)
    extra["draft_head.fc.weight"] = address_valued((4, 4), torch.float16, 5)
    return extra


def add(directory: Path, extra):
    """Add tensors in a separate file, which the index names."""
    index = directory / "model.safetensors.index.json"
    weight_map = dict.fromkeys(tensors_of(directory), "model.safetensors")
    text = json.loads(index.read_text()) if index.exists() else {"metadata": {}, "weight_map": weight_map}
    save_file(extra, directory / "extra.safetensors", metadata={"format": "pt"})
    text["weight_map"] |= dict.fromkeys(extra, "extra.safetensors")
    index.write_text(json.dumps(text))


class Case:
    """A model, its published checkpoint, and the additional tensors in it."""

    def __init__(self, name: str, directory: Path):
        self.model = build_model(name)
        self.directory = directory
        write_checkpoint(self.model, directory)
        self.plain = tensors_of(directory)
        self.extra = extra_tensors()
        add(directory, self.extra)

    def poisoned(self):
        model = copy.deepcopy(self.model)
        for tensor in model.state_dict().values():
            tensor.reshape(-1).view(torch.uint8).fill_(POISON)
        return model

    def extra_in(self, directory):
        """Return the additional tensors in a directory."""
        return {name: tensor for name, tensor in tensors_of(directory).items() if name in self.extra}


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(name, marks=[] if name in ALWAYS else pytest.mark.long)
        for name in zoo_names()
        if name not in EXCLUDED
    ],
)
def case(request, tmp_path_factory):
    return Case(request.param, tmp_path_factory.mktemp("published"))


def assert_names(names, expected):
    assert sorted(names) == sorted(expected)


def test_loads_name_tensors_without_a_parameter(case):
    loaded = amc.load_state_dict(case.directory, case.model, strict=False)
    assert_names(loaded.report.left_out, case.extra)
    assert loaded.report.carried == ()
    model = case.poisoned()
    report = amc.load_model(model, case.directory, strict=False)
    assert_names(report.left_out, case.extra)
    assert_same(model.state_dict(), dict(case.model.state_dict()))


def test_hook_names_tensors_without_a_parameter(case):
    with amc.accelerate_transformers() as acceleration:
        type(case.model).from_pretrained(case.directory, dtype=torch.bfloat16)
    assert_names(acceleration.loads[-1].left_out, case.extra)


def test_conversions_carry_tensors_without_a_parameter_both_ways(case, tmp_path):
    layouts = [None, "nemo"] if any(expert_layouts(case.model).values()) else [None]
    for layout in layouts:
        there, back = tmp_path / f"to {layout}", tmp_path / f"from {layout}"
        report = amc.convert_checkpoint(case.directory, there, layout=layout)
        assert_names(report.carried, case.extra)
        assert report.left_out == ()
        assert_same(case.extra_in(there), case.extra)
        assert amc.load_state_dict(there, case.model, strict=False).report.missing_keys == ()
        amc.verify_checkpoint(case.directory, there, layout=layout)
        report = amc.convert_checkpoint(there, back, layout="per_expert")
        assert_names(report.carried, case.extra)
        assert report.left_out == ()
        case.model.save_pretrained(tmp_path / f"saved {layout}")
        assert_same(tensors_of(back), tensors_of(tmp_path / f"saved {layout}") | case.extra)


def test_saves_carry_tensors_of_the_source(case, tmp_path):
    report = amc.save_checkpoint(case.model, tmp_path / "saved", carry=case.directory)
    assert_names(report.carried, case.extra)
    case.model.save_pretrained(tmp_path / "upstream")
    assert_same(tensors_of(tmp_path / "saved"), tensors_of(tmp_path / "upstream") | case.extra)
    ignored = set(case.model.state_dict()) & set(case.model._keys_to_ignore_on_save or ())
    assert_names(report.left_out, ignored)


def test_saves_and_reverts_like_a_reference_name_unwritten_tensors(case, tmp_path):
    if numel_of(case.plain) > numel_of(case.model.state_dict()):
        with pytest.raises(amc.CoverageError, match="such as padding"):
            amc.save_checkpoint(case.model, tmp_path / "saved", reference=case.directory)
        return
    report = amc.save_checkpoint(case.model, tmp_path / "saved", reference=case.directory)
    saved = tensors_of(tmp_path / "saved")
    ignored = set(case.model.state_dict()) & set(case.model._keys_to_ignore_on_save or ())
    assert_names(report.left_out, (case.plain.keys() | case.extra.keys() | ignored) - saved.keys())
    assert report.carried == ()
    both = amc.save_checkpoint(case.model, tmp_path / "both", reference=case.directory, carry=case.directory)
    assert_same(tensors_of(tmp_path / "both"), saved | case.extra)
    assert_names(both.left_out, set(report.left_out) - case.extra.keys())
    reverted = amc.revert_state_dict(case.model.state_dict(), case.model, reference=case.directory)
    assert_names(reverted.report.left_out, (case.plain.keys() | case.extra.keys()) - reverted.keys())


def test_in_memory_nothing_is_left_out(case):
    report = amc.convert_state_dict(case.plain, case.model).report
    assert report.left_out == ()
    assert report.carried == ()
    assert amc.revert_state_dict(case.model.state_dict(), case.model).report.left_out == ()


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return Case("mixtral", tmp_path_factory.mktemp("published"))


def test_dcp_names_tensors_that_it_leaves_out(one, tmp_path):
    model = copy.deepcopy(one.model)
    model._keys_to_ignore_on_load_unexpected = {r"^mtp\.", r"^draft_head\."}
    reader = HuggingFaceReader(one.directory, model)
    dcp.load(model.state_dict(), storage_reader=reader)
    assert_names(reader.left_out, one.extra)
    writer = HuggingFaceWriter(tmp_path / "saved", one.model, reference=one.directory)
    dcp.save(one.model.state_dict(), storage_writer=writer)
    assert_names(writer.report.left_out, one.extra)
    assert writer.report.carried == ()
    assert_same(tensors_of(tmp_path / "saved"), one.plain)


def test_dropped_tensors_are_named_and_not_written(one, tmp_path):
    report = amc.convert_checkpoint(one.directory, tmp_path / "made", layout="nemo", drop=["mtp.*", "*.d2t"])
    dropped = {name for name in one.extra if name.startswith("mtp.")} | {"draft_head.d2t"}
    assert_names(report.left_out, dropped)
    assert report.carried == ("draft_head.fc.weight",)
    assert dropped.isdisjoint(tensors_of(tmp_path / "made"))
    amc.verify_checkpoint(one.directory, tmp_path / "made", drop=["mtp.*", "*.d2t"])
    with pytest.raises(amc.VerificationError, match=r"mtp\.fc\.weight: missing"):
        amc.verify_checkpoint(one.directory, tmp_path / "made")


def test_one_pattern_needs_no_list(one, tmp_path):
    report = amc.convert_checkpoint(one.directory, tmp_path / "made", drop="mtp.*")
    assert_names(report.left_out, {name for name in one.extra if name.startswith("mtp.")})
    amc.verify_checkpoint(one.directory, tmp_path / "made", drop="mtp.*")


@pytest.mark.parametrize("pattern", ["mtp", "layers.*", ""])
def test_a_pattern_that_matches_no_name_is_an_error(one, tmp_path, pattern):
    with pytest.raises(amc.UnsupportedError, match="no tensor to drop"):
        amc.convert_checkpoint(one.directory, tmp_path / "made", drop=[pattern])
    assert not (tmp_path / "made").exists()


def test_dropping_a_tensor_of_the_model_is_an_error(one, tmp_path):
    with pytest.raises(amc.NameProblems, match="lm_head") as caught:
        amc.convert_checkpoint(one.directory, tmp_path / "made", drop=["lm_head.*"])
    assert caught.value.missing == ("lm_head.weight",)
    with pytest.raises(amc.NameProblems, match="parts of a merged parameter"):
        amc.convert_checkpoint(one.directory, tmp_path / "made", drop=["*.experts.1.w1.weight"])


def test_carried_tensor_with_a_duplicate_name_is_an_error(one, tmp_path):
    source = tmp_path / "source"
    write_checkpoint(one.model, source)
    twice = "model.layers.0.mlp.experts.gate_and_up_projs"
    add(source, {twice: torch.ones(3, 4, 5)})
    with pytest.raises(amc.NameProblems, match="gate_and_up_projs"):
        amc.convert_checkpoint(source, tmp_path / "made", layout="nemo", source_layout="per_expert")


def test_a_carried_tensor_keeps_its_dtype_when_others_change(one, tmp_path):
    amc.convert_checkpoint(one.directory, tmp_path / "made", layout="vllm", dtype=torch.float32)
    assert_same(one.extra_in(tmp_path / "made"), one.extra)
    amc.save_checkpoint(one.model, tmp_path / "saved", carry=one.directory, dtype=torch.float16)
    assert_same(one.extra_in(tmp_path / "saved"), one.extra)


def test_state_dicts_carry_too(one, tmp_path):
    rules = amc.get_model_conversion_mapping(one.model)
    report = amc.save_checkpoint(one.model.state_dict(), tmp_path / "saved", rules=rules, carry=one.directory)
    assert_names(report.carried, one.extra)
    assert_same(tensors_of(tmp_path / "saved"), one.plain | one.extra)
    nemo = amc.load_state_dict(one.directory, one.model, layout="nemo", strict=False)
    report = amc.save_checkpoint(nemo, tmp_path / "nemo", rules=rules, layout="nemo", carry=one.directory)
    assert_same(tensors_of(tmp_path / "nemo"), one.plain | one.extra)
    report = amc.save_checkpoint(one.plain, tmp_path / "as it is", rules=[], carry=one.directory)
    assert_same(tensors_of(tmp_path / "as it is"), one.plain | one.extra)


GROUPED = {"nemo": ("gate_and_up_projs", "down_projs"), "vllm": ("w13_weight", "w2_weight")}


@pytest.mark.parametrize("layout", ["transformers", "nemo", "gpt_oss", "vllm"])
@pytest.mark.parametrize("names", GROUPED.values(), ids=GROUPED)
def test_grouped_experts_of_a_prediction_layer_are_carried_with_any_layout(one, tmp_path, layout, names):
    source, converted, back = tmp_path / "source", tmp_path / "made", tmp_path / "back"
    write_checkpoint(one.model, source)
    extra = {
        f"mtp.layers.0.mlp.experts.{name}": torch.arange(32.0).view(2, 4, 4) + row for row, name in enumerate(names)
    }
    add(source, extra)
    report = amc.convert_checkpoint(source, converted, layout=layout)
    assert_names(report.carried, extra)
    for directory in (source, converted):
        loaded = amc.load_state_dict(directory, strict=False)
        assert_names(loaded.report.left_out, extra)
        assert_same(loaded, dict(one.model.state_dict()))
    amc.convert_checkpoint(converted, back, layout="per_expert")
    assert_same(tensors_of(back), one.plain | extra)
    amc.save_checkpoint(one.model, tmp_path / "saved", carry=source)
    assert_same(tensors_of(tmp_path / "saved"), one.plain | extra)
    with pytest.raises(amc.NameProblems) as caught:
        amc.load_state_dict(source)
    assert_names(caught.value.unexpected, extra)
    with pytest.raises(amc.NameProblems) as caught:
        amc.convert_checkpoint(source, tmp_path / "less", layout=layout, drop=["lm_head.weight"])
    assert caught.value.missing == ("lm_head.weight",)


def test_experts_are_not_carried_next_to_their_grouped_form(one, tmp_path):
    nemo = amc.load_state_dict(one.directory, one.model, layout="nemo", strict=False)
    for options in ({"layout": "nemo"}, {"rules": []}):
        with pytest.raises(amc.UnsupportedError, match=r"(?s)other experts.*pass the rules=") as caught:
            amc.save_checkpoint(nemo, tmp_path / "saved", carry=one.directory, **options)
        assert "block_sparse_moe.experts.0.w1.weight" in str(caught.value)
    with pytest.raises(amc.UnsupportedError, match="other experts"):
        amc.save_checkpoint(build_model("qwen3_moe"), tmp_path / "saved", carry=one.directory)
    assert not (tmp_path / "saved").exists()
    amc.convert_checkpoint(one.directory, tmp_path / "nemo", layout="nemo")
    amc.save_checkpoint(nemo, tmp_path / "saved", rules=[], carry=tmp_path / "nemo")
    assert_same(tensors_of(tmp_path / "saved"), tensors_of(tmp_path / "nemo"))


def test_file_of_only_prediction_layers_is_carried(one, tmp_path):
    save_file(one.extra, tmp_path / "mtp.safetensors")
    report = amc.save_checkpoint(one.model, tmp_path / "saved", carry=tmp_path / "mtp.safetensors")
    assert_names(report.carried, one.extra)
    assert_same(tensors_of(tmp_path / "saved"), one.plain | one.extra)


def test_carrying_from_a_converted_checkpoint(one, tmp_path):
    amc.convert_checkpoint(one.directory, tmp_path / "nemo", layout="nemo")
    report = amc.save_checkpoint(one.model, tmp_path / "saved", carry=tmp_path / "nemo")
    assert_names(report.carried, one.extra)
    assert_same(tensors_of(tmp_path / "saved"), one.plain | one.extra)


@pytest.mark.parametrize("named", [True, False], ids=["named elsewhere", "named nowhere"])
def test_unindexed_tensor_is_left_out_and_named(one, tmp_path, named):
    source = tmp_path / "source"
    write_checkpoint(one.model, source)
    index = source / "model.safetensors.index.json"
    text = json.loads(index.read_text())
    stray = "lm_head.weight" if named else "model.layers.0.mlp.experts.9.w1.weight"
    save_file({"kept": torch.ones(2), stray: torch.ones(3)}, source / "more.safetensors")
    text["weight_map"]["kept"] = "more.safetensors"
    index.write_text(json.dumps(text))
    left_out = [] if named else [stray]
    loaded = amc.load_state_dict(source, one.model, strict=False)
    assert loaded.report.unindexed == ((stray, "more.safetensors"),)
    assert_names(loaded.report.left_out, ["kept", *left_out])
    assert_same(loaded, dict(one.model.state_dict()))
    report = amc.convert_checkpoint(source, tmp_path / "made", layout="nemo")
    assert report.unindexed == ((stray, "more.safetensors"),)
    assert report.carried == ("kept",)
    assert_names(report.left_out, left_out)
    report = amc.save_checkpoint(one.model, tmp_path / "saved", carry=source, reference=source)
    assert report.carried == ("kept",)
    assert set(report.left_out) == set(left_out)
    assert_same(tensors_of(tmp_path / "saved"), one.plain | {"kept": torch.ones(2)})


def deepseek(directory, layers, prediction_layers, config_changes):
    """Write a checkpoint of DeepSeek-V3's architecture; return the tensors of its prediction layers."""
    sizes = dict(hidden_size=32, intermediate_size=48, moe_intermediate_size=16, n_routed_experts=4)
    heads = dict(num_attention_heads=4, num_key_value_heads=4, q_lora_rank=16, kv_lora_rank=16)
    heads |= dict(qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8, n_group=1, topk_group=1, num_experts_per_tok=2)
    config = transformers.DeepseekV3Config(
        vocab_size=64, num_hidden_layers=layers, first_k_dense_replace=0, pad_token_id=0, **sizes, **heads
    )
    model = transformers.DeepseekV3ForCausalLM(config)
    model.save_pretrained(directory)
    raw = json.loads((directory / "config.json").read_text())
    raw.pop("num_nextn_predict_layers", None)
    raw.pop("num_mtp_layers", None)
    (directory / "config.json").write_text(json.dumps(raw | config_changes))
    last = f"model.layers.{layers - 1}."
    extra = {}
    for number in range(layers, layers + prediction_layers):
        like = {n: t for n, t in tensors_of(directory).items() if n.startswith(last)}
        extra |= {n.replace(last, f"model.layers.{number}."): t + 1 for n, t in like.items()}
        extra[f"model.layers.{number}.eh_proj.weight"] = torch.ones(32, 64)
    add(directory, extra)
    return extra


PREDICTION_LAYERS = {"one": {"num_nextn_predict_layers": 1}, "two": {"num_nextn_predict_layers": 2}, "nothing": {}}


@pytest.mark.parametrize(("layers", "number", "config"), [(2, 1, "one"), (1, 2, "two"), (3, 1, "nothing")])
def test_prediction_layers_are_ignored_and_carried_at_any_depth(tmp_path, layers, number, config):
    source = tmp_path / "source"
    extra = deepseek(source, layers, number, PREDICTION_LAYERS[config])
    loaded = amc.load_state_dict(source)
    assert_names(loaded.report.left_out, extra)
    report = amc.convert_checkpoint(source, tmp_path / "nemo", layout="nemo")
    assert_names(report.carried, extra)
    assert not any(holds_grouped_experts(name) for name in report.carried)
    assert_names(amc.load_state_dict(tmp_path / "nemo").report.left_out, extra)
    amc.convert_checkpoint(tmp_path / "nemo", tmp_path / "back", layout="per_expert")
    assert_same(tensors_of(tmp_path / "back"), tensors_of(source))


def test_more_layers_than_in_the_config_are_unexpected(tmp_path):
    deepseek(tmp_path / "source", 2, 2, PREDICTION_LAYERS["one"])
    with pytest.raises(amc.NameProblems) as caught:
        amc.load_state_dict(tmp_path / "source")
    assert caught.value.unexpected
    assert all(name.startswith("model.layers.3.") for name in caught.value.unexpected)


@pytest.mark.parametrize("config_key", PREDICTION_LAYERS)
def test_layer_omitted_by_the_config_is_unexpected(tmp_path, config_key):
    """Check a layer at the place of a prediction layer that nothing distinguishes from the layers of the model."""
    source = tmp_path / "source"
    deepseek(source, 2, 0, PREDICTION_LAYERS[config_key])
    config = json.loads((source / "config.json").read_text()) | {"num_hidden_layers": 1}
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(amc.NameProblems) as caught:
        amc.load_state_dict(source)
    assert caught.value.unexpected
    assert all(name.startswith("model.layers.1.") for name in caught.value.unexpected)
