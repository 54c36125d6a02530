"""Tests of functions over a web server: quantized files of every producer, adapters, loading code, plans, ranges."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers", reason="builds models of transformers")

import automodel_conv as amc
from tests.comparing import assert_same, tensors_of
from tests.doors.adapters.support import MODULES, default_adapter, factors, merged, published, write_base
from tests.loading_code.loads import SOURCES, checkpoint_of
from tests.loopback_store import serve
from tests.quantized.producers import PRODUCERS
from tests.quantized.test_models import quantized, small_mixtral

QUICK = ("int4 g32 with zero points", "gptq v2")
"""Producers that are tested by default."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.long]) for name in PRODUCERS]
)
def test_codes_of_every_producer_are_decoded_over_http_as_from_files(tmp_path, name):
    directory = tmp_path / "published"
    directory.mkdir()
    quantized("mixtral", directory, PRODUCERS[name], small_mixtral(128))
    with serve(directory) as server:
        for options in ({}, {"layout": "nemo"}, {"dtype": torch.float32}, {"rules": [], "dequantize": False}):
            local = amc.load_state_dict(directory, **options)
            for threads in (None, 1):
                assert_same(amc.load_state_dict(server.url, threads=threads, **options), local)
        amc.convert_checkpoint(server.url, tmp_path / "plain", dequantize=True, layout="nemo")
        assert_same(tensors_of(tmp_path / "plain"), dict(amc.load_state_dict(directory, layout="nemo")))


@pytest.fixture
def place(tmp_path):
    """Return a directory with a base, an adapter, and the merged base."""
    write_base(tmp_path / "base", published(), files=2)
    write_base(tmp_path / "merged", merged(published(), factors(*MODULES)))
    default_adapter(tmp_path / "adapter")
    return tmp_path


@pytest.mark.parametrize("layout", [None, "nemo", "vllm"])
def test_adapter_is_merged_into_a_base_over_http(place, layout):
    expected = amc.load_state_dict(place / "merged", layout=layout)
    with serve(place) as server:
        for base, adapter in (
            (f"{server.url}/base", place / "adapter"),
            (place / "base", f"{server.url}/adapter"),
            (f"{server.url}/base", f"{server.url}/adapter"),
        ):
            assert_same(amc.load_state_dict(base, adapter=adapter, layout=layout), expected)


def test_merged_checkpoint_is_written_from_a_base_over_http(place):
    with serve(place) as server:
        amc.merge_adapter(f"{server.url}/base", f"{server.url}/adapter", place / "remote")
    amc.merge_adapter(place / "base", place / "adapter", place / "local")
    assert_same(tensors_of(place / "remote"), tensors_of(place / "local"))


def test_loading_code_copies_and_computes_over_http(tmp_path):
    def load(pairs):
        tensors = dict(pairs)
        return {"copied": tensors["a"], "computed": tensors["a"].float().exp()}

    path = checkpoint_of(tmp_path)
    expected = load(SOURCES.items())
    with serve(tmp_path) as server:
        found = amc.load_with(load, f"{server.url}/{path.name}")
        assert_same(found, expected)
        assert_same(amc.load_with(load, amc.open_checkpoint(server.url)), expected)


def test_plan_of_a_url_is_that_of_the_files_and_loads_from_them(tmp_path):
    write_base(tmp_path / "base", published(), files=2)
    model = {"layout": "nemo"}
    with serve(tmp_path / "base") as server:
        plan, local = (amc.compile_plan(path, **model) for path in (server.url, tmp_path / "base"))
        assert plan.targets == local.targets
        assert plan.bytes_read == local.bytes_read
        assert_same(amc.load_state_dict(server.url, plan=local), amc.load_state_dict(tmp_path / "base", **model))


def test_plan_and_reports_show_no_credentials(tmp_path):
    write_base(tmp_path / "base", published(), files=2)
    with serve(tmp_path / "base", query="token=classified") as server:
        url = server.url.replace("://", "://user:classified@") + "?token=classified"
        options = {"storage_options": {"headers": {"X-Key": "classified"}}}
        checkpoint = amc.open_checkpoint(url, **options)
        plan = amc.compile_plan(url, layout="nemo", **options)
        loaded = amc.load_state_dict(url, layout="nemo", **options)
        report = amc.convert_checkpoint(url, tmp_path / "new", layout="nemo", **options)
        texts = [repr(checkpoint), repr(checkpoint.sources), repr(plan), str(plan), plan.summary(), plan.to_json()]
        texts += [repr(loaded.report), str(loaded.report), repr(report), str(report)]
        assert not [text[:300] for text in texts if "classified" in text]
    written = [path for path in (tmp_path / "new").rglob("*") if path.is_file() and b"classified" in path.read_bytes()]
    assert written == []
