"""Tests that written files record their layout, and that transformers refuses layouts that it cannot load."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors import safe_open
from typer.testing import CliRunner

pytest.importorskip("transformers", reason="needs transformers")
import transformers
from transformers import AutoConfig

import automodel_conv as amc
from automodel_conv.cli.app import app
from automodel_conv.files.shards import LAYOUT_KEY
from tests.comparing import assert_same
from tests.doors.layouts_on_disk.support import GROUPED, SIZES, TYPES, own_layout_of, weights_in


@pytest.mark.parametrize("max_shard_size", ["6KB", "5GB"])
@pytest.mark.parametrize("layout", [None, *GROUPED, "per_expert"])
@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss"])
def test_files_index_and_names_record_the_layout(published, tmp_path, model_type, layout, max_shard_size):
    source, _ = published(model_type)
    report = amc.convert_checkpoint(source, tmp_path / "out", layout=layout, max_shard_size=max_shard_size)
    says = layout or own_layout_of(model_type)
    stem = "model" if says in (own_layout_of(model_type), "per_expert") else says
    many = max_shard_size == "6KB"
    assert list(report.files) == weights_in(tmp_path / "out")
    assert all(name.startswith(f"{stem}-0" if many else f"{stem}.safetensors") for name in report.files)
    for name in report.files:
        with safe_open(tmp_path / "out" / name, "pt") as file:
            assert file.metadata() == {"format": "pt", LAYOUT_KEY: says}
    indices = [path.name for path in (tmp_path / "out").glob("*.index.json")]
    assert indices == ([f"{stem}.safetensors.index.json"] if many else [])
    if many:
        assert json.loads((tmp_path / "out" / indices[0]).read_text())["metadata"][LAYOUT_KEY] == says


@pytest.mark.parametrize("layout", GROUPED)
@pytest.mark.parametrize("model_type", TYPES)
def test_transformers_refuses_a_directory_in_a_foreign_layout(published, tmp_path, model_type, layout):
    source, tensors = published(model_type)
    for size in ("6KB", "5GB"):
        amc.convert_checkpoint(source, tmp_path / size, layout=layout, max_shard_size=size)
        model_class = getattr(transformers, AutoConfig.from_pretrained(tmp_path / size).architectures[0])
        if layout == own_layout_of(model_type):
            assert_same(model_class.from_pretrained(tmp_path / size).state_dict(), tensors)
            continue
        with pytest.raises(OSError, match="no file named"):
            model_class.from_pretrained(tmp_path / size)
        with amc.accelerate_transformers(), pytest.raises(OSError, match="no file named"):
            model_class.from_pretrained(tmp_path / size)
        assert_same(amc.load_state_dict(tmp_path / size), tensors)


@pytest.mark.parametrize("layout", GROUPED)
def test_every_reader_detects_files_of_a_foreign_layout(published, tmp_path, layout):
    import torch.distributed.checkpoint as dcp

    from automodel_conv.integrations.dcp import HuggingFaceReader

    source, tensors = published("qwen3_moe")
    out = tmp_path / "out"
    amc.convert_checkpoint(source, out, layout=layout, max_shard_size="6KB")
    assert_same(amc.load_state_dict(out), tensors)
    model = transformers.Qwen3MoeForCausalLM(AutoConfig.from_pretrained(out)).bfloat16()
    amc.load_model(model, out)
    assert_same(model.state_dict(), tensors)
    state = {name: torch.full_like(tensor, 7) for name, tensor in tensors.items()}
    dcp.load(state, storage_reader=HuggingFaceReader(out), no_dist=True)
    assert_same(state, tensors)
    assert amc.verify_checkpoint(source, out) > 0
    for command in (
        ["plan", out],
        ["load", out],
        ["convert", out, tmp_path / "back"],
        ["verify", source, out],
    ):
        result = CliRunner().invoke(app, [str(word) for word in command])
        assert result.exit_code == 0, result.output
    assert_same(amc.load_state_dict(tmp_path / "back"), tensors)


@pytest.mark.parametrize("layout", GROUPED)
def test_tensors_loaded_in_a_layout_are_saved_with_its_mark(published, tmp_path, layout):
    source, tensors = published("qwen3_moe")
    loaded = amc.load_state_dict(source, layout=layout)
    amc.save_checkpoint(loaded, tmp_path / "out", rules=[])
    again = amc.load_state_dict(tmp_path / "out", rules=[])
    assert loaded.layout == again.layout == layout
    assert_same(again, loaded)
    assert weights_in(tmp_path / "out") == [f"{'model' if layout == 'transformers' else layout}.safetensors"]
    shutil.copy(source / "config.json", tmp_path / "out")
    assert_same(amc.load_state_dict(tmp_path / "out"), tensors)


@pytest.mark.parametrize("layout", GROUPED)
def test_conversion_without_rules_keeps_the_mark(published, tmp_path, layout):
    source, tensors = published("qwen3_moe")
    amc.convert_checkpoint(source, tmp_path / "out", layout=layout)
    amc.convert_checkpoint(tmp_path / "out", tmp_path / "again", rules=[], max_shard_size="6KB")
    assert_same(amc.load_state_dict(tmp_path / "again", rules=[]), amc.load_state_dict(tmp_path / "out", rules=[]))
    assert_same(amc.load_state_dict(tmp_path / "again"), tensors)
    assert weights_in(tmp_path / "again")[0].startswith("model-" if layout == "transformers" else f"{layout}-")


@pytest.mark.parametrize(
    ("model_type", "sizes"), [("nemotron_h", SIZES[2]), ("qwen3_moe", SIZES[1]), ("gpt_oss", SIZES[1])]
)
@pytest.mark.parametrize("layout", GROUPED)
def test_files_record_the_layout_of_a_conversion_with_source_layout(published, tmp_path, layout, model_type, sizes):
    source, tensors = published(model_type, sizes)
    amc.convert_checkpoint(source, tmp_path / "out", layout=layout)
    amc.convert_checkpoint(tmp_path / "out", tmp_path / "again", rules=[], source_layout=layout)
    assert amc.open_checkpoint(tmp_path / "again").layouts == ("transformers",)
    stem = "model" if own_layout_of(model_type) == "transformers" else "transformers"
    assert weights_in(tmp_path / "again") == [f"{stem}.safetensors"]
    assert_same(amc.load_state_dict(tmp_path / "again"), tensors)
    assert amc.verify_checkpoint(tmp_path / "out", tmp_path / "again") > 0


@pytest.mark.parametrize("layout", [*GROUPED, "per_expert"])
def test_marked_files_of_one_layout_are_compared_without_a_config(published, tmp_path, layout):
    source, _ = published("qwen3_moe")
    amc.convert_checkpoint(source, tmp_path / "out", layout=layout)
    (tmp_path / "out" / "config.json").unlink()
    amc.convert_checkpoint(tmp_path / "out", tmp_path / "again", rules=[], max_shard_size="6KB")
    assert amc.verify_checkpoint(tmp_path / "out", tmp_path / "again") > 0


@pytest.mark.parametrize("layout", GROUPED)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_a_state_dict_of_experts_without_a_gate_is_saved_under_their_names(published, tmp_path, layout, sizes):
    source, tensors = published("nemotron_h", sizes)
    state = dict(amc.load_state_dict(source, layout=layout))
    amc.save_checkpoint(state, tmp_path / "out", layout=layout)
    shutil.copy(source / "config.json", tmp_path / "out")
    assert_same(amc.load_state_dict(tmp_path / "out"), tensors)


def test_reference_in_a_foreign_layout_is_restored_with_its_mark(published, tmp_path):
    source, tensors = published("qwen3_moe")
    amc.convert_checkpoint(source, tmp_path / "out", layout="nemo", max_shard_size="6KB")
    stored = amc.load_state_dict(tmp_path / "out", rules=[])
    amc.save_checkpoint(stored, tmp_path / "again", reference=tmp_path / "out")
    assert weights_in(tmp_path / "again") == weights_in(tmp_path / "out")
    shutil.copy(source / "config.json", tmp_path / "again")
    assert_same(amc.load_state_dict(tmp_path / "again"), tensors)


@pytest.mark.parametrize("layout", GROUPED)
@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss"])
def test_a_model_is_saved_in_the_layout_of_its_reference(published, tmp_path, model_type, layout):
    source, tensors = published(model_type)
    amc.convert_checkpoint(source, tmp_path / "out", layout=layout, max_shard_size="6KB")
    model_class = getattr(transformers, AutoConfig.from_pretrained(source).architectures[0])
    model = model_class.from_pretrained(source)
    amc.save_checkpoint(model, tmp_path / "again", reference=tmp_path / "out")
    expected = {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.safetensors")}
    assert {path.name: path.read_bytes() for path in (tmp_path / "again").glob("*.safetensors")} == expected
    assert_same(amc.load_state_dict(tmp_path / "again"), tensors)
    reverted = amc.revert_state_dict(model.state_dict(), model, reference=tmp_path / "out")
    assert_same(reverted, amc.load_state_dict(tmp_path / "out", rules=[]))


@pytest.mark.parametrize("layout", GROUPED)
def test_tensors_in_a_layout_are_saved_in_that_of_their_reference(published, tmp_path, layout):
    source, _ = published("qwen3_moe")
    amc.convert_checkpoint(source, tmp_path / "out", layout=layout)
    given = amc.load_state_dict(tmp_path / "out", rules=[])
    for other in GROUPED:
        amc.convert_checkpoint(source, tmp_path / other, layout=other)
        reverted = amc.revert_state_dict(given, layout=layout, reference=tmp_path / other)
        assert_same(reverted, amc.load_state_dict(tmp_path / other, rules=[]))


def test_transformers_layout_has_no_mark(published, tmp_path):
    source, _ = published("gpt_oss")
    model = transformers.GptOssForCausalLM.from_pretrained(source)
    amc.save_checkpoint(model, tmp_path / "out")
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def as_module(tensors):
    """Return a module that is not of transformers, with parameters of these names."""
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
def test_files_of_a_module_with_layout_are_marked(published, tmp_path, layout):
    source, tensors = published("qwen3_moe")
    module = as_module(amc.load_state_dict(source, layout=layout))
    amc.save_checkpoint(module, tmp_path / "out", layout=layout)
    assert amc.open_checkpoint(tmp_path / "out").layouts == ("transformers",)
    shutil.copy(source / "config.json", tmp_path / "out")
    assert_same(amc.load_state_dict(tmp_path / "out"), tensors)


@pytest.mark.parametrize("layout", ["nemo", "vllm", "vllm_w31"])
def test_module_with_experts_that_rules_do_not_split_is_refused(published, tmp_path, layout):
    source, tensors = published("qwen3_moe")
    module = as_module(amc.load_state_dict(source, layout=layout))
    model = transformers.Qwen3MoeForCausalLM(AutoConfig.from_pretrained(source))
    rules = amc.get_model_conversion_mapping(model)
    with pytest.raises(amc.UnsupportedError, match=" layout="):
        amc.save_checkpoint(module, tmp_path / "out", rules=rules)
    assert not (tmp_path / "out").exists()
    amc.save_checkpoint(module, tmp_path / "out", rules=rules, layout=layout)
    shutil.copy(source / "config.json", tmp_path / "out")
    assert_same(amc.load_state_dict(tmp_path / "out"), tensors)
