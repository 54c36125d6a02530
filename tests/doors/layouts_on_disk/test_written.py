"""What is written says its layout, and transformers loads no layout that is not its own."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors import safe_open
from typer.testing import CliRunner

pytest.importorskip("transformers", reason="the types, and what they are compared with, are transformers'")
import transformers
from transformers import AutoConfig

import automodel_conv as amc
from automodel_conv.cli.app import app
from automodel_conv.files.shards import LAYOUT_KEY
from tests.comparing import assert_same
from tests.doors.layouts_on_disk.support import GROUPED, SIZES, TYPES, own_of, weights_in


@pytest.mark.parametrize("max_shard_size", ["6KB", "5GB"])
@pytest.mark.parametrize("layout", [None, *GROUPED, "per_expert"])
@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss"])
def test_files_index_and_names_say_the_layout(published, tmp_path, model_type, layout, max_shard_size):
    source, _ = published(model_type)
    report = amc.convert_checkpoint(source, tmp_path / "made", layout=layout, max_shard_size=max_shard_size)
    says = layout or own_of(model_type)
    stem = "model" if says in (own_of(model_type), "per_expert") else says
    many = max_shard_size == "6KB"
    assert list(report.files) == weights_in(tmp_path / "made")
    assert all(name.startswith(f"{stem}-0" if many else f"{stem}.safetensors") for name in report.files)
    for name in report.files:
        with safe_open(tmp_path / "made" / name, "pt") as file:
            assert file.metadata() == {"format": "pt", LAYOUT_KEY: says}
    indices = [path.name for path in (tmp_path / "made").glob("*.index.json")]
    assert indices == ([f"{stem}.safetensors.index.json"] if many else [])
    if many:
        assert json.loads((tmp_path / "made" / indices[0]).read_text())["metadata"][LAYOUT_KEY] == says


@pytest.mark.parametrize("layout", GROUPED)
@pytest.mark.parametrize("model_type", TYPES)
def test_transformers_refuses_a_directory_in_a_layout_that_it_does_not_load(published, tmp_path, model_type, layout):
    source, tensors = published(model_type)
    for size in ("6KB", "5GB"):
        amc.convert_checkpoint(source, tmp_path / size, layout=layout, max_shard_size=size)
        model_class = getattr(transformers, AutoConfig.from_pretrained(tmp_path / size).architectures[0])
        if layout == own_of(model_type):
            assert_same(model_class.from_pretrained(tmp_path / size).state_dict(), tensors)
            continue
        with pytest.raises(OSError, match="no file named"):
            model_class.from_pretrained(tmp_path / size)
        with amc.accelerate_transformers(), pytest.raises(OSError, match="no file named"):
            model_class.from_pretrained(tmp_path / size)
        assert_same(amc.load_state_dict(tmp_path / size), tensors)


@pytest.mark.parametrize("layout", GROUPED)
def test_every_reader_finds_files_of_a_foreign_layout_and_knows_it(published, tmp_path, layout):
    import torch.distributed.checkpoint as dcp

    from automodel_conv.integrations.dcp import HuggingFaceReader

    source, tensors = published("qwen3_moe")
    made = tmp_path / "made"
    amc.convert_checkpoint(source, made, layout=layout, max_shard_size="6KB")
    assert_same(amc.load_state_dict(made), tensors)
    model = transformers.Qwen3MoeForCausalLM(AutoConfig.from_pretrained(made)).bfloat16()
    amc.load_model(model, made)
    assert_same(model.state_dict(), tensors)
    state = {name: torch.full_like(tensor, 7) for name, tensor in tensors.items()}
    dcp.load(state, storage_reader=HuggingFaceReader(made), no_dist=True)
    assert_same(state, tensors)
    assert amc.verify_checkpoint(source, made) > 0
    for command in (["plan", made], ["load", made], ["convert", made, tmp_path / "back"], ["verify", source, made]):
        result = CliRunner().invoke(app, [str(word) for word in command])
        assert result.exit_code == 0, result.output
    assert_same(amc.load_state_dict(tmp_path / "back"), tensors)


@pytest.mark.parametrize("layout", GROUPED)
def test_what_was_loaded_in_a_layout_is_saved_as_being_in_it(published, tmp_path, layout):
    source, tensors = published("qwen3_moe")
    loaded = amc.load_state_dict(source, layout=layout)
    amc.save_checkpoint(loaded, tmp_path / "made", rules=[])
    again = amc.load_state_dict(tmp_path / "made", rules=[])
    assert loaded.layout == again.layout == layout
    assert_same(again, loaded)
    assert weights_in(tmp_path / "made") == [f"{'model' if layout == 'transformers' else layout}.safetensors"]
    shutil.copy(source / "config.json", tmp_path / "made")
    assert_same(amc.load_state_dict(tmp_path / "made"), tensors)


@pytest.mark.parametrize("layout", GROUPED)
def test_a_conversion_that_keeps_names_keeps_what_the_files_say(published, tmp_path, layout):
    source, tensors = published("qwen3_moe")
    amc.convert_checkpoint(source, tmp_path / "made", layout=layout)
    amc.convert_checkpoint(tmp_path / "made", tmp_path / "again", rules=[], max_shard_size="6KB")
    assert_same(amc.load_state_dict(tmp_path / "again", rules=[]), amc.load_state_dict(tmp_path / "made", rules=[]))
    assert_same(amc.load_state_dict(tmp_path / "again"), tensors)
    assert weights_in(tmp_path / "again")[0].startswith("model-" if layout == "transformers" else f"{layout}-")


@pytest.mark.parametrize(
    ("model_type", "sizes"), [("nemotron_h", SIZES[2]), ("qwen3_moe", SIZES[1]), ("gpt_oss", SIZES[1])]
)
@pytest.mark.parametrize("layout", GROUPED)
def test_files_say_the_layout_that_a_named_one_was_brought_to(published, tmp_path, layout, model_type, sizes):
    source, tensors = published(model_type, sizes)
    amc.convert_checkpoint(source, tmp_path / "made", layout=layout)
    amc.convert_checkpoint(tmp_path / "made", tmp_path / "again", rules=[], source_layout=layout)
    assert amc.open_checkpoint(tmp_path / "again").layouts == ("transformers",)
    stem = "model" if own_of(model_type) == "transformers" else "transformers"
    assert weights_in(tmp_path / "again") == [f"{stem}.safetensors"]
    assert_same(amc.load_state_dict(tmp_path / "again"), tensors)
    assert amc.verify_checkpoint(tmp_path / "made", tmp_path / "again") > 0


@pytest.mark.parametrize("layout", [*GROUPED, "per_expert"])
def test_marked_files_of_one_layout_are_compared_without_a_config(published, tmp_path, layout):
    source, _ = published("qwen3_moe")
    amc.convert_checkpoint(source, tmp_path / "made", layout=layout)
    (tmp_path / "made" / "config.json").unlink()
    amc.convert_checkpoint(tmp_path / "made", tmp_path / "again", rules=[], max_shard_size="6KB")
    assert amc.verify_checkpoint(tmp_path / "made", tmp_path / "again") > 0


@pytest.mark.parametrize("layout", GROUPED)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_a_state_dict_of_experts_without_a_gate_is_saved_under_their_names(published, tmp_path, layout, sizes):
    source, tensors = published("nemotron_h", sizes)
    state = dict(amc.load_state_dict(source, layout=layout))
    amc.save_checkpoint(state, tmp_path / "made", layout=layout)
    shutil.copy(source / "config.json", tmp_path / "made")
    assert_same(amc.load_state_dict(tmp_path / "made"), tensors)


def test_a_reference_in_a_foreign_layout_is_restored_with_what_it_says(published, tmp_path):
    source, tensors = published("qwen3_moe")
    amc.convert_checkpoint(source, tmp_path / "made", layout="nemo", max_shard_size="6KB")
    stored = amc.load_state_dict(tmp_path / "made", rules=[])
    amc.save_checkpoint(stored, tmp_path / "again", reference=tmp_path / "made")
    assert weights_in(tmp_path / "again") == weights_in(tmp_path / "made")
    shutil.copy(source / "config.json", tmp_path / "again")
    assert_same(amc.load_state_dict(tmp_path / "again"), tensors)


@pytest.mark.parametrize("layout", GROUPED)
@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss"])
def test_a_model_is_saved_in_the_layout_of_its_reference(published, tmp_path, model_type, layout):
    source, tensors = published(model_type)
    amc.convert_checkpoint(source, tmp_path / "made", layout=layout, max_shard_size="6KB")
    model_class = getattr(transformers, AutoConfig.from_pretrained(source).architectures[0])
    model = model_class.from_pretrained(source)
    amc.save_checkpoint(model, tmp_path / "again", reference=tmp_path / "made")
    expected = {path.name: path.read_bytes() for path in (tmp_path / "made").glob("*.safetensors")}
    assert {path.name: path.read_bytes() for path in (tmp_path / "again").glob("*.safetensors")} == expected
    assert_same(amc.load_state_dict(tmp_path / "again"), tensors)
    reverted = amc.revert_state_dict(model.state_dict(), model, reference=tmp_path / "made")
    assert_same(reverted, amc.load_state_dict(tmp_path / "made", rules=[]))


@pytest.mark.parametrize("layout", GROUPED)
def test_tensors_in_a_layout_are_saved_in_that_of_their_reference(published, tmp_path, layout):
    source, _ = published("qwen3_moe")
    amc.convert_checkpoint(source, tmp_path / "made", layout=layout)
    given = amc.load_state_dict(tmp_path / "made", rules=[])
    for other in GROUPED:
        amc.convert_checkpoint(source, tmp_path / other, layout=other)
        reverted = amc.revert_state_dict(given, layout=layout, reference=tmp_path / other)
        assert_same(reverted, amc.load_state_dict(tmp_path / other, rules=[]))


def test_what_transformers_would_write_has_no_mark(published, tmp_path):
    source, _ = published("gpt_oss")
    model = transformers.GptOssForCausalLM.from_pretrained(source)
    amc.save_checkpoint(model, tmp_path / "made")
    with safe_open(tmp_path / "made" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def as_module(tensors):
    """A module that is none of transformers, with parameters of these names."""
    root = torch.nn.Module()
    for name, tensor in tensors.items():
        *path, leaf = name.split(".")
        module = root
        for part in path:
            if part not in module._modules:
                module.add_module(part, torch.nn.Module())
            module = module._modules[part]
        module.register_parameter(leaf, torch.nn.Parameter(tensor.clone(), requires_grad=False))
    return root


@pytest.mark.parametrize("layout", GROUPED)
def test_files_of_a_module_that_was_laid_out_anew_say_it(published, tmp_path, layout):
    source, tensors = published("qwen3_moe")
    module = as_module(amc.load_state_dict(source, layout=layout))
    amc.save_checkpoint(module, tmp_path / "made", layout=layout)
    assert amc.open_checkpoint(tmp_path / "made").layouts == ("transformers",)
    shutil.copy(source / "config.json", tmp_path / "made")
    assert_same(amc.load_state_dict(tmp_path / "made"), tensors)


@pytest.mark.parametrize("layout", ["nemo", "vllm"])
def test_a_module_whose_experts_the_rules_do_not_take_apart_is_refused(published, tmp_path, layout):
    source, tensors = published("qwen3_moe")
    module = as_module(amc.load_state_dict(source, layout=layout))
    model = transformers.Qwen3MoeForCausalLM(AutoConfig.from_pretrained(source))
    rules = amc.get_model_conversion_mapping(model)
    with pytest.raises(amc.UnsupportedError, match=" layout="):
        amc.save_checkpoint(module, tmp_path / "made", rules=rules)
    assert not (tmp_path / "made").exists()
    amc.save_checkpoint(module, tmp_path / "made", rules=rules, layout=layout)
    shutil.copy(source / "config.json", tmp_path / "made")
    assert_same(amc.load_state_dict(tmp_path / "made"), tensors)
