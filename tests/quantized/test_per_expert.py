"""Tests of quantized per-expert tensors of types that are published grouped, and of grouped ones with their scales."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("transformers", reason="needs transformers")

import automodel_conv as amc
from automodel_conv.testing import assert_bytes_equal
from tests.kernels.test_code_tables import rounded
from tests.quantized.per_expert import MODELS, gemma4, granite, granite_hybrid, write_per_expert
from tests.quantized.producers import PRODUCERS, Producer, fp4_values, spread


def nvfp4(weight):
    """Quantize in modelopt's format of nvidia/Gemma-4-26B-A4B-NVFP4; gate and up have different global scales."""
    codes = torch.randint(0, 256, (weight.shape[0], weight.shape[1] // 2), dtype=torch.uint8)
    scales = (torch.rand(weight.shape[0], weight.shape[1] // 16) * 8 + 0.1).to(torch.float8_e4m3fn)
    common = weight.float().abs().amax() / 2688
    parts = {"": codes, "_scale": scales, "_scale_2": common, "\0input_scale": torch.ones(())}
    return parts, fp4_values(codes) * spread(scales, (1, 16), weight.shape) * common.double()


MODELOPT = Producer({"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16}, nvfp4)
CASES = {
    "FP8 per channel": PRODUCERS["fp8 per channel"],  # Granite's FP8_DYNAMIC
    "INT4": PRODUCERS["int4 g32"],  # w4a16
    "NVFP4 of compressed-tensors": PRODUCERS["nvfp4"],
    "NVFP4 of modelopt": MODELOPT,
}


def grouped_values(model, exact):
    """Return the state of a model with the exact values of its experts, rounded once."""
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    values = {name: rounded(value.numpy(), torch.bfloat16) for name, value in exact.items()}
    for name in state:
        path = name.removesuffix(".gate_up_proj")
        if path != name:
            for expert in range(len(state[name])):
                halves = [values[f"{path}.{expert}.{half}_proj.weight"] for half in ("gate", "up")]
                state[name][expert] = torch.cat(halves)
                state[f"{path}.down_proj"][expert] = values[f"{path}.{expert}.down_proj.weight"]
    return state


def assert_same(tensors, expected):
    assert tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert_bytes_equal(tensors[name], tensor)


def grouped(make):
    """Return a model whose experts are matrices of 64 x 32, if the installed transformers groups its experts."""
    model = make(3, 64, 32)
    if not any(name.endswith(".gate_up_proj") for name in model.state_dict()):
        pytest.skip("this transformers does not group these experts")
    return model


def written(model, directory, producer):
    exact = write_per_expert(model, directory, producer)
    file = directory / "model.safetensors"
    stored = {name.replace("weight\0", ""): tensor for name, tensor in load_file(file).items()}
    save_file(stored, file, metadata={"format": "pt"})
    return exact


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ["granite", "granite hybrid", "gemma 4"])
def test_every_door_decodes_and_groups_them(tmp_path, name, case):
    model = grouped(MODELS[name])
    expected = grouped_values(model, written(model, tmp_path / "published", CASES[case]))
    assert_same(amc.load_state_dict(tmp_path / "published"), expected)
    filled = MODELS[name](3, 64, 32)
    amc.load_model(filled, tmp_path / "published")
    assert_same(filled.state_dict(), expected)
    amc.convert_checkpoint(tmp_path / "published", tmp_path / "values", dequantize=True)
    assert "quantization_config" not in json.loads((tmp_path / "values" / "config.json").read_text())
    assert_same(type(model).from_pretrained(tmp_path / "values").state_dict(), expected)
    amc.convert_checkpoint(tmp_path / "published", tmp_path / "stored", rules=[])
    assert_same(load_file(tmp_path / "stored/model.safetensors"), load_file(tmp_path / "published/model.safetensors"))


@pytest.mark.parametrize("layout", ["transformers", "vllm"])
def test_fp8_codes_are_grouped_with_a_scale_for_each_row(tmp_path, layout):
    model = grouped(granite)
    expected = grouped_values(model, written(model, tmp_path / "published", CASES["FP8 per channel"]))
    amc.convert_checkpoint(tmp_path / "published", tmp_path / "kept", layout=layout)
    kept = amc.open_checkpoint(tmp_path / "kept")
    shapes = dict(zip(kept.names, kept.shapes, strict=True))
    first = "gate_up_proj" if layout == "transformers" else "w13_weight"
    assert shapes[f"model.layers.0.block_sparse_moe.experts.{first}"] == (3, 64, 64)
    assert shapes[f"model.layers.0.block_sparse_moe.experts.{first}_scale"] == (3, 64, 1)
    assert_same(amc.load_state_dict(tmp_path / "kept"), expected)


@pytest.mark.parametrize("make", [granite, granite_hybrid])
def test_scales_of_fused_experts_belong_to_their_rows(tmp_path, make):
    """Check Granite's fused FP8: ``input_linear.weight [E, 2I, H]`` and its ``weight_scale [E, 2I, 1]``."""
    model = grouped(make)
    model.save_pretrained(tmp_path)
    stored, exact = {}, {}
    for name, tensor in load_file(tmp_path / "model.safetensors").items():
        if tensor.dim() != 3 or "block_sparse_moe" not in name:
            stored[name] = tensor
            continue
        parts = [PRODUCERS["fp8 per channel"].make(matrix) for matrix in tensor]
        stored |= {name + suffix: torch.stack([part[suffix] for part, _ in parts]) for suffix in ("", "_scale")}
        exact[name] = torch.stack([value for _, value in parts])
    save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    settings = dict(PRODUCERS["fp8 per channel"].config)
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    loaded = amc.load_state_dict(tmp_path)
    for name, value in exact.items():
        end = {"input_linear.weight": "gate_up_proj", "output_linear.weight": "down_proj"}
        path, _, tail = name.rpartition("block_sparse_moe.")
        assert stored[f"{name}_scale"].shape == (*value.shape[:2], 1)
        parameter = f"{path}block_sparse_moe.experts.{end[tail]}"
        assert_bytes_equal(loaded[parameter], rounded(value.numpy(), torch.bfloat16))


def test_a_part_that_is_missing_is_one_short_error(tmp_path):
    written(gemma4(3, 64, 32), tmp_path, MODELOPT)
    file = tmp_path / "model.safetensors"
    stored = load_file(file)
    absent = "model.layers.0.experts.1.up_proj.weight_scale_2"
    del stored[absent]
    save_file(stored, file, metadata={"format": "pt"})
    with pytest.raises(amc.QuantizationError) as error:
        amc.load_state_dict(tmp_path)
    assert absent in str(error.value)
    assert "1 problems" in str(error.value)
