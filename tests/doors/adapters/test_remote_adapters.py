"""Tests of adapters and bases that are not on this machine: the same bytes as those of local ones, in few requests."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch

import automodel_conv as amc
from automodel_conv.errors import CheckpointError, UnsupportedError
from automodel_conv.execution import factors
from automodel_conv.files.staging import STAGING_NAME
from automodel_conv.lora.adapter import open_adapter
from tests import loopback_hub
from tests.cli.support import run
from tests.comparing import assert_same, contents
from tests.doors.adapters.support import default_adapter, published, write_base
from tests.loopback_web import serve

pytest.importorskip("transformers", reason="builds a transformers model")

HEADER = {"storage_options": {"headers": {"Authorization": "Bearer hidden"}}}
OF_HUB = {"token": "hidden"}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Return a directory with a base in three files and an adapter with a file of its own."""
    root = tmp_path_factory.mktemp("adapters")
    write_base(root / "base", published(), files=3)
    default_adapter(root / "adapter")
    (root / "adapter" / "tokenizer.json").write_text("{}")
    return root


@contextmanager
def on_the_web(place, tmp_path, monkeypatch):
    with serve(place / "base", authorization="Bearer hidden") as base:
        with serve(place / "adapter", authorization="Bearer hidden") as adapter:
            yield base.url, adapter.url, HEADER


@contextmanager
def on_the_hub(place, tmp_path, monkeypatch):
    with loopback_hub.serve({"org/base": place / "base", "org/adapter": place / "adapter"}, token="hidden") as hub:
        loopback_hub.use(hub, tmp_path / "cache", monkeypatch)
        yield "org/base", "hf://org/adapter@main", OF_HUB
        assert not [*(tmp_path / "cache").rglob("*.safetensors")]


@contextmanager
def base_here(place, tmp_path, monkeypatch):
    with on_the_hub(place, tmp_path, monkeypatch) as (_, _, options):
        yield place / "base", "org/adapter", options


@pytest.fixture(params=[on_the_web, on_the_hub, base_here])
def remote(request, place, tmp_path, monkeypatch):
    with request.param(place, tmp_path, monkeypatch) as found:
        yield found


def test_merge_has_the_bytes_of_a_local_one_and_continues(remote, place, tmp_path, monkeypatch):
    base, adapter, options = remote
    arguments = {"max_shard_size": 4000, "verify": True}
    amc.merge_adapter(place / "base", place / "adapter", tmp_path / "expected", **arguments)
    seen = []

    def interrupt(*_):
        seen.append(0)
        if len(seen) == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("automodel_conv.publishing.conversion_files.compare_file", interrupt)
        with pytest.raises(KeyboardInterrupt):
            amc.merge_adapter(base, adapter, tmp_path / "new", **arguments, **options)
    assert (tmp_path / "new" / STAGING_NAME).is_dir()
    report = amc.merge_adapter(base, adapter, tmp_path / "new", **arguments, **options)
    assert report.files_resumed == 2
    assert contents(tmp_path / "new") == contents(tmp_path / "expected")


def test_load_with_an_adapter_has_the_tensors_of_a_local_one(remote, place):
    base, adapter, options = remote
    expected = amc.load_state_dict(place / "base", adapter=place / "adapter")
    assert_same(amc.load_state_dict(base, adapter=adapter, **options), expected)
    assert_same(amc.load_state_dict(base, adapter=[(adapter, 1.0)], **options), expected)


def test_converted_adapter_has_the_bytes_and_files_of_a_local_one(remote, place, tmp_path):
    base, adapter, options = remote
    amc.convert_adapter(place / "adapter", tmp_path / "expected", base=place / "base", layout="transformers")
    report = amc.convert_adapter(adapter, tmp_path / "new", base=base, layout="transformers", **options)
    assert contents(tmp_path / "new") == contents(tmp_path / "expected")
    assert report.files_copied == ("tokenizer.json",)


def test_command_inspects_a_remote_adapter(place, tmp_path, monkeypatch):
    with on_the_hub(place, tmp_path, monkeypatch) as (base, adapter, _):
        result = run("adapter", "inspect", adapter, "--base", base, "--token", "hidden")
        assert result.exit_code == 0, result.output
        denied = run("adapter", "inspect", adapter, "--base", base, "--token", "wrong")
        assert denied.exit_code == 1
        assert "wrong" not in denied.output


def test_matrices_come_by_few_requests(place, tmp_path):
    with serve(place / "adapter") as web:
        adapter = open_adapter(web.url)
        before = len(web.requests)
        tensors = adapter.tensors.read(range(len(adapter.tensors.names)))
        local = open_adapter(place / "adapter").tensors.read(range(len(tensors)))
        assert len(web.requests) - before <= 2 < len(tensors)
    assert all(torch.equal(one, other) for one, other in zip(tensors, local, strict=True))


@pytest.mark.parametrize("block_bytes", [1, 7, 64, 100, 256, 1 << 20])
def test_matrices_of_any_size_are_cut_out_of_blocks(place, monkeypatch, block_bytes):
    """Matrices are in one block, in several, or larger than one."""
    monkeypatch.setattr(factors, "_BLOCK_BYTES", block_bytes)
    monkeypatch.setattr(factors, "_BLOCKS", 2)
    local = open_adapter(place / "adapter").tensors
    with serve(place / "adapter") as web:
        remote = open_adapter(web.url).tensors
        rows = torch.randperm(len(local.names), generator=torch.Generator().manual_seed(1)).tolist()
        pairs = zip(remote.read(rows), local.read(rows), strict=True)
        assert all(torch.equal(one, other) and one.dtype == other.dtype for one, other in pairs)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_missing_file_of_a_remote_adapter_is_named(place, tmp_path, monkeypatch, name):
    default_adapter(tmp_path / "adapter")
    (tmp_path / "adapter" / name).unlink()
    with serve(tmp_path / "adapter") as web, pytest.raises(CheckpointError, match=name):
        open_adapter(web.url)
    with loopback_hub.serve({"org/adapter": tmp_path / "adapter"}) as hub:
        loopback_hub.use(hub, tmp_path / "cache", monkeypatch)
        with pytest.raises(CheckpointError, match=name):
            open_adapter("org/adapter")


def test_revision_and_subfolder_are_those_of_the_first_path(place, tmp_path, monkeypatch):
    write_base(tmp_path / "hub" / "inner", published())
    with loopback_hub.serve({"org/base": tmp_path / "hub", "org/adapter": place / "adapter"}) as hub:
        loopback_hub.use(hub, tmp_path / "cache", monkeypatch)
        loaded = amc.load_state_dict(
            "org/base", adapter="org/adapter", subfolder="inner", revision=hub.commit("org/base")
        )
    assert loaded.report.adapted


def test_variant_of_an_adapter_is_refused(place, tmp_path):
    with pytest.raises(UnsupportedError, match="adapters have no variants"):
        amc.convert_adapter(place / "adapter", tmp_path / "new", base=place / "base", layout="vllm", variant="fp16")
