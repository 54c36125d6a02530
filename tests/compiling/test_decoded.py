"""Tests of the table of a checkpoint: codes become the weights that they hold if a config describes them."""

import json

import pytest
import torch

from automodel_conv.compiling.decoded import decoded_table
from automodel_conv.errors import CheckpointError, QuantizationError
from automodel_conv.planning.arrangement import PLAIN, Arrangement
from tests.compiling.support import tensors_of, write

FP8 = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [2, 2]}}
INT4 = {
    "quantization_config": {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"0": {"weights": {"num_bits": 4, "type": "int", "strategy": "channel"}}},
    }
}


def fp8_tensors():
    return {"a.weight": torch.ones(4, 6).to(torch.float8_e4m3fn), "a.weight_scale_inv": torch.ones(2, 3)}


def int4_tensors(columns):
    return {
        "a.weight_packed": torch.zeros(2, 2, dtype=torch.int32),
        "a.weight_scale": torch.ones(2, 1),
        "a.weight_shape": torch.tensor([2, columns]),
    }


def test_plain_tensors_are_listed_as_they_are_stored(tmp_path):
    checkpoint = write(tmp_path, tensors_of({"b": (2, 3), "a": ()}))
    table = decoded_table(checkpoint, needs_values=True)
    assert (table.names, table.dtypes, table.shapes) == (checkpoint.names, checkpoint.dtypes, checkpoint.shapes)
    assert not table.decodes
    assert not table.hidden


def test_codes_become_weights_and_their_scales_are_hidden(tmp_path):
    table = decoded_table(write(tmp_path, fp8_tensors(), config=FP8), needs_values=True)
    row, scales = table.names.index("a.weight"), table.names.index("a.weight_scale_inv")
    assert (table.dtypes[row], table.shapes[row]) == ("BF16", (4, 6))
    assert table.decodes[row].scales == scales
    assert table.hidden == {scales}


@pytest.mark.parametrize(
    ("config", "dtype"),
    [
        ({"torch_dtype": "float16"}, "F16"),
        ({"dtype": "torch.float32", "torch_dtype": "float16"}, "F32"),
        ({"text_config": {"dtype": "float16"}}, "F16"),
        ({"dtype": "auto"}, "BF16"),
        ({"dtype": "int8"}, "BF16"),
        ({"dtype": None}, "BF16"),
    ],
    ids=str,
)
def test_decoded_weights_have_the_dtype_that_the_config_states(tmp_path, config, dtype):
    tensors = {**fp8_tensors(), "b": torch.ones(2).bfloat16()}
    table = decoded_table(write(tmp_path, tensors, config=FP8 | config), needs_values=True)
    assert dict(zip(table.names, table.dtypes, strict=True)) == {
        "a.weight": dtype,
        "a.weight_scale_inv": "F32",
        "b": "BF16",
    }


def test_settings_of_modelopt_are_read_from_its_own_file(tmp_path):
    tensors = {"a.weight": torch.ones(4, 6).to(torch.float8_e4m3fn), "a.weight_scale": torch.ones(())}
    (tmp_path / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": "FP8"}}))
    assert decoded_table(write(tmp_path, tensors), needs_values=True).decodes


def test_codes_without_a_config_are_an_error_only_if_values_are_wanted(tmp_path):
    checkpoint = write(tmp_path, fp8_tensors(), config={})
    with pytest.raises(QuantizationError, match=r"a\.weight has the form of quantized codes(.|\n)*config\.json"):
        decoded_table(checkpoint, needs_values=True)
    assert "F8_E4M3" in decoded_table(checkpoint, needs_values=False).dtypes


def test_config_that_contradicts_the_tensors_is_an_error(tmp_path):
    config = {"quantization_config": FP8["quantization_config"] | {"weight_block_size": [4, 4]}}
    with pytest.raises(QuantizationError, match=r"config\.json(.|\n)*expected \[1, 2\], found \[2, 3\]"):
        decoded_table(write(tmp_path, fp8_tensors(), config=config), needs_values=False)


def test_malformed_config_is_an_error(tmp_path):
    checkpoint = write(tmp_path, fp8_tensors())
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        decoded_table(checkpoint, needs_values=False)


def test_rows_that_end_in_padding_are_narrower_than_their_codes(tmp_path):
    for columns, arrangement in ((16, PLAIN), (13, Arrangement(width=13))):
        table = decoded_table(write(tmp_path, int4_tensors(columns), config=INT4), needs_values=True)
        row = table.names.index("a.weight")
        assert (table.shapes[row], table.decodes[row].matrix) == ((2, 16), (2, 16))
        assert table.decodes[row].arrangement == arrangement


def test_true_shape_that_does_not_fit_the_codes_is_an_error(tmp_path):
    with pytest.raises(QuantizationError, match=r"a\.weight_shape does not fit(.|\n)*9 to 16(.|\n)*\[2, 8\]"):
        decoded_table(write(tmp_path, int4_tensors(8), config=INT4), needs_values=True)
