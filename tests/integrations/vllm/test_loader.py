"""Tests of the load format: what it does with a model, and when it leaves the load to vLLM's default loader."""

from __future__ import annotations

import logging
import os
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from automodel_conv.errors import CheckpointError
from tests import loopback_hub, loopback_web

SOURCES = {
    "layer.q": torch.arange(6.0).reshape(2, 3),
    "layer.k": torch.arange(6.0).reshape(2, 3) + 10,
    "norm": torch.arange(3.0) + 1,
}


class Model(nn.Module):
    """A model with a fused parameter, as vLLM's have."""

    def __init__(self):
        super().__init__()
        self.qk, self.norm = (nn.Parameter(torch.full(shape, -1.0)) for shape in [(4, 3), (3,)])
        self.rank, self.calls = 0, 0

    def load_weights(self, weights):
        self.calls += 1
        loaded = set()
        for name, tensor in weights:
            if name.endswith((".q", ".k")):
                self.qk.data.narrow(0, 0 if name.endswith("q") else 2, 2).copy_(tensor)
                loaded.add("qk")
            elif name.endswith("norm"):
                self.norm.data.copy_(tensor)
                loaded.add("norm")
        return loaded


def save(directory, tensors=SOURCES):
    directory.mkdir(exist_ok=True)
    save_file(tensors, directory / "model.safetensors")
    return directory


def loader(vllm, **extra):
    """Return a loader of the load format."""
    from vllm.config import LoadConfig
    from vllm.model_executor.model_loader import get_model_loader

    return get_model_loader(LoadConfig("automodel_conv", extra))


def load(vllm, directory, model, *, quantization=None, settings="", token=None, **extra):
    """Load a model as an engine does; return the loader."""
    from vllm.config import ModelConfig, VllmConfig, set_current_vllm_config

    made = loader(vllm, **extra)
    config = ModelConfig(str(directory), quantization=quantization, hf_token=token)
    with set_current_vllm_config(VllmConfig(config, made.load_config, settings)):
        made.load_weights(model, config)
    return made


def is_filled(model, sources=SOURCES):
    qk = torch.cat([sources["layer.q"], sources["layer.k"]])
    return torch.equal(model.qk, qk) and torch.equal(model.norm, sources["norm"])


def test_model_is_filled_by_a_plan(vllm, tmp_path):
    model = Model()
    made = load(vllm, save(tmp_path / "model"), model)
    assert is_filled(model)
    assert (made._default.loads, model.calls) == (0, 1)


def test_second_process_finds_the_trace(vllm, tmp_path):
    class NeverCalled(Model):
        def load_weights(self, weights):
            raise AssertionError

    NeverCalled.__qualname__ = Model.__qualname__
    for make in (Model, NeverCalled):
        model = make()
        load(vllm, save(tmp_path / "model"), model)
        assert is_filled(model)
    assert [file.suffix for file in (tmp_path / "cache" / "automodel_conv").iterdir()] == [".json"]


@pytest.mark.parametrize("extra", [{"trace_cache": None}, {"trace_cache": "own"}])
def test_trace_cache_is_an_option(vllm, extra, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    load(vllm, save(tmp_path / "model"), Model(), **extra)
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "model") == [
        name for name in [extra["trace_cache"]] if name
    ]


@pytest.mark.parametrize("kind", ["file", "read-only"])
def test_load_does_not_depend_on_vllms_own_cache(vllm, kind, tmp_path, monkeypatch, caplog):
    if kind == "file":
        (tmp_path / "cache").touch()
    else:
        monkeypatch.setattr(os, "access", lambda *_: False)
    model = Model()
    with caplog.at_level(logging.WARNING):
        load(vllm, save(tmp_path / "model"), model)
    assert is_filled(model)
    assert "No trace is kept" in caplog.text


def test_check_of_parameters_does_not_depend_on_traces_without_it(vllm, tmp_path):
    directory = save(tmp_path / "model", {"norm": SOURCES["norm"]})
    load(vllm, directory, Model(), enable_weights_track=False)
    with pytest.raises(ValueError, match="not initialized from checkpoint"):
        load(vllm, directory, Model())


