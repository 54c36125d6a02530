"""Tests of dtypes that callers give: names, "auto", and the error with a similar name."""

import json
import re

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from automodel_conv.dtypes import FLOATING, dtype_code
from automodel_conv.errors import UnsupportedError
from automodel_conv.files.checkpoint import open_checkpoint
from automodel_conv.upstream.given_dtypes import auto_dtype, dtype_for, dtype_named, dtype_to_save, given_dtype
from tests.compiling.support import write

MIXED = {"b": torch.ones(2), "a": torch.ones(2, dtype=torch.float16), "0": torch.ones(2, dtype=torch.int8)}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_a_dtype_and_its_names_are_the_dtype(dtype):
    assert given_dtype(dtype) is dtype
    assert given_dtype(str(dtype)) is dtype
    assert given_dtype(str(dtype).removeprefix("torch.")) is dtype


def test_aliases_of_torch_are_names_too():
    assert given_dtype("half") is torch.float16
    assert given_dtype("float") is torch.float32


def test_none_and_auto_stay_as_they_are():
    assert given_dtype(None) is None
    assert given_dtype("auto") == "auto"


WRONG = {
    "bf16": "bfloat16",
    "BF16": "bfloat16",
    "fp16": "float16",
    "F32": "float32",
    "bfloat61": "bfloat16",
    "torch.flaot32": "float32",
    "Auto": "auto",
    "": None,
    "int8": None,
    "I8": None,
    "float8_e4m3fn": None,
    "Tensor": None,
    "nn": None,
}


@pytest.mark.parametrize(("name", "similar"), WRONG.items())
def test_other_names_are_an_error_with_a_similar_name(name, similar):
    with pytest.raises(UnsupportedError) as caught:
        given_dtype(name)
    text = caught.value.args[0]
    assert text.startswith("not a floating dtype\n")
    assert repr(name) in text
    assert ("do:" in text) == (similar is not None)
    assert similar is None or text.endswith(f'do:       write "{similar}"')


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.complex64, 16, True, np.float32, float, []])
def test_other_dtypes_and_other_things_are_an_error(dtype):
    with pytest.raises(UnsupportedError, match="not a floating dtype"):
        given_dtype(dtype)


def test_a_name_that_torch_has_for_something_else_is_no_dtype():
    assert dtype_named("Tensor") is None
    assert dtype_named("torch.int8") is torch.int8


def test_every_floating_dtype_can_be_named():
    named = {dtype_code(given_dtype(name)) for name in ("bfloat16", "float16", "float32", "float64")}
    assert named == FLOATING


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"dtype": "bfloat16"}, torch.bfloat16),
        ({"torch_dtype": "bfloat16"}, torch.bfloat16),
        ({"dtype": "torch.float64"}, torch.float64),
        ({"text_config": {"dtype": "bfloat16"}}, torch.bfloat16),
        ({"dtype": "bfloat16", "text_config": {"dtype": "float64"}}, torch.bfloat16),
        ({"dtype": None}, torch.float16),
        ({}, torch.float16),
        (None, torch.float16),
    ],
)
def test_auto_is_the_dtype_of_the_config_or_of_the_first_floating_tensor_by_name(tmp_path, config, expected):
    checkpoint = write(tmp_path, MIXED, config=config)
    assert auto_dtype(checkpoint) is expected
    assert dtype_for("auto", checkpoint) is expected
    assert dtype_for("float64", checkpoint) is torch.float64
    assert dtype_for(None, checkpoint) is None


@pytest.mark.parametrize(("metadata", "expected"), [({"dtype": "float64"}, torch.float64), ({}, torch.bfloat16)])
def test_auto_of_several_files_is_that_of_the_index_or_of_the_first_file(tmp_path, metadata, expected):
    save_file({"z": torch.ones(2, dtype=torch.bfloat16)}, tmp_path / "1.safetensors")
    save_file({"a": torch.ones(2)}, tmp_path / "2.safetensors")
    index = {"metadata": metadata, "weight_map": {"z": "1.safetensors", "a": "2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert auto_dtype(open_checkpoint(tmp_path)) is expected


def test_auto_without_floating_tensors_casts_nothing(tmp_path):
    assert auto_dtype(write(tmp_path, {"a": torch.ones(2, dtype=torch.int8)})) is None


@pytest.mark.parametrize("stated", ["float8_e4m3fn", "int8", "bfloat61", "auto"])
def test_a_config_that_states_no_floating_dtype_is_an_error(tmp_path, stated):
    checkpoint = write(tmp_path, MIXED, config={"dtype": stated})
    with pytest.raises(UnsupportedError, match=rf"config\.json\n  found:    '{stated}'"):
        auto_dtype(checkpoint)


def test_error_about_the_dtype_of_an_index_names_the_index(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "1.safetensors")
    index = {"metadata": {"dtype": "int8"}, "weight_map": {"a": "1.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(
        UnsupportedError, match=f"where:    the index of {re.escape(str(tmp_path))}\n  found:    'int8'"
    ):
        auto_dtype(open_checkpoint(tmp_path))


@pytest.mark.parametrize("stated", ["bfloat16", None])
def test_auto_is_what_transformers_determines(tmp_path, stated):
    modeling_utils = pytest.importorskip("transformers.modeling_utils")
    from transformers import PreTrainedConfig

    checkpoint = write(tmp_path, MIXED, config={} if stated is None else {"dtype": stated})
    first = {name: torch.empty(0, dtype=MIXED[name].dtype) for name in sorted(MIXED)}
    config = PreTrainedConfig(dtype=stated)
    assert auto_dtype(checkpoint) is modeling_utils._get_dtype("auto", None, config, None, first, True)[1]


def test_auto_of_a_save_is_that_of_the_config_or_of_the_first_floating_tensor():
    assert dtype_to_save("auto", None, MIXED.values()) is torch.float32
    assert dtype_to_save("auto", nn.Linear(2, 2), [torch.ones(2, dtype=torch.int8)]) is None
    assert dtype_to_save("float16", None, MIXED.values()) is torch.float16
    assert dtype_to_save(None, None, MIXED.values()) is None
    with pytest.raises(UnsupportedError, match="not a floating dtype"):
        dtype_to_save("bf16", None, MIXED.values())


def test_a_plain_module_with_a_config_of_its_own_states_no_dtype():
    module = nn.Linear(2, 2)
    module.config = "mine"
    assert dtype_to_save("auto", module, module.parameters()) is torch.float32


def test_auto_of_a_transformers_model_is_that_of_its_config():
    pytest.importorskip("transformers")
    from tests.model_zoo import build_model

    model = build_model("mixtral").float()
    model.config.dtype = torch.bfloat16
    assert dtype_to_save("auto", model, model.state_dict().values()) is torch.bfloat16


@pytest.mark.parametrize("stated", ["auto", torch.int8, "bf16"])
def test_a_model_whose_config_states_no_floating_dtype_is_an_error(stated):
    pytest.importorskip("transformers")
    from tests.model_zoo import build_model

    model = build_model("mixtral")
    model.config.dtype = stated
    with pytest.raises(UnsupportedError, match="where:    the config of a MixtralForCausalLM"):
        dtype_to_save("auto", model, ())
