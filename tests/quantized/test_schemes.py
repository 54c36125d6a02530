"""Every scheme, from files as its producers write them, to numbers that are right to the last bit."""

import json

import pytest
import torch
from safetensors.torch import save_file

pytest.importorskip("transformers", reason="producers are transformers, and compressed-tensors, which needs it")

import automodel_conv as amc
from automodel_conv.testing import assert_bytes_equal
from tests.kernels.test_code_tables import rounded
from tests.quantized.producers import PRODUCERS


def weight(rows, columns, dtype=torch.bfloat16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, columns, generator=generator) * 0.05).to(dtype)


def write(directory, producer, weights):
    """A checkpoint in two files, the codes of some weights in another than their scales; and the exact numbers."""
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


@pytest.mark.parametrize("wanted", [torch.bfloat16, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", PRODUCERS)
def test_what_producers_write_is_decoded_and_rounded_once(tmp_path, name, wanted):
    exact = write(tmp_path, PRODUCERS[name], {"a.weight": weight(96, 128), "b.weight": weight(128, 256, seed=1)})
    loaded = amc.load_state_dict(tmp_path, rules=[], dtype=wanted)
    assert loaded.keys() == exact.keys()
    for key, tensor in loaded.items():
        assert_bytes_equal(tensor, rounded(exact[key].numpy(), wanted))
