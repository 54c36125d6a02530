"""Tests of checkpoints of codes and scales: the device decodes them to the same values as the CPU."""

import itertools

import pytest
import torch

import automodel_conv as amc
from automodel_conv.upstream.registry import transformers_available
from tests.gpu.models import assert_same, launched, on, write_fp8, write_mxfp4
from tests.gpu.place import PLACE, Place, on_host

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(not transformers_available(), reason="builds a transformers model")


@pytest.fixture(scope="module")
def quantized(checkpoint, tmp_path_factory):
    """Return directories by the quantization of the experts."""
    directories = {name: tmp_path_factory.mktemp(name) for name in ("fp8", "mxfp4")}
    torch.manual_seed(0)
    write_fp8(checkpoint, directories["fp8"])
    write_mxfp4(directories["mxfp4"])
    return directories


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        *itertools.product(["fp8", "mxfp4"], [None, "nemo", "gpt_oss", "vllm", "vllm_w31"]),
        ("fp8", "vllm_trtllm_padded"),
    ],
)
def test_codes_are_decoded_as_on_the_cpu(name, layout, quantized, device, monkeypatch):
    with on_host():
        wanted = amc.load_state_dict(quantized[name], layout=layout)
    variants = launched(monkeypatch)
    loaded = amc.load_state_dict(quantized[name], layout=layout, **on(device))
    assert_same(loaded, wanted, device)
    if PLACE is not Place.INTERPRETER:
        assert any(variant.details for variant in variants)


@pytest.mark.parametrize("name", ["fp8", "mxfp4"])
def test_codes_are_decoded_into_another_dtype(name, quantized, device):
    with on_host():
        wanted = amc.load_state_dict(quantized[name], dtype=torch.float32)
    assert_same(amc.load_state_dict(quantized[name], dtype=torch.float32, **on(device)), wanted, device)


@pytest.mark.parametrize("name", ["fp8", "mxfp4"])
def test_decoded_weights_are_loaded_in_place(name, quantized, device):
    with on_host():
        wanted = amc.load_state_dict(quantized[name])
        loaded = amc.load_state_dict(quantized[name])
    for tensor in loaded.values():
        tensor.view(-1).view(torch.uint8).fill_(0xA5)
    module = torch.nn.Module()
    for key, tensor in loaded.items():
        _put(module, key, tensor.to(device))
    places = {key: tensor.data_ptr() for key, tensor in module.state_dict().items()}
    plan = amc.compile_plan(quantized[name])
    assert {target.name for target in plan.targets} == places.keys()
    amc.load_model(module, quantized[name], rules=_rules(name), **on(device))
    assert_same(module.state_dict(), wanted, device)
    assert {key: tensor.data_ptr() for key, tensor in module.state_dict().items()} == places


def _rules(name):
    return amc.get_checkpoint_conversion_mapping({"fp8": "qwen3_moe", "mxfp4": "gpt_oss"}[name]) or []


def _put(module, key, tensor):
    """Set a parameter under a dotted name."""
    *path, leaf = key.split(".")
    for part in path:
        if part not in module._modules:
            module.add_module(part, torch.nn.Module())
        module = module._modules[part]
    module.register_parameter(leaf, torch.nn.Parameter(tensor, requires_grad=False))
