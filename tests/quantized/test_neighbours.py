"""Tests of tensors and files next to quantized weights: scales of a KV cache, and modelopt's own config file."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("transformers", reason="needs transformers")

import automodel_conv as amc
from automodel_conv.files.config import MODELOPT_NAME
from tests.comparing import assert_same, tensors_of
from tests.model_zoo import write_checkpoint
from tests.quantized.producers import FLOAT4, FLOAT8, Producer, compressed, fine_grained, one_scale
from tests.quantized.test_converting import config_of
from tests.quantized.test_kept_codes import qwen
from tests.quantized.test_models import keeping, quantized

ATTENTION = "model.layers.0.self_attn"
# Names of modelopt, compressed-tensors, quark, older vLLM and Hunyuan; those of Nemotron-H are below ``mixer``.
OF_THE_CACHE = [
    f"{ATTENTION}.k_proj.k_scale",
    f"{ATTENTION}.v_proj.v_scale",
    f"{ATTENTION}.k_scale",
    f"{ATTENTION}.v_scale",
    f"{ATTENTION}.q_scale",
    f"{ATTENTION}.prob_scale",
    f"{ATTENTION}.attn.k_scale",
    f"{ATTENTION}.qkv_proj.v_scale",
    f"{ATTENTION}.kv_scale",
    f"{ATTENTION}.k_zero_point",
    f"{ATTENTION}.k_cache.scale",
    f"{ATTENTION}.q.scale",
    "model.layers.0.mixer.v_proj.v_scale",
]


def modelopt(**kv):
    """Return a producer with one scale per tensor and modelopt's names."""

    def make(weight):
        stored, exact = one_scale(weight)
        return {"": stored[""], "_scale": stored["_scale_inv"]}, exact

    return Producer({"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head"], **kv}, make)


CACHE = {"kv_cache_scheme": {"dynamic": False, "num_bits": 8, "type": "float"}}
QUANTIZED = {
    "fp8": fine_grained((16, 16)),
    "modelopt": modelopt(),
    "modelopt, which tells of the cache": modelopt(**CACHE),
    "compressed-tensors": compressed("float-quantized", **FLOAT8, strategy="tensor"),
    "nvfp4": compressed("nvfp4-pack-quantized", 700.0, **FLOAT4, strategy="tensor_group", group_size=16),
}


def add(directory, tensors):
    file = directory / "model.safetensors"
    save_file(load_file(file) | tensors, file, metadata={"format": "pt"})


def with_cache_scales(directory):
    """Add scales of the cache to a checkpoint; return them and the tensors before."""
    before = dict(amc.load_state_dict(directory))
    scales = {name: torch.tensor(1.0 + n) for n, name in enumerate(OF_THE_CACHE)}
    add(directory, scales)
    return before, scales


@pytest.mark.parametrize("producer", QUANTIZED.values(), ids=QUANTIZED)
def test_scales_of_a_cache_are_left_out_of_a_decoded_model(tmp_path, producer):
    quantized("", tmp_path, producer, qwen())
    before, _ = with_cache_scales(tmp_path)
    loaded = amc.load_state_dict(tmp_path)
    assert_same(dict(loaded), before)
    assert loaded.report.unexpected_keys == ()
    model = qwen()
    assert amc.load_model(model, tmp_path).unexpected_keys == ()
    assert amc.compile_plan(tmp_path).unexpected == ()
    assert not any(name in OF_THE_CACHE for name in amc.load_state_dict(tmp_path, rules=[]))


def test_scales_of_a_cache_are_recognized_without_quantized_weights(tmp_path):
    write_checkpoint(qwen(), tmp_path, 1 << 30)
    before, scales = with_cache_scales(tmp_path)
    assert_same(dict(amc.load_state_dict(tmp_path)), before)
    kept = amc.load_state_dict(tmp_path, rules=[])
    assert_same({name: kept[name] for name in scales}, scales)


def test_saves_carry_the_scales_of_a_cache_or_name_them(tmp_path):
    write_checkpoint(qwen(), tmp_path / "plain", 1 << 30)
    _, scales = with_cache_scales(tmp_path / "plain")
    report = amc.save_checkpoint(qwen(), tmp_path / "saved", carry=tmp_path / "plain")
    assert sorted(report.carried) == sorted(scales)
    assert report.left_out == ()
    assert_same(tensors_of(tmp_path / "saved"), tensors_of(tmp_path / "plain"))
    quantized("", tmp_path / "codes", fine_grained((16, 16)), qwen())
    codes = tensors_of(tmp_path / "codes")
    with_cache_scales(tmp_path / "codes")
    report = amc.save_checkpoint(qwen(), tmp_path / "decoded", carry=tmp_path / "codes")
    assert report.carried == ()
    assert sorted(report.left_out) == sorted(scales)
    report = amc.save_checkpoint(codes, tmp_path / "kept", rules=[], carry=tmp_path / "codes")
    assert sorted(report.carried) == sorted(scales)
    assert report.left_out == ()
    assert_same(tensors_of(tmp_path / "kept"), tensors_of(tmp_path / "codes"))


