"""Tests of saving a transformers model: the files of ``save_pretrained``, whatever the arguments."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import automodel_conv as amc
from automodel_conv.execution import tensor_slabs
from automodel_conv.testing import assert_bytes_equal
from tests.comparing import assert_same, contents, tensors_of, unpadded
from tests.doors.saving.support import NAMES
from tests.execution.simulated import SimulatedDevice

if NAMES:
    from tests.model_zoo import build_model, is_kept_in_float32, save_upstream

needs_transformers = pytest.mark.skipif(not NAMES, reason="transformers is not installed")


@needs_transformers
@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3", "nemotron_h", "gpt_oss", "llama", "qwen2_moe-tied"])
@pytest.mark.parametrize("options", [{}, {"max_shard_size": "30KB"}], ids=str)
def test_model_built_from_its_config_is_saved_as_by_transformers(name, options, tmp_path):
    model = build_model(name)
    amc.save_checkpoint(model, tmp_path / "ours", **options)  # first, because transformers changes the model's config
    save_upstream(model, tmp_path / "upstream", options.get("max_shard_size", "5GB"))
    assert contents(tmp_path / "ours") == contents(tmp_path / "upstream")


@needs_transformers
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("scratch_bytes", [1 << 16, None])
def test_threads_and_scratch_change_nothing(mixtral, tmp_path, threads, scratch_bytes):
    mixtral.save_pretrained(tmp_path / "upstream")
    report = amc.save_checkpoint(mixtral, tmp_path / "ours", threads=threads, scratch_bytes=scratch_bytes)
    assert contents(tmp_path / "ours") == contents(tmp_path / "upstream")
    assert report.peak_extra_bytes <= (scratch_bytes or 64 << 20)
    assert report.files == ("model.safetensors",)


@needs_transformers
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "qwen2_moe-tied"])
def test_tensors_on_a_device_are_saved_to_the_same_files(name, tmp_path, monkeypatch):
    model = build_model(name)
    amc.save_checkpoint(model, tmp_path / "host", max_shard_size="40KB")
    devices = []

    def device_of(device):
        devices.append(SimulatedDevice(seed=len(devices)))
        return devices[-1]

    monkeypatch.setattr(tensor_slabs, "transfer_device", device_of)
    report = amc.save_checkpoint(model, tmp_path / "device", max_shard_size="40KB", threads=2, scratch_bytes=1 << 18)
    assert contents(tmp_path / "device") == contents(tmp_path / "host")
    [device] = devices
    assert device.operations > 10
    assert len(report.files) > 2


@needs_transformers
def test_tied_weights_are_written_once(tmp_path):
    model = build_model("qwen2_moe-tied")
    names = model.state_dict().keys()
    amc.save_checkpoint(model, tmp_path)
    saved = tensors_of(tmp_path)
    assert "lm_head.weight" in names
    assert "model.embed_tokens.weight" in saved
    assert "lm_head.weight" not in saved
    again = type(model).from_pretrained(tmp_path)
    assert again.lm_head.weight.data_ptr() == again.model.embed_tokens.weight.data_ptr()
    assert_same(again.state_dict(), model.state_dict())


@needs_transformers
def test_formerly_tied_weights_are_both_written(tmp_path):
    model = build_model("qwen2_moe-tied")
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone() + 1)
    amc.save_checkpoint(model, tmp_path)
    saved = tensors_of(tmp_path)
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        assert_bytes_equal(saved[name], model.state_dict()[name])


@needs_transformers
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_dtype_casts_all_except_weights_kept_in_float32(tmp_path, dtype):
    model = build_model("deepseek_v3")
    amc.save_checkpoint(model, tmp_path / "own")
    amc.save_checkpoint(model, tmp_path / "cast", dtype=dtype)
    own, cast = tensors_of(tmp_path / "own"), tensors_of(tmp_path / "cast")
    kept = {name for name in own if is_kept_in_float32(model, name)}
    assert any(name.endswith("e_score_correction_bias") for name in kept)
    assert_same(cast, {n: t.to(torch.float32 if n in kept else dtype) for n, t in own.items()})
    config = json.loads((tmp_path / "cast" / "config.json").read_text())
    assert config["dtype"] == str(dtype).removeprefix("torch.")
    assert model.config.dtype == torch.bfloat16
    again = type(model).from_pretrained(tmp_path / "cast")
    assert {t.dtype for n, t in again.state_dict().items() if n not in kept} == {dtype}


@needs_transformers
def test_the_model_is_unchanged(mixtral, tmp_path):
    config, tensors = mixtral.config.to_dict(), {n: t.clone() for n, t in mixtral.state_dict().items()}
    amc.save_checkpoint(mixtral, tmp_path, dtype=torch.float32)
    assert mixtral.config.to_dict() == config
    assert_same(mixtral.state_dict(), tensors)


@needs_transformers
def test_reference_in_the_layout_of_the_model_is_reproduced(mixtral, tmp_path):
    mixtral.save_pretrained(tmp_path / "grouped", save_original_format=False, max_shard_size="60KB")
    amc.save_checkpoint(mixtral, tmp_path / "ours", reference=tmp_path / "grouped")
    assert_same(tensors_of(tmp_path / "ours"), tensors_of(tmp_path / "grouped"))
    for file in (tmp_path / "grouped").glob("*.safetensors"):
        assert unpadded(tmp_path / "ours" / file.name) == unpadded(file)


@needs_transformers
def test_files_are_written_to_a_directory_with_other_files(mixtral, tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "config.json").write_text("an old one")
    amc.save_checkpoint(mixtral, tmp_path)
    assert (tmp_path / "tokenizer.json").read_text() == "{}"
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "mixtral"
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
    ]


@needs_transformers
@pytest.mark.parametrize("layout", ["nemo", "gpt_oss", "vllm", "vllm_w31"])
def test_state_dict_in_a_layout_is_reverted_by_the_rules_of_the_model(mixtral, tmp_path, layout):
    amc.save_checkpoint(mixtral, tmp_path / "published")
    tensors = amc.convert_state_dict(mixtral.state_dict(), rules=[], layout=layout)
    rules = amc.get_checkpoint_conversion_mapping("mixtral")
    amc.save_checkpoint(tensors, tmp_path / "ours", layout=layout, rules=rules)
    assert_same(tensors_of(tmp_path / "ours"), tensors_of(tmp_path / "published"))
    amc.save_checkpoint(tensors, tmp_path / "referred", layout=layout, rules=rules, reference=tmp_path / "published")
    assert_same(tensors_of(tmp_path / "referred"), tensors_of(tmp_path / "published"))
    assert not (tmp_path / "ours" / "config.json").exists()


@needs_transformers
def test_compiled_model_is_saved_under_its_own_names(mixtral, tmp_path):
    class Compiled(torch.nn.Module):  # same wrapper as torch.compile
        def __init__(self, model):
            super().__init__()
            self._orig_mod = model

    amc.save_checkpoint(Compiled(mixtral), tmp_path / "wrapped")
    amc.save_checkpoint(mixtral, tmp_path / "plain")
    read = [{file.name: file.read_bytes() for file in (tmp_path / n).iterdir()} for n in ("wrapped", "plain")]
    assert read[0] == read[1]