def test_no_trace_is_kept_without_vllms_settings(vllm, tmp_path):
    from vllm.config import ModelConfig

    model = Model()
    loader(vllm).load_weights(model, ModelConfig(str(save(tmp_path / "model"))))
    assert is_filled(model)
    assert not [*tmp_path.rglob("*.json")]


def test_parameter_without_weights_is_vllms_error_and_nothing_is_written(vllm, tmp_path):
    directory = save(tmp_path / "model", {name: SOURCES[name] for name in ["layer.q", "layer.k"]})
    model = Model()
    with pytest.raises(ValueError, match=r"not initialized from checkpoint: {'norm'}"):
        load(vllm, directory, model)
    assert bool((model.qk == -1).all())
    assert not [*tmp_path.rglob("*.json")]


@pytest.mark.parametrize(
    ("quantization", "extra", "is_error"),
    [("fp8", {}, False), ("fp8", {"enable_weights_track": True}, True), (None, {"enable_weights_track": False}, False)],
)
def test_parameters_are_checked_when_the_default_loader_checks_them(vllm, quantization, extra, is_error, tmp_path):
    directory = save(tmp_path / "model", {"norm": SOURCES["norm"]})
    try:
        load(vllm, directory, Model(), quantization=quantization, **extra)
        was_error = False
    except ValueError:
        was_error = True
    assert was_error is is_error


def test_error_of_load_weights_is_raised_as_it_is(vllm, tmp_path):
    class Strict(Model):
        def load_weights(self, weights):
            for name, _ in weights:
                raise KeyError(name)

    with pytest.raises(KeyError, match="layer"):
        load(vllm, save(tmp_path / "model"), Strict())


def test_prefixes_of_secondary_weights_are_put_before_names(vllm, tmp_path):
    first, second = tmp_path / "model", tmp_path / "other"
    save(first, {"layer.q": SOURCES["layer.q"], "layer.k": SOURCES["layer.k"]})
    save(second, {"norm": SOURCES["norm"]})
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    model = Model()
    model.secondary_weights = [DefaultModelLoader.Source(str(second), None, prefix="deep.")]
    names = []
    own = model.load_weights
    model.load_weights = lambda weights: own((names.append(name) or name, tensor) for name, tensor in weights)
    load(vllm, first, model, trace_cache=None)
    assert is_filled(model)
    assert set(names) == {"layer.q", "layer.k", "deep.norm"}


def test_of_tensors_with_one_name_the_last_file_counts(vllm, tmp_path):
    directory = save(tmp_path / "model")
    save_file({"norm": torch.full((3,), 5.0)}, directory / "second.safetensors")
    model = Model()
    load(vllm, directory, model)
    assert is_filled(model, {**SOURCES, "norm": torch.full((3,), 5.0)})


class Quantized(Model):
    is_quantized_online = True


class Adding(Model):
    """A model whose loading code adds a part to it."""

    def load_weights(self, weights):
        given = dict(weights)
        self.added = nn.Linear(2, 2, bias=False)
        self.added.weight.data.copy_(given["layer.q"][:, :2])
        super().load_weights(given.items())


@pytest.mark.parametrize("make", [Quantized, Adding])
def test_models_that_cannot_be_planned_are_left_to_the_default_loader(vllm, make, tmp_path, caplog):
    model = make()
    with caplog.at_level(logging.WARNING):
        made = load(vllm, save(tmp_path / "model"), model)
    assert made._default.loads == 1
    assert is_filled(model)
    assert "default loader" in caplog.text


def test_pickled_weights_are_left_to_the_default_loader(vllm, tmp_path, caplog):
    (tmp_path / "model").mkdir()
    torch.save(SOURCES, tmp_path / "model" / "pytorch_model.bin")
    model = Model()
    with caplog.at_level(logging.WARNING):
        load(vllm, tmp_path / "model", model)
    assert is_filled(model)
    assert "pickled" in caplog.text


