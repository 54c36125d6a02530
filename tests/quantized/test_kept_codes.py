"""Tests of codes and scales that are kept while experts are grouped: the same values, and the same bytes back."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("transformers", reason="needs transformers")

from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

import automodel_conv as amc
from automodel_conv.testing import assert_bytes_equal
from tests.comparing import assert_same, tensors_of
from tests.model_zoo import fill
from tests.quantized.producers import FLOAT8, INT4, Producer, compressed, fine_grained, mxfp8, one_scale
from tests.quantized.test_converting import config_of
from tests.quantized.test_models import gpt_oss, keeping, quantized, small_mixtral

LAYOUTS = [None, "nemo", "vllm"]
# gate_up, down, and the place of each scale of an expert in them, written by hand.
NAMES = {"nemo": ("gate_and_up_projs", "down_projs"), "vllm": ("w13_weight", "w2_weight")}


def qwen(hidden=32, intermediate=16, experts=3):
    config = Qwen3MoeConfig(
        vocab_size=64,
        hidden_size=hidden,
        moe_intermediate_size=intermediate,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=experts,
        num_experts_per_tok=1,
        pad_token_id=0,
    )
    model = Qwen3MoeForCausalLM._from_config(config, dtype=torch.bfloat16)
    fill(model)
    return model


def assert_kept(directory, layout):
    """Check that the conversion loads like its source, is verified, and reverts to the same bytes."""
    source, converted, back = directory / "source", directory / "made", directory / "back"
    report = amc.convert_checkpoint(source, converted, layout=layout)
    assert report.left_out == ()
    assert config_of(converted) == config_of(source)
    assert_same(dict(amc.load_state_dict(converted)), dict(amc.load_state_dict(source)))
    if layout is not None:
        loaded = dict(amc.load_state_dict(converted, layout=layout))
        assert_same(loaded, dict(amc.load_state_dict(source, layout=layout)))
    assert amc.verify_checkpoint(source, converted) > 0
    amc.convert_checkpoint(converted, back, layout="per_expert")
    assert_same(tensors_of(back), tensors_of(source))


@pytest.mark.parametrize(
    ("name", "layout"),
    [("qwen3_moe", "transformers"), ("deepseek_v3", "nemo"), ("mixtral", None), ("mixtral", "vllm")],
)
def test_kept_conversion_equals_its_source_in_another_layout(tmp_path, name, layout):
    quantized(name, tmp_path / "source", fine_grained((2, 2)))
    assert_kept(tmp_path, layout)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("sizes", "block"),
    [
        ({}, (16, 16)),
        ({"hidden": 40}, (16, 16)),  # the last block of each row of gate and up, and the last rows of down, are smaller
        ({"intermediate": 32}, (16, 16)),  # square
        ({"experts": 1}, (16, 16)),
        ({"experts": 1, "hidden": 16}, (1, 1)),
    ],
    ids=str,
)
def test_codes_and_scales_follow_the_layout(tmp_path, sizes, block, layout):
    quantized("", tmp_path / "source", fine_grained(block), qwen(**sizes))
    assert_kept(tmp_path, layout)
    stored, converted = tensors_of(tmp_path / "source"), tensors_of(tmp_path / "made")
    gate_up, down = NAMES.get(layout, ("gate_up_proj", "down_proj"))
    path = "model.layers.0.mlp.experts"
    for suffix in ("", "_scale_inv"):
        both, downs = [], []
        for e in range(sizes.get("experts", 3)):
            gate, up, of_down = (stored[f"{path}.{e}.{n}_proj.weight{suffix}"] for n in ("gate", "up", "down"))
            both.append(torch.cat([gate, up]))
            downs.append(of_down)
        expected = {gate_up: torch.stack(both), down: torch.stack(downs)}
        for called, tensor in expected.items():
            tensor = tensor.transpose(1, 2).contiguous() if layout == "nemo" else tensor
            assert_bytes_equal(converted[f"{path}.{called}{suffix}"], tensor)
    rest = {name: tensor for name, tensor in stored.items() if ".experts." not in name}
    assert_same({name: tensor for name, tensor in converted.items() if ".experts." not in name}, rest)


@pytest.mark.parametrize(
    ("layout", "sizes", "producer"),
    [
        ("nemo", {"intermediate": 24}, fine_grained((16, 16))),
        ("vllm", {"intermediate": 28}, fine_grained((16, 16))),  # gate and up have four blocks, as both together would
        (None, {"intermediate": 20}, fine_grained((32, 32))),  # one block each, two as both together would
        (None, {"intermediate": 16}, fine_grained((32, 32))),  # one block each, one as both together would
        (None, {"intermediate": 48}, fine_grained((32, 32))),
        ("nemo", {}, fine_grained((8, 16))),
        ("nemo", {"hidden": 16}, fine_grained((8, 16))),
        ("gpt_oss", {}, fine_grained((16, 16))),
        ("gpt_oss", {}, fine_grained((1, 1))),
        (None, {}, Producer({"quant_method": "fp8", "weight_block_size": None}, one_scale)),
        ("nemo", {}, Producer({"quant_method": "fp8", "weight_block_size": None}, one_scale)),
        ("nemo", {}, compressed("float-quantized", **FLOAT8, strategy="channel")),
        (None, {}, compressed("float-quantized", **FLOAT8, strategy="tensor")),
        (None, {}, compressed("pack-quantized", **INT4, strategy="group", group_size=16)),
        ("vllm", {}, compressed("pack-quantized", **INT4, strategy="group", group_size=16)),
    ],
)
def test_scales_that_cannot_follow_the_layout_are_refused_with_advice(tmp_path, layout, sizes, producer):
    quantized("", tmp_path / "source", producer, qwen(**sizes))
    with pytest.raises(amc.UnsupportedError, match=r"experts\.\w+: codes and scales cannot be kept") as caught:
        amc.convert_checkpoint(tmp_path / "source", tmp_path / "made", layout=layout)
    assert "dequantize=True" in str(caught.value)
    assert "dequantize=False" not in str(caught.value)
    assert not (tmp_path / "made").exists()
    amc.convert_checkpoint(tmp_path / "source", tmp_path / "made", layout=layout, dequantize=True)
    loaded = dict(amc.load_state_dict(tmp_path / "source", layout=layout))
    assert_same(tensors_of(tmp_path / "made"), loaded)


@pytest.mark.parametrize("layout", [None, "transformers", "nemo", "vllm", "gpt_oss"])
def test_unquantized_experts_are_converted_next_to_codes(tmp_path, layout):
    quantized("", tmp_path / "source", fine_grained((16, 16)), qwen())
    decoded = amc.load_state_dict(tmp_path / "source", rules=[])
    file = tmp_path / "source" / "model.safetensors"
    numbers = {name: tensor for name, tensor in decoded.items() if ".experts." in name}
    save_file({n: t for n, t in load_file(file).items() if ".experts." not in n} | numbers, file)
    assert_kept(tmp_path, layout)
    codes = [name for name, tensor in tensors_of(tmp_path / "made").items() if tensor.dtype == torch.float8_e4m3fn]
    assert len(codes) == 4
    assert all(".self_attn." in name for name in codes)


@pytest.mark.parametrize("layout", [None, "vllm"])
@pytest.mark.parametrize(
    "producer",
    [
        fine_grained((8, 16)),
        Producer({"quant_method": "fp8", "weight_block_size": [1, 32], "scale_fmt": "ue8m0"}, mxfp8),
        compressed("float-quantized", **FLOAT8, strategy="channel"),
        compressed("float-quantized", **FLOAT8, strategy="block", block_structure=[8, 16]),
    ],
    ids=["8x16", "mxfp8", "channel", "compressed-tensors"],
)
def test_blocks_that_are_not_square_are_kept_without_a_transpose(tmp_path, producer, layout):
    quantized("", tmp_path / "source", producer, qwen(intermediate=32))
    assert_kept(tmp_path, layout)


def test_kept_codes_go_from_layout_to_layout(tmp_path):
    quantized("", tmp_path / "source", fine_grained((16, 16)), qwen())
    last = tmp_path / "source"
    for layout in ("nemo", "vllm", "transformers", "nemo", "per_expert"):
        amc.convert_checkpoint(last, tmp_path / f"after {last.name} {layout}", layout=layout)
        last = tmp_path / f"after {last.name} {layout}"
        assert_same(dict(amc.load_state_dict(last)), dict(amc.load_state_dict(tmp_path / "source")))
    assert_same(tensors_of(last), tensors_of(tmp_path / "source"))


def test_explicit_rules_group_the_scales_too(tmp_path):
    quantized("qwen3_moe", tmp_path / "source")
    rules = amc.get_checkpoint_conversion_mapping("qwen3_moe")
    amc.convert_checkpoint(tmp_path / "source", tmp_path / "made", rules=rules, layout="nemo")
    amc.convert_checkpoint(tmp_path / "source", tmp_path / "expected", layout="nemo")
    assert_same(tensors_of(tmp_path / "made"), tensors_of(tmp_path / "expected"))


def test_dtype_casts_only_tensors_that_are_not_codes(tmp_path):
    quantized("", tmp_path / "source", fine_grained((16, 16)), qwen())
    amc.convert_checkpoint(tmp_path / "source", tmp_path / "made", layout="nemo", dtype=torch.float32)
    amc.convert_checkpoint(tmp_path / "source", tmp_path / "kept", layout="nemo")
    kept = tensors_of(tmp_path / "kept")
    expected = {name: t.float() if t.dtype == torch.bfloat16 else t for name, t in kept.items()}
    assert_same(tensors_of(tmp_path / "made"), expected)


@pytest.mark.parametrize("what", [{"rules": []}, {"layout": "per_expert"}, {"layout": "nemo"}], ids=str)
def test_dtype_casts_no_scale_of_codes_that_are_kept(tmp_path, what):
    quantized("", tmp_path / "source", fine_grained((16, 16)), qwen())
    amc.convert_checkpoint(tmp_path / "source", tmp_path / "kept", **what)
    amc.convert_checkpoint(tmp_path / "source", tmp_path / "cast", **what, dtype=torch.float16)
    kept = tensors_of(tmp_path / "kept")
    assert {t.dtype for name, t in kept.items() if "scale" in name} == {torch.float32}
    expected = {name: t.half() if t.dtype == torch.bfloat16 else t for name, t in kept.items()}
    assert_same(tensors_of(tmp_path / "cast"), expected)


def test_loads_and_saves_in_another_dtype_cast_no_scale(tmp_path):
    quantized("", tmp_path / "source", fine_grained((16, 16)), qwen())
    stored = tensors_of(tmp_path / "source")
    expected = {name: t.half() if t.dtype == torch.bfloat16 else t for name, t in stored.items()}
    loaded = amc.load_state_dict(tmp_path / "source", rules=[], dequantize=False, dtype=torch.float16)
    assert_same(dict(loaded), expected)
    amc.save_checkpoint(stored, tmp_path / "saved", rules=[], dtype=torch.float16)
    assert_same(tensors_of(tmp_path / "saved"), expected)


def test_transformers_refuses_grouped_codes(tmp_path):
    """Check without a GPU, where it drops the scales of ``experts.gate_up_proj`` with a warning and loads the codes."""
    quantized("qwen3_moe", tmp_path / "source")
    amc.convert_checkpoint(tmp_path / "source", tmp_path / "made")
    amc.convert_checkpoint(tmp_path / "made", tmp_path / "copied", rules=[])
    for directory in ("made", "copied"):
        assert [file.name for file in (tmp_path / directory).glob("*.safetensors")] == ["transformers.safetensors"]
        with pytest.raises(OSError, match=r"no file named model\.safetensors"):
            AutoModelForCausalLM.from_pretrained(tmp_path / directory)


@pytest.mark.parametrize("layout", [None, "nemo", "vllm"])
def test_model_that_keeps_codes_loads_them_unchanged(tmp_path, layout):
    """Compare with the result of transformers' own rules for one expert after another."""
    model_class, _ = quantized("qwen3_moe", tmp_path / "source")
    amc.convert_checkpoint(tmp_path / "source", tmp_path / "made", layout=layout)
    what = {"layout": layout, "dequantize": False}
    expected = amc.load_state_dict(tmp_path / "source", keeping(tmp_path / "source", model_class), **what)
    assert_same(
        dict(amc.load_state_dict(tmp_path / "made", keeping(tmp_path / "made", model_class), **what)), dict(expected)
    )
    stored = tensors_of(tmp_path / "made")
    assert_same({name: stored[name] for name in expected}, dict(expected))


