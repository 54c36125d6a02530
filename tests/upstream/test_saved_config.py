"""Tests of configs next to the weights, against those that ``save_pretrained`` writes."""

import json
from unittest import mock

import pytest
import torch
from torch import nn

pytest.importorskip("transformers", reason="the configs are those of transformers")

from transformers import AutoConfig

from automodel_conv.upstream.saved_config import write_config
from tests.model_zoo import EXCLUDED, build_model, zoo_names


@pytest.fixture
def mixtral():
    return build_model("mixtral")


def config_in(directory, name="config.json"):
    return json.loads((directory / name).read_text())


def test_other_modules_have_no_config(tmp_path):
    write_config(nn.Linear(2, 2), None, str(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_configs_are_those_of_save_pretrained(tmp_path, mixtral):
    mixtral.save_pretrained(tmp_path / "upstream")
    (tmp_path / "ours").mkdir()
    write_config(mixtral, None, str(tmp_path / "ours"))
    written = sorted(path.name for path in (tmp_path / "ours").iterdir())
    assert written == ["config.json", "generation_config.json"]
    for name in written:
        assert config_in(tmp_path / "ours", name) == config_in(tmp_path / "upstream", name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, None])
def test_dtype_is_that_of_the_files(tmp_path, mixtral, dtype):
    write_config(mixtral, dtype, str(tmp_path))
    assert config_in(tmp_path)["dtype"] == str(dtype or torch.bfloat16).removeprefix("torch.")
    assert mixtral.config.dtype == torch.bfloat16


def test_class_is_that_of_transformers_and_not_of_a_wrapper(tmp_path, mixtral):
    kind = type(mixtral)
    mixtral.__class__ = type("FSDPMixtral", (kind,), {"__module__": "torch.distributed.fsdp"})
    write_config(mixtral, None, str(tmp_path))
    assert config_in(tmp_path)["architectures"] == [kind.__name__]


@pytest.mark.parametrize("codes", [False, True])
def test_quantization_is_described_only_if_the_model_has_codes(tmp_path, mixtral, codes):
    mixtral.config.quantization_config = {"quant_method": "fp8"}
    if codes:
        mixtral.extra = nn.Parameter(torch.zeros(2).to(torch.float8_e4m3fn), requires_grad=False)
    write_config(mixtral, None, str(tmp_path))
    assert ("quantization_config" in config_in(tmp_path)) is codes
    assert mixtral.config.quantization_config == {"quant_method": "fp8"}


@pytest.mark.sweep
@pytest.mark.parametrize("name", [name for name in zoo_names() if name not in EXCLUDED])
def test_configs_of_every_type_are_those_of_save_pretrained(tmp_path, name):
    with torch.device("meta"), mock.patch("tests.model_zoo.fill"):
        model = build_model(name)
    for number in range(2):  # the second time with the config that the first wrote
        upstream, ours = tmp_path / f"upstream {number}", tmp_path / f"ours {number}"
        model.save_pretrained(upstream, state_dict={})
        ours.mkdir()
        write_config(model, None, str(ours))
        written = {path.name: path.read_text() for path in ours.iterdir()}
        assert written == {path.name: path.read_text() for path in upstream.glob("*.json")}
        model.config = AutoConfig.from_pretrained(ours)
