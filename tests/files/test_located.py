"""Tests of finding the files of a checkpoint: on this machine, in a repository, behind a URL; and of their cost."""

from __future__ import annotations

from pathlib import Path

import fsspec
import pytest
import torch
from safetensors.torch import save_file

import automodel_conv as amc
from automodel_conv.errors import CheckpointError, UnsupportedError
from automodel_conv.files.located import locate
from automodel_conv.files.source import LocalFile
from automodel_conv.files.source_options import SourceSettings
from tests import loopback_hub
from tests.comparing import assert_same
from tests.files.remote.support import TENSORS, write_sharded
from tests.loopback_store import serve

NAME = "some-org/Some.Model"
FILES = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


@pytest.fixture
def folder(tmp_path):
    return write_sharded(tmp_path / "published")


@pytest.fixture
def hub(folder, tmp_path, monkeypatch):
    pytest.importorskip("huggingface_hub")
    with loopback_hub.serve({NAME: folder}) as hub:
        loopback_hub.use(hub, tmp_path / "cache", monkeypatch)
        yield hub


def found(path, **options):
    return locate(str(path), SourceSettings(**options))


def test_files_on_this_machine_need_no_requests(folder):
    located = found(folder)
    assert located.traffic is None
    assert located.sources == tuple(LocalFile(str(folder / name)) for name in FILES)
    assert found(folder / "model.safetensors.index.json").sources == located.sources
    assert found(folder.parent, subfolder="published").sources == located.sources


def test_home_directory_is_expanded(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    assert found("~/published").sources[0] == LocalFile(str(folder / FILES[0]))


def test_path_that_does_not_exist_names_similar_ones(folder):
    with pytest.raises(CheckpointError, match=r"(?s)no such checkpoint.*similar:\s+\S+published"):
        found(folder.parent / "publisehd")


@pytest.mark.parametrize("option", [{"revision": "main"}, {"token": "hidden"}, {"cache_dir": "c"}, {"token": False}])
def test_options_of_the_hub_are_refused_for_other_urls(option):
    [name] = option
    with pytest.raises(UnsupportedError, match=rf"(?s){name}: for the Hub only.*where: +https://h/a\n") as error:
        found("https://u:hidden@h/a?hidden", **option)
    assert "hidden" not in str(error.value)


def test_local_files_only_is_refused_for_other_urls():
    with pytest.raises(UnsupportedError, match="local_files_only: for the Hub only"):
        found("https://h/a", local_files_only=True)


def test_files_behind_a_url_are_remote_and_small_ones_are_copied(folder):
    with serve(folder) as server:
        located = found(server.url)
        assert [source.describe() for source in located.sources] == [f"{server.url}/{name}" for name in FILES]
        assert all(source.is_remote for source in located.sources)
        assert located.traffic is not None
        assert not server.of(".safetensors")
        checkpoint = amc.open_checkpoint(server.url)
        assert checkpoint.is_remote
        assert checkpoint.headers_only
        assert checkpoint.traffic is not None


def test_opening_costs_one_request_a_file(folder):
    with serve(folder) as server:
        amc.open_checkpoint(server.url)
        assert sorted(one.path for one in server.of(".safetensors")) == [f"/{name}" for name in FILES]
        assert not server.of("", "HEAD")
        assert server.most_connections <= 16


@pytest.mark.parametrize("length", [1, 60, 900])
def test_long_names_cost_at_most_two_requests_a_file(tmp_path, length):
    names = [f"{number:0{length}}" for number in range(300)]
    save_file({name: torch.tensor([1.0]) for name in names}, tmp_path / "a.safetensors")
    entries = ", ".join(f'"{name}": "a.safetensors"' for name in names)
    with serve(tmp_path) as server:
        amc.open_checkpoint(f"{server.url}/a.safetensors")
        assert len(server.of(".safetensors")) <= 2
        (tmp_path / "model.safetensors.index.json").write_text(f'{{"weight_map": {{{entries}}}}}')
        before = len(server.of(".safetensors"))
        assert amc.open_checkpoint(server.url).names == sorted(names)
        assert len(server.of(".safetensors")) == before + 1


def test_latency_of_opening_is_that_of_three_requests(folder):
    with serve(folder, latency=0.2) as server:
        amc.open_checkpoint(server.url)
        starts = len(server.requests)
        assert starts <= 4 + 2
        assert server.most_connections >= 4


def test_variant_has_files_of_its_own(folder):
    save_file({"v": torch.ones(3)}, folder / "model.fp16.safetensors")
    with serve(folder) as server:
        for path in (server.url, f"file://{folder}", str(folder)):
            assert amc.open_checkpoint(path, variant="fp16").names == ["v"]
            assert amc.open_checkpoint(path).names == ["a", "b", "c", "d"]
            with pytest.raises(CheckpointError):
                amc.open_checkpoint(path, variant="bf16")


def test_missing_file_of_an_index_is_named(folder):
    (folder / FILES[1]).unlink()
    with serve(folder) as server, pytest.raises(CheckpointError, match=FILES[1]):
        amc.open_checkpoint(server.url)


@pytest.mark.parametrize("shard", ["../a.safetensors", "/a.safetensors", "http://h/a.safetensors", "a/../../b"])
def test_index_cannot_name_files_outside_of_its_folder(folder, shard):
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "%s"}}' % shard)  # noqa: UP031
    with serve(folder) as server:
        for path in (server.url, f"file://{folder}", str(folder)):
            with pytest.raises(CheckpointError):
                amc.open_checkpoint(path)
        assert not [one.path for one in server.requests if ".." in one.path]