def test_computed_parameters_are_told(vllm, tmp_path, caplog):
    class Scaled(Model):
        def load_weights(self, weights):
            return super().load_weights((name, -tensor if name == "norm" else tensor) for name, tensor in weights)

    model = Scaled()
    with caplog.at_level(logging.INFO):
        load(vllm, save(tmp_path / "model"), model)
    assert is_filled(model, {**SOURCES, "norm": -SOURCES["norm"]})
    assert "norm: aten.neg" in caplog.text


@pytest.mark.parametrize(
    ("extra", "found"),
    [
        ({"concurrency": 4, "enable_multithread_load": True}, "concurrency, enable_multithread_load"),
        ({"threads": "many"}, "'many'"),
        ({"threads": 0}, "0"),
        ({"threads": True}, "True"),
        ({"huge_pages": 1}, "1"),
        ({"trace_cache": 5}, "5"),
        ({"weights": 5}, "5"),
        ({"storage_options": "anon"}, "str"),
        ("none", "str"),
    ],
)
def test_wrong_extra_settings_are_named(vllm, extra, found):
    from vllm.config import LoadConfig
    from vllm.model_executor.model_loader import get_model_loader

    with pytest.raises(ValueError, match=rf"found: +{found}\n(.*\n)*.*--model-loader-extra-config"):
        get_model_loader(LoadConfig("automodel_conv", extra))


def test_settings_reach_the_load(vllm, tmp_path, monkeypatch):
    import automodel_conv.integrations.vllm.loader as own  # beside the stand-in

    seen = {}
    real = own.load_with
    monkeypatch.setattr(own, "load_with", lambda *args, **options: seen.update(options) or real(*args, **options))
    load(vllm, save(tmp_path / "model"), Model(), threads=1, scratch_bytes=1 << 20, huge_pages=False)
    assert {name: seen[name] for name in ("threads", "scratch_bytes", "huge_pages", "progress")} == {
        "threads": 1,
        "scratch_bytes": 1 << 20,
        "huge_pages": False,
        "progress": False,
    }


def test_missing_checkpoint_is_an_error_before_anything_is_written(vllm, tmp_path):
    directory = save(tmp_path / "model")
    (directory / "model.safetensors").write_bytes(b"broken")
    model = Model()
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        load(vllm, directory, model)
    assert bool((model.qk == -1).all())


def test_weights_are_read_from_a_url_by_range(vllm, tmp_path):
    save(tmp_path / "model")
    (tmp_path / "config").mkdir()
    with loopback_web.serve(tmp_path / "model", authorization="Bearer x") as web:
        model = Model()
        options = {"headers": {"Authorization": web.authorization}}
        load(vllm, tmp_path / "config", model, weights=web.url, storage_options=options)
    assert is_filled(model)
    assert all(one.range for one in web.of(".safetensors"))


def test_url_that_vllm_states_for_the_weights_is_read(vllm, tmp_path):
    from vllm.config import ModelConfig

    with loopback_web.serve(save(tmp_path / "model")) as web:
        model = Model()
        loader(vllm).load_weights(model, ModelConfig(str(tmp_path), model_weights=web.url))
    assert is_filled(model)


def test_repository_is_read_by_range_and_not_downloaded(vllm, tmp_path, monkeypatch):
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    first, second = save(tmp_path / "first", {"norm": SOURCES["norm"]}), tmp_path / "second"
    save(second, {name: SOURCES[name] for name in ("layer.q", "layer.k")})
    with loopback_hub.serve({"org/first": first, "org/second": second}, token="hidden") as hub:
        loopback_hub.use(hub, tmp_path / "cache", monkeypatch)
        model = Model()
        model.secondary_weights = [DefaultModelLoader.Source("org/second", None, prefix="deep.")]
        load(vllm, "org/first", model, token="hidden", trace_cache=None)
    assert is_filled(model)
    assert all(request.range for request in hub.requests_of(".safetensors"))
    assert not [*(tmp_path / "cache").rglob("*.safetensors")]


def test_weights_can_be_downloaded_and_reloaded(vllm, tmp_path):
    config = SimpleNamespace(model=str(save(tmp_path / "model")), revision=None)
    made = loader(vllm)
    made.download_model(config)
    assert dict(made.get_all_weights(config, Model())).keys() == SOURCES.keys()
