"""Tests of every scheme: files of its producers decode to values that are right to the last bit."""

import json
from math import prod

import pytest
import torch
from safetensors.torch import save_file

pytest.importorskip("transformers", reason="needs transformers, as compressed-tensors does")

import automodel_conv as amc
from automodel_conv.testing import assert_bytes_equal
from tests.kernels.test_code_tables import rounded
from tests.quantized.producers import PRODUCERS, block_wise, fine_grained


def weight(rows, columns, dtype=torch.bfloat16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, columns, generator=generator) * 0.05).to(dtype)


def write(directory, producer, weights):
    """Write a checkpoint in two files, with some codes and their scales in different files; return the exact values."""
    files = {"model-1.safetensors": {}, "model-2.safetensors": {}}
    exact = {}
    for n, (name, tensor) in enumerate(weights.items()):
        stored, exact[name] = producer.make(tensor)
        for k, (suffix, part) in enumerate(stored.items()):
            full = name.rpartition(".")[0] + suffix if suffix.startswith(".") else name + suffix
            files[f"model-{1 + (n * k) % 2}.safetensors"][full] = part.contiguous()
    directory.mkdir(exist_ok=True)
    for file, tensors in files.items():
        save_file(tensors, directory / file)
    weight_map = {name: file for file, tensors in files.items() for name in tensors}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (directory / "config.json").write_text(json.dumps({"quantization_config": producer.config}))
    return exact


@pytest.mark.parametrize("block", [(2, 5), (4, 4), (7, 13), (128, 128)], ids=str)
def test_an_odd_number_of_codes(tmp_path, block):
    exact = write(tmp_path, fine_grained(block), {"a.weight": weight(7, 13), "b.weight": weight(1, 1)})
    for scratch_bytes in (None, 4096):
        loaded = amc.load_state_dict(tmp_path, rules=[], threads=1, scratch_bytes=scratch_bytes)
        for key, tensor in loaded.items():
            assert_bytes_equal(tensor, rounded(exact[key].numpy(), torch.bfloat16))


@pytest.mark.parametrize("wanted", [torch.bfloat16, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", PRODUCERS)
def test_files_of_producers_are_decoded_and_rounded_once(tmp_path, name, wanted):
    exact = write(tmp_path, PRODUCERS[name], {"a.weight": weight(96, 128), "b.weight": weight(128, 256, seed=1)})
    loaded = amc.load_state_dict(tmp_path, rules=[], dtype=wanted)
    assert loaded.keys() == exact.keys()
    for key, tensor in loaded.items():
        assert_bytes_equal(tensor, rounded(exact[key].numpy(), wanted))


@pytest.mark.parametrize("shape", [(6, 10, 32), (3, 16, 16), (1, 1, 32), (5, 1, 16), (2, 2, 3, 64)], ids=str)
def test_each_matrix_of_a_stack_has_its_own_global_scale(tmp_path, shape):
    producer = PRODUCERS["nvfp4 of modelopt"]
    stack = weight(prod(shape[:-1]), shape[-1]).view(shape) * torch.arange(1, shape[0] + 1).view(
        -1, *[1] * (len(shape) - 1)
    )
    exact = write(tmp_path, producer, {"a.weight": stack})["a.weight"]
    for scratch_bytes in (None, 4096):
        loaded = amc.load_state_dict(tmp_path, rules=[], threads=1, scratch_bytes=scratch_bytes)
        assert_bytes_equal(loaded["a.weight"], rounded(exact.numpy(), torch.bfloat16))


@pytest.mark.parametrize("block", [(5, 4), (3, 16), (10, 32)], ids=str)
def test_blocks_of_grouped_experts_end_with_each_expert(tmp_path, block):
    each = [block_wise(weight(10, 32, seed=seed), block) for seed in range(6)]
    stored = {"experts.down_proj" + suffix: torch.stack([parts[suffix] for parts, _ in each]) for suffix in each[0][0]}
    save_file(stored, tmp_path / "model.safetensors")
    config = {"quant_method": "fp8", "weight_block_size": list(block)}
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": config}))
    expected = torch.stack([rounded(exact.numpy(), torch.bfloat16) for _, exact in each])
    for scratch_bytes in (None, 4096):
        loaded = amc.load_state_dict(tmp_path, rules=[], threads=1, scratch_bytes=scratch_bytes)
        assert_bytes_equal(loaded["experts.down_proj"], expected)
