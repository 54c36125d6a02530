"""Tests of quantization settings in config files."""

import json

import pytest

from automodel_conv.errors import CheckpointError
from automodel_conv.files.config import (
    architectures_of,
    check_config,
    model_type_of,
    plain_config,
    quantization,
    quantization_config,
)

FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
MODELOPT = {"producer": {"name": "modelopt", "version": "0.40"}, "quantization": {"quant_algo": "FP8"}}


@pytest.fixture
def write(tmp_path):
    """Return a function that writes a config and returns the directory."""

    def written(config, name="config.json"):
        text = config if isinstance(config, str) else json.dumps(config)
        (tmp_path / name).write_text(text)
        return str(tmp_path)

    return written


def test_no_file_and_an_empty_object_describe_no_quantization(tmp_path, write):
    assert quantization(str(tmp_path)) is None
    assert quantization_config(str(tmp_path)) is None
    assert quantization(write({"model_type": "x", "quantization_config": {}})) is None


@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
@pytest.mark.parametrize("nest", [lambda part: part, lambda part: {"text_config": part}], ids=["model", "text part"])
def test_settings_are_found_under_both_keys_and_in_the_text_part(write, key, nest):
    directory = write(nest({key: FP8}))
    assert quantization(directory) == (FP8, f"{directory}/config.json")
    assert quantization_config(directory) == FP8


def test_settings_of_the_model_come_before_those_of_its_text_part_and_of_modelopts_own_file(write):
    write(MODELOPT, "hf_quant_config.json")
    assert quantization_config(write({"text_config": {"quantization_config": FP8}})) == FP8
    directory = write({"quantization_config": {"quant_method": "a"}, "text_config": {"quantization_config": FP8}})
    assert quantization_config(directory) == {"quant_method": "a"}


def test_modelopts_own_file_becomes_settings_of_transformers(write):
    stated = {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8", "exclude_modules": ["lm_head"], "group_size": None}
    directory = write({"producer": {"name": "modelopt"}, "quantization": stated}, "hf_quant_config.json")
    settings, path = quantization(directory)
    assert path == f"{directory}/hf_quant_config.json"
    assert settings == {
        "quant_method": "modelopt",
        "quant_algo": "FP8",
        "kv_cache_scheme": "FP8",
        "ignore": ["lm_head"],
    }


def test_modelopts_own_file_keeps_what_it_states_of_modules(write):
    layers = {"a": {"quant_algo": "NVFP4", "group_size": 16}}
    stated = {"quant_algo": "MIXED_PRECISION", "quantized_layers": layers, "moe_quant_algo": "NVFP4"}
    directory = write({"producer": {"name": "modelopt"}, "quantization": stated}, "hf_quant_config.json")
    assert quantization_config(directory) == {"quant_method": "modelopt", **stated}


@pytest.mark.parametrize("config", [[], {}, {"quantization": []}, {"producer": 1, "quantization": {}}], ids=str)
def test_a_malformed_file_of_modelopt_is_named(write, config):
    with pytest.raises(CheckpointError, match=r"(?s)malformed.*hf_quant_config\.json"):
        quantization(write(config, "hf_quant_config.json"))


def test_settings_that_are_no_object_are_named(write):
    with pytest.raises(CheckpointError, match=r"(?s)quantization_config is not an object.*config\.json.*list"):
        quantization(write({"quantization_config": [1]}))


def test_a_plain_config_keeps_all_but_the_quantization(tmp_path, write):
    assert plain_config(str(tmp_path)) is None
    kept = {"model_type": "x", "text_config": {"size": 3}}
    config = {
        "model_type": "x",
        "compression_config": FP8,
        "text_config": {"size": 3, "quantization_config": FP8},
    }
    assert json.loads(plain_config(write(config))) == kept


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000], ids=["empty", "cut", "deep"])
def test_a_config_that_is_not_json_is_named(tmp_path, write, text):
    check_config(str(tmp_path))
    with pytest.raises(CheckpointError, match=r"config\.json"):
        check_config(write(text))


@pytest.mark.parametrize(
    ("config", "model_type", "architectures"),
    [
        ({"model_type": "a", "architectures": ["B", 3, "C"]}, "a", ["B", "C"]),
        ({"model_type": 3, "architectures": "B"}, None, []),
        ({"model_type": None, "architectures": None}, None, []),
        ({}, None, []),
        (["a"], None, []),
        (None, None, []),
    ],
    ids=str,
)
def test_type_and_classes_are_names_or_absent(tmp_path, config, model_type, architectures):
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    assert model_type_of(str(tmp_path)) == model_type
    assert architectures_of(str(tmp_path)) == architectures