@pytest.mark.parametrize(
    "config",
    [
        {"quant_method": "modelopt", "quant_algo": None, **CACHE},
        {"quant_method": "compressed-tensors", "config_groups": {}, **CACHE},
    ],
    ids=lambda config: config["quant_method"],
)
def test_model_with_only_a_quantized_cache_is_loaded(tmp_path, config):
    write_checkpoint(qwen(), tmp_path, 1 << 30)
    before, _ = with_cache_scales(tmp_path)
    whole = config_of(tmp_path) | {"quantization_config": config}
    (tmp_path / "config.json").write_text(json.dumps(whole))
    assert_same(dict(amc.load_state_dict(tmp_path)), before)


@pytest.mark.parametrize("layout", ["per_expert", None, "nemo", "vllm"])
def test_scales_of_a_cache_are_kept_with_the_codes(tmp_path, layout):
    quantized("", tmp_path / "source", fine_grained((16, 16)), qwen())
    _, scales = with_cache_scales(tmp_path / "source")
    report = amc.convert_checkpoint(tmp_path / "source", tmp_path / "made", layout=layout)
    assert report.left_out == ()
    converted = tensors_of(tmp_path / "made")
    assert_same({name: converted[name] for name in scales}, scales)
    amc.convert_checkpoint(tmp_path / "made", tmp_path / "back", layout="per_expert")
    assert_same(tensors_of(tmp_path / "back"), tensors_of(tmp_path / "source"))
    loaded = amc.load_state_dict(tmp_path / "source", rules=[], dequantize=False)
    assert_same({name: loaded[name] for name in scales}, scales)


def test_scales_of_a_cache_are_expected_for_a_model_that_keeps_codes(tmp_path):
    model_class, _ = quantized("qwen3_moe", tmp_path)
    expected = dict(amc.load_state_dict(tmp_path, keeping(tmp_path, model_class), dequantize=False))
    with_cache_scales(tmp_path)
    loaded = amc.load_state_dict(tmp_path, keeping(tmp_path, model_class), dequantize=False)
    assert_same(dict(loaded), expected)


def test_other_scales_are_unexpected(tmp_path):
    quantized("", tmp_path, modelopt(), qwen())
    add(tmp_path, {f"{ATTENTION}.k_proj.some_scale": torch.tensor(1.0), f"{ATTENTION}.kscale": torch.tensor(1.0)})
    with pytest.raises(amc.NameProblems) as caught:
        amc.load_state_dict(tmp_path)
    assert len(caught.value.unexpected) == 2


def in_its_own_file(directory, producer, **quantization):
    """Move the quantization config to ``hf_quant_config.json``; return the tensors loaded with ``config.json``."""
    quantized("", directory, producer, qwen())
    expected = dict(amc.load_state_dict(directory))
    config = config_of(directory)
    del config["quantization_config"]
    (directory / "config.json").write_text(json.dumps(config))
    settings = {"producer": {"name": "modelopt", "version": "0.29.0"}, "quantization": quantization}
    (directory / MODELOPT_NAME).write_text(json.dumps(settings))
    return expected