@pytest.mark.parametrize("path", [NAME, f"hf://{NAME}", f"hf://{NAME}@main", f"hf://models/{NAME}", f"HF://{NAME}/"])
def test_repository_is_read_by_range(hub, folder, path):
    located = found(path)
    assert all(source.is_remote for source in located.sources)
    assert not hub.requests_of(".safetensors")
    assert_same(amc.load_state_dict(path, rules=[]), TENSORS)
    data = sum((folder / name).stat().st_size for name in FILES)
    assert sum(one.sent for one in hub.requests_of(".safetensors")) <= data + 2 * 4096


def test_file_of_a_repository_is_opened_alone(hub):
    assert amc.open_checkpoint(f"hf://{NAME}/{FILES[0]}").names == ["a", "b"]


def test_files_in_the_cache_of_the_hub_are_used(hub, folder):
    import huggingface_hub

    huggingface_hub.snapshot_download(NAME, allow_patterns=["*.json", FILES[0]])
    located = found(NAME)
    assert [isinstance(source, LocalFile) for source in located.sources] == [True, False]
    assert_same(amc.load_state_dict(NAME, rules=[]), TENSORS)
    with pytest.raises(CheckpointError, match=FILES[1]):
        found(NAME, local_files_only=True)
    huggingface_hub.snapshot_download(NAME)
    requests = len(hub.requests)
    assert found(NAME, local_files_only=True).traffic is None
    assert len(hub.requests) == requests


def test_revision_of_the_url_and_of_the_option_must_agree(hub):
    assert found(f"hf://{NAME}@main", revision="main").sources
    with pytest.raises(UnsupportedError, match=r"(?s)revision contradicts.*main.*other"):
        found(f"hf://{NAME}@main", revision="other")
    with pytest.raises(CheckpointError, match="revision"):
        found(NAME, revision="absent")


def test_token_is_sent_to_the_hub_and_shown_in_no_error(hub):
    hub.token = "hf_right"
    assert_same(amc.load_state_dict(NAME, rules=[], token="hf_right"), TENSORS)
    with pytest.raises(CheckpointError) as error:
        amc.open_checkpoint(NAME, token="hf_hidden", revision="main")
    assert "hf_hidden" not in str(error.value)


@pytest.mark.parametrize("url", ["hf://name", "hf://", "hf://datasets/a/b", "hf://a@b/c"])
def test_other_urls_of_the_hub_are_refused(url):
    with pytest.raises(CheckpointError, match="not the URL of a repository"):
        found(url)


def test_store_with_odd_keys_writes_no_file_outside_of_its_temporary_folder(folder, tmp_path, monkeypatch):
    store = fsspec.filesystem("memory")
    store.put(str(folder), "/odd/", recursive=True)
    keys = ["a.json", "../../outside.json", "/rooted.json", "b/../../outside.json", "d/e.json"]
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    with monkeypatch.context() as patch:
        real = store.cat_ranges
        patch.setattr(type(store), "find", lambda self, path, **options: [f"/odd/published/{key}" for key in keys])
        cat = lambda self, paths, *given, **options: [  # noqa: E731
            b"{}" if paths[0].endswith("a.json") else data for data in real(paths, *given, **options)
        ]
        patch.setattr(type(store), "cat_ranges", cat)
        located = locate("memory://odd/published", SourceSettings(), companions=True)
    store.rm("/odd", recursive=True)
    written = {path.relative_to(located.chosen.directory).as_posix() for path in Path(temporary).rglob("*.json")}
    assert {"a.json", "rooted.json", "d/e.json", "config.json"} <= written
    assert not [path for path in tmp_path.rglob("outside.json")]
