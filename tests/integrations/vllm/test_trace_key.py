"""Tests of the key of kept traces: it holds all that vLLM's loading code can see."""

from __future__ import annotations

import importlib
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn


def make_model(**attributes):
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    for name, value in attributes.items():
        setattr(model[1], name, value)
    return model


def key(model=None, *, quantization=None, tokenizer="", settings="", extra=None):
    from vllm.config import LoadConfig, ModelConfig, VllmConfig

    from automodel_conv.integrations.vllm.trace_key import trace_key

    config = ModelConfig("model", quantization=quantization, tokenizer=tokenizer)
    return trace_key(model or make_model(), config, VllmConfig(config, LoadConfig("", extra or {}), settings))


def test_key_of_equal_models_is_equal(vllm):
    assert key() == key()


@pytest.mark.parametrize(
    "changed",
    [
        {"model": make_model(tp_rank=1)},
        {"model": make_model(expert_map=torch.tensor([0, -1]))},
        {"model": make_model(config=SimpleNamespace(ep_size=2))},
        {"quantization": "fp8"},
        {"settings": "enable_expert_parallel"},
        {"extra": {"enable_weights_track": False}},
        {"tokenizer": "other"},
    ],
)
def test_key_depends_on(vllm, changed):
    assert key(**changed) != key()


def test_key_depends_on_the_rank(vllm, monkeypatch):
    from vllm.distributed import parallel_state

    keys = {key()}
    for rank, size in [(0, 1), (0, 2), (1, 2)]:
        monkeypatch.setattr(parallel_state, "_TP", SimpleNamespace(rank_in_group=rank, world_size=size))
        keys.add(key())
    assert len(keys) == 4


def test_key_depends_on_versions_and_environment(vllm, monkeypatch):
    keys = {key()}
    monkeypatch.setenv("VLLM_SETTING", "1")
    keys.add(key())
    monkeypatch.setattr(vllm, "__version__", "0.33.1")
    keys.add(key())
    assert len(keys) == 3


def test_ports_and_ids_do_not_count(vllm):
    one, other = (
        {"parallel": SimpleNamespace(master_port=port, instance_id=str(port), engine_id=str(port))} for port in (1, 2)
    )
    assert key(make_model(**one)) == key(make_model(**other))


def test_key_depends_on_the_code_of_the_model(vllm, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    keys = set()
    for number in (1, 2):
        (tmp_path / "own_model.py").write_text(
            f"from torch import nn\nclass Model(nn.Module):\n    number = {number}\n"
        )
        sys.modules.pop("own_model", None)
        keys.add(key(importlib.import_module("own_model").Model()))
    del sys.modules["own_model"]
    assert len(keys) == 2


@pytest.mark.parametrize("is_attribute", [False, True])
@pytest.mark.parametrize("changed", ["base", "helpers"])
def test_key_depends_on_the_code_of_the_whole_package(vllm, changed, is_attribute, tmp_path, monkeypatch):
    """The code is that of a model's package, or that of a quantization method in an attribute."""

    def own_key():
        own = importlib.import_module("own_models.model").Model()
        return key(make_model(quant_method=own) if is_attribute else own)

    package = tmp_path / "own_models"
    package.mkdir()
    (package / "__init__.py").touch()
    base = "nn.Module" if not is_attribute else "object"
    (package / "base.py").write_text(f"from torch import nn\nfrom . import helpers\nclass Base({base}):\n    pass\n")
    (package / "helpers.py").touch()
    (package / "model.py").write_text("from .base import Base\nclass Model(Base):\n    pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    keys = [own_key()]
    with (package / f"{changed}.py").open("a") as file:
        file.write("number = 2\n")
    keys.append(own_key())
    for name in [name for name in sys.modules if name.partition(".")[0] == "own_models"]:
        del sys.modules[name]
    assert keys[0] != keys[1]


def test_layers_of_other_models_do_not_count(vllm):
    one, other = ({"config": SimpleNamespace(static_forward_context={"target": make_model()})} for _ in range(2))
    other["config"].static_forward_context["draft"] = make_model()
    assert key(make_model(**one)) == key(make_model(**other))