def nvfp4():
    """Return modelopt's format, in which the scale of the whole tensor is multiplied."""
    base = compressed("nvfp4-pack-quantized", 1.0, **FLOAT4, strategy="tensor_group", group_size=16)

    def make(weight):
        stored, exact = base.make(weight)
        return {"": stored["_packed"], "_scale": stored["_scale"], "_scale_2": stored["_global_scale"][0]}, exact

    return Producer({"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16}, make)


@pytest.mark.parametrize(
    ("producer", "quantization"),
    [
        (modelopt(), {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8", "exclude_modules": ["lm_head"]}),
        (modelopt(), {"quant_algo": "fp8", "kv_cache_quant_algo": None}),
        (nvfp4(), {"quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8", "group_size": 16, "exclude_modules": None}),
    ],
    ids=["fp8", "lower case", "nvfp4"],
)
def test_modelopt_file_is_read_like_config_json(tmp_path, producer, quantization):
    expected = in_its_own_file(tmp_path, producer, **quantization)
    add(tmp_path, {f"{ATTENTION}.k_proj.k_scale": torch.tensor(1.0)})
    assert_same(dict(amc.load_state_dict(tmp_path)), expected)


def test_config_json_precedes_the_modelopt_file(tmp_path):
    expected = in_its_own_file(tmp_path, modelopt(), quant_algo="NVFP4")
    config = config_of(tmp_path) | {"quantization_config": dict(modelopt().config)}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert_same(dict(amc.load_state_dict(tmp_path)), expected)


@pytest.mark.parametrize("empty", [{}, None], ids=str)
@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
def test_empty_quantization_config_counts_as_none(tmp_path, key, empty):
    expected = in_its_own_file(tmp_path, modelopt(), quant_algo="FP8")
    (tmp_path / "config.json").write_text(json.dumps(config_of(tmp_path) | {key: empty}))
    assert_same(dict(amc.load_state_dict(tmp_path)), expected)


def test_algorithms_that_are_not_decoded_are_named_with_the_file(tmp_path):
    in_its_own_file(tmp_path, modelopt(), quant_algo="W4A8_AWQ")
    with pytest.raises(amc.UnsupportedError) as caught:
        amc.load_state_dict(tmp_path)
    assert "W4A8_AWQ" in str(caught.value)
    assert str(tmp_path / MODELOPT_NAME) in str(caught.value)


def test_advice_for_undecoded_algorithms_works(tmp_path):
    source, out = tmp_path / "source", tmp_path / "made"
    quantized("", source, modelopt(), qwen())
    config = config_of(source)
    config["quantization_config"]["quant_algo"] = "W4A8_AWQ"
    (source / "config.json").write_text(json.dumps(config))

    def advice(call):
        with pytest.raises(amc.UnsupportedError, match="W4A8_AWQ") as caught:
            call()
        return caught.value.args[0].partition("  do:       ")[2]

    keeps = "keeps codes and scales as they are"
    both = f"dequantize=False {keeps}, for a model that has both or with rules=[]"
    assert advice(lambda: amc.load_state_dict(source)) == both
    assert advice(lambda: amc.load_model(qwen(), source)) == both
    assert advice(lambda: amc.load_state_dict(source, rules=[])) == f"dequantize=False {keeps}"
    decode = {"layout": "nemo", "dequantize": True}
    assert advice(lambda: amc.convert_checkpoint(source, out, **decode)) == f"dequantize=False with rules=[] {keeps}"
    assert advice(lambda: amc.convert_checkpoint(source, out)) == f"rules=[] without dequantize=True {keeps}"
    carried = advice(lambda: amc.save_checkpoint(qwen(), tmp_path / "saved", carry=source))
    assert carried == "leave carry out, or carry from a checkpoint that is not quantized"
    assert not out.exists()
    stored = tensors_of(source)
    assert_same(dict(amc.load_state_dict(source, rules=[], dequantize=False)), stored)
    amc.convert_checkpoint(source, out, rules=[])
    assert_same(tensors_of(out), stored)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "{}", '{"quantization": "FP8"}', '{"producer": "modelopt", "quantization": {"quant_algo": "FP8"}}'],
)
def test_a_malformed_file_is_one_error(tmp_path, text):
    in_its_own_file(tmp_path, modelopt(), quant_algo="FP8")
    (tmp_path / MODELOPT_NAME).write_text(text)
    with pytest.raises(amc.CheckpointError, match=r"malformed(.|\n)*hf_quant_config\.json"):
        amc.load_state_dict(tmp_path)


def test_decoded_values_are_not_written_next_to_a_quantization_file(tmp_path):
    expected = in_its_own_file(tmp_path / "source", modelopt(), quant_algo="FP8")
    amc.convert_checkpoint(tmp_path / "source", tmp_path / "plain", layout="per_expert", dequantize=True)
    assert not (tmp_path / "plain" / MODELOPT_NAME).exists()
    assert_same(dict(amc.load_state_dict(tmp_path / "plain")), expected)
    amc.convert_checkpoint(tmp_path / "source", tmp_path / "kept", layout="per_expert")
    assert (tmp_path / "kept" / MODELOPT_NAME).read_bytes() == (tmp_path / "source" / MODELOPT_NAME).read_bytes()
    assert_same(dict(amc.load_state_dict(tmp_path / "kept")), expected)


def test_text_config_may_hold_the_quantization_config(tmp_path):
    expected = in_its_own_file(tmp_path, modelopt(), quant_algo="NVFP4")
    config = config_of(tmp_path) | {"text_config": {"quantization_config": dict(modelopt().config)}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert_same(dict(amc.load_state_dict(tmp_path, qwen())), expected)
