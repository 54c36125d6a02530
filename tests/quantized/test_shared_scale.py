"""Tests of shards of a weight that share one scale: the n-gram embedding of Qwen3.8-Flash-Next-FP8."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("transformers", reason="needs transformers")

import automodel_conv as amc
from automodel_conv.testing import assert_bytes_equal
from tests.kernels.test_code_tables import rounded
from tests.model_zoo import build_model, zoo_names
from tests.quantized.producers import fine_grained

NAME = "qwen4_exp_text"
EMBEDDING = "model.layers.0.ple.ple_embedding.ngram_embedding"
SCALE = f"{EMBEDDING}.weight_scale"
CONFIG = {"quant_method": "fp8", "weight_block_size": [2, 2], "fmt": "e4m3", "scale_fmt": "float"}

pytestmark = pytest.mark.skipif(NAME not in zoo_names(), reason="this transformers does not have the type")


@pytest.fixture
def published(tmp_path):
    """Write a checkpoint with the scale in another file than the shards; return it and its exact state."""
    model, directory = build_model(NAME), tmp_path / "published"
    model.save_pretrained(directory)
    torch.manual_seed(0)
    stored, plain = {}, {}
    scale = torch.tensor(0.000199, dtype=torch.bfloat16)
    for name, tensor in load_file(directory / "model.safetensors").items():
        plain[name] = tensor
        if ".ngram_embedding.shard_" in name:
            stored[name] = tensor.float().mul(3000).to(torch.float8_e4m3fn)
            plain[name] = rounded((stored[name].double() * scale.double()).numpy(), torch.bfloat16)
        elif ".experts." in name:
            parts, exact = fine_grained((2, 2)).make(tensor)
            stored |= {name + suffix: part.contiguous() for suffix, part in parts.items()}
            plain[name] = rounded(exact.numpy(), torch.bfloat16)
        else:
            stored[name] = tensor
    stored[SCALE] = scale
    save_file(plain, directory / "model.safetensors", metadata={"format": "pt"})
    expected = type(model).from_pretrained(directory).state_dict()
    (directory / "model.safetensors").unlink()
    files = {name: f"model-0000{1 + (name == SCALE)}-of-00002.safetensors" for name in stored}
    for file in set(files.values()):
        part = {name: tensor for name, tensor in stored.items() if files[name] == file}
        save_file(part, directory / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": files}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"quantization_config": CONFIG}))
    return directory, expected, stored, type(model)


def assert_same(tensors, expected):
    assert tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert_bytes_equal(tensors[name], tensor)


def everything(directory):
    checkpoint = amc.open_checkpoint(directory)
    return dict(amc.load_state_dict(checkpoint.path, rules=[], dequantize=False))


def test_every_shard_is_decoded_by_the_one_scale(published, tmp_path):
    directory, expected, stored, model_class = published
    assert f"{EMBEDDING}.weight" in expected
    assert_same(amc.load_state_dict(directory), expected)
    filled = build_model(NAME, seed=1)
    amc.load_model(filled, directory)
    assert_same(filled.state_dict(), expected)
    amc.convert_checkpoint(directory, tmp_path / "values", dequantize=True, layout="per_expert")
    assert_same(model_class.from_pretrained(tmp_path / "values").state_dict(), expected)
    assert_same(everything(directory), stored)


def test_shards_are_joined_and_divided_again_with_the_one_scale(published, tmp_path):
    directory, expected, stored, _ = published
    amc.convert_checkpoint(directory, tmp_path / "joined", layout="vllm")
    joined = everything(tmp_path / "joined")
    names = [name for name in joined if name.startswith(EMBEDDING)]
    assert sorted(names) == [f"{EMBEDDING}.weight", SCALE]
    assert joined[f"{EMBEDDING}.weight"].dtype == torch.float8_e4m3fn
    assert_bytes_equal(joined[SCALE], stored[SCALE])
    assert_same(amc.load_state_dict(tmp_path / "joined"), expected)
    amc.convert_checkpoint(tmp_path / "joined", tmp_path / "back", layout="per_expert")
    assert_same(everything(tmp_path / "back"), stored)


def test_under_the_hook_they_are_not_cast_without_the_scale(published):
    directory, expected, _, model_class = published
    with amc.accelerate_transformers():
        loaded = model_class.from_pretrained(directory).state_dict()
    assert_same(
        {f"{EMBEDDING}.weight": loaded[f"{EMBEDDING}.weight"]}, {k: expected[k] for k in [f"{EMBEDDING}.weight"]}
    )


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda stored: stored.pop(SCALE), "shard_0.weight has no scale"),
        (lambda stored: stored.update({SCALE: torch.ones(2, 2)}), "found [2, 2]"),
        (lambda stored: stored.update({SCALE: torch.ones((), dtype=torch.int32)}), "is I32"),
    ],
    ids=["absent", "another shape", "another dtype"],
)
def test_a_wrong_scale_is_one_short_error(published, tmp_path, change, text):
    directory, _, stored, _ = published
    change(stored)
    for file in directory.glob("model*"):
        file.unlink()
    save_file(stored, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(amc.QuantizationError) as error:
        amc.load_state_dict(directory)
    assert text in str(error.value)
    assert len(str(error.value).splitlines()) < 30
