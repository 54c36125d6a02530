"""Tests of saving models that were decoded during the load: plain values under published names, which load again."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("transformers", reason="needs transformers")

import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, CompressedTensorsConfig, Mxfp4Config
from transformers.quantizers import HfQuantizer

import automodel_conv as amc
from automodel_conv.errors import UnsupportedError
from automodel_conv.integrations.dcp import HuggingFaceWriter
from tests.comparing import assert_same, assert_same_in_order, contents
from tests.model_zoo import build_model, save_upstream
from tests.quantized.producers import FLOAT8, INT4, compressed
from tests.quantized.test_models import DIVIDING, gpt_oss, quantized, small_mixtral

pytestmark = pytest.mark.filterwarnings("ignore")


def fp8(directory):
    quantized("qwen3_moe", directory, DIVIDING)
    return {}


def fp8_with_shared_experts(directory):
    quantized("deepseek_v3", directory, DIVIDING)
    return {}


def compressed_tensors(directory, producer):
    pytest.importorskip("compressed_tensors")
    if not hasattr(HfQuantizer, "serialized_names"):
        pytest.skip("this transformers does not decode them")
    config = dict(producer.config) | {"quantization_status": "compressed", "ignore": ["lm_head"]}
    quantized("mixtral", directory, producer._replace(config=config), small_mixtral())
    return {"quantization_config": CompressedTensorsConfig(dequantize=True)}


def fp8_per_channel(directory):
    return compressed_tensors(directory, compressed("float-quantized", **FLOAT8, strategy="channel"))


def int4(directory):
    return compressed_tensors(directory, compressed("pack-quantized", **INT4, strategy="group", group_size=16))


def mxfp4(directory):
    gpt_oss(directory)
    return {"quantization_config": Mxfp4Config(dequantize=True), "dtype": torch.bfloat16}


KINDS = [fp8, fp8_with_shared_experts, fp8_per_channel, int4, mxfp4]


def loaded(path, how, options):
    if how == "load_model":
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path), dtype=torch.bfloat16)
        amc.load_model(model, path)
        return model
    if how == "hook":
        with amc.accelerate_transformers() as acceleration:
            model = AutoModelForCausalLM.from_pretrained(path, **options)
        [load] = acceleration.loads
        assert load.lowered
        return model
    return AutoModelForCausalLM.from_pretrained(path, **options)


def plain_like(model):
    """Return a model of the same tensors that was never quantized."""
    config = type(model.config).from_dict(model.config.to_dict())
    vars(config).pop("quantization_config", None)
    plain = type(model)(config)
    plain.load_state_dict(model.state_dict(), assign=True)
    return plain.eval()


@pytest.mark.parametrize("how", ["from_pretrained", "hook", "load_model"])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_decoded_model_is_saved_like_a_plain_one_and_loads_again(tmp_path, kind, how):
    options = kind(tmp_path / "published")
    model = loaded(tmp_path / "published", how, options)
    amc.save_checkpoint(model, tmp_path / "made")
    save_upstream(plain_like(model), tmp_path / "plain", "5GB")
    files, plain = contents(tmp_path / "made"), contents(tmp_path / "plain")
    assert files["model.safetensors"] == plain["model.safetensors"]
    assert json.loads(files["config.json"]) == json.loads(plain["config.json"])
    assert files.keys() == plain.keys()
    assert b"quantization" not in files["config.json"]
    again, info = type(model).from_pretrained(tmp_path / "made", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert_same(again.state_dict(), model.state_dict())
    assert_same_in_order(amc.load_state_dict(tmp_path / "made"), model.state_dict())
    assert_same(amc.revert_state_dict(model.state_dict(), model), load_file(tmp_path / "plain" / "model.safetensors"))
    dcp.save(model.state_dict(), storage_writer=HuggingFaceWriter(tmp_path / "dcp", model))
    assert contents(tmp_path / "dcp") == files
    amc.save_checkpoint(torch.compile(again), tmp_path / "second")
    assert contents(tmp_path / "second") == files


def test_decoded_text_config_has_no_quantization_config(tmp_path):
    model = build_model("qwen3_vl_moe")
    for config in (model.config, model.config.text_config):
        config.quantization_config = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    amc.save_checkpoint(model, tmp_path)
    assert "quantization_config" not in (tmp_path / "config.json").read_text()
    assert model.config.text_config.quantization_config["quant_method"] == "fp8"
    assert_same(amc.load_state_dict(tmp_path), model.state_dict())


def test_a_model_that_keeps_its_codes_is_left_to_transformers(tmp_path):
    model = build_model("qwen3_moe")
    model.hf_quantizer = object()
    for wrapped in (model, torch.compile(model), torch.nn.DataParallel(model)):
        with pytest.raises(UnsupportedError, match=r"quantized by transformers(.|\n)*save_pretrained"):
            amc.save_checkpoint(wrapped, tmp_path / "made")
        with pytest.raises(UnsupportedError, match="quantized by transformers"):
            HuggingFaceWriter(tmp_path / "made", wrapped)
    assert not (tmp_path / "made").exists()