def test_input_scale_of_one_expert_is_refused(tmp_path):
    quantized("", tmp_path / "source", fine_grained((16, 16)), qwen())
    file = tmp_path / "source" / "model.safetensors"
    scale = {"model.layers.0.mlp.experts.1.up_proj.input_scale": torch.tensor(0.5)}
    save_file(load_file(file) | scale, file, metadata={"format": "pt"})
    with pytest.raises(amc.UnsupportedError, match=r"experts\.1\.up_proj\.input_scale: .*cannot be kept"):
        amc.convert_checkpoint(tmp_path / "source", tmp_path / "made", layout="nemo")
    amc.convert_checkpoint(tmp_path / "source", tmp_path / "made", layout="per_expert")
    assert_same(tensors_of(tmp_path / "made"), tensors_of(tmp_path / "source"))


def test_quantized_and_unquantized_experts_are_not_mixed(tmp_path):
    quantized("", tmp_path / "source", fine_grained((16, 16)), qwen())
    file = tmp_path / "source" / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.0.mlp.experts.1.up_proj.weight"
    del tensors[name + "_scale_inv"]
    save_file(tensors | {name: tensors[name].bfloat16()}, file, metadata={"format": "pt"})
    with pytest.raises(amc.UnsupportedError, match="only some of its parts are quantized"):
        amc.convert_checkpoint(tmp_path / "source", tmp_path / "made", layout="nemo")


def test_gpt_oss_in_mxfp4_is_refused_with_advice(tmp_path):
    gpt_oss(tmp_path / "source")
    with pytest.raises(amc.UnsupportedError, match="dequantize=True"):
        amc.convert_checkpoint(tmp_path / "source", tmp_path / "made", layout="nemo")


def test_codes_for_an_unquantized_model_are_refused_with_advice(tmp_path):
    quantized("mixtral", tmp_path / "source", fine_grained((2, 2)), small_mixtral())
    with pytest.raises(amc.UnsupportedError, match="dequantize=True") as caught:
        amc.load_state_dict(tmp_path / "source", dequantize=False)
    assert "dequantize=False" not in str(caught.value)


def test_codes_without_a_config_are_not_grouped(tmp_path):
    quantized("qwen3_moe", tmp_path / "source")
    config = config_of(tmp_path / "source")
    del config["quantization_config"]
    (tmp_path / "source" / "config.json").write_text(json.dumps(config))
    with pytest.raises(amc.QuantizationError, match="no config describes how to decode them"):
        amc.convert_checkpoint(tmp_path / "source", tmp_path / "made", layout="nemo")
