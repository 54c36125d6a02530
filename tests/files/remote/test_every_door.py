"""Tests of functions and commands that take the path of a checkpoint: a URL, a repository, options and ``~``."""

from __future__ import annotations

import json
import os
from contextlib import contextmanager

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException

import automodel_conv as amc
from automodel_conv.errors import CheckpointError, DestinationError, UnsupportedError
from automodel_conv.files.staging import STAGING_NAME
from automodel_conv.integrations.dcp import HuggingFaceReader, HuggingFaceWriter
from tests import loopback_hub
from tests.cli.support import run
from tests.comparing import assert_same
from tests.files.remote.support import TENSORS, write_sharded

SECRET = {"storage_options": {"headers": {"Authorization": "Bearer hidden"}}}
NAME = "org/model"
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
REFUSED = (CheckpointError, CheckpointException)


class Parts(nn.ParameterDict):
    """A module with the tensors of the checkpoint."""

    def __init__(self):
        super().__init__({name: nn.Parameter(torch.full_like(t, -1), False) for name, t in TENSORS.items()})


def written(folder):
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def converted(path, new, **options):
    amc.convert_checkpoint(path, new, rules=[], **options)
    return written(new)


def carried(path, new, **options):
    amc.save_checkpoint({"a": TENSORS["a"]}, new, rules=[], carry=path, **options)
    return written(new)


def saved_like(path, new, **options):
    amc.save_checkpoint(TENSORS, new, rules=[], reference=path, **options)
    assert len(list(new.glob("*.safetensors"))) == 2
    return written(new)


def verified(path, new, **options):
    save_file(TENSORS, new.with_suffix(".safetensors"))
    assert amc.verify_checkpoint(path, new.with_suffix(".safetensors"), rules=[], **options)
    return TENSORS


def filled(path, new, **options):
    model = Parts()
    amc.load_model(model, path, rules=[], **options)
    return model.state_dict()


def read_by_dcp(path, new, **options):
    state = {name: torch.full_like(tensor, -1) for name, tensor in TENSORS.items()}
    dcp.load(state, storage_reader=HuggingFaceReader(path, rules=[], **options))
    return state


def written_by_dcp(path, new, **options):
    writer = HuggingFaceWriter(new, rules=[], reference=path, **options)
    dcp.save(TENSORS, storage_writer=writer)
    return written(new)


def planned(path, new, **options):
    plan = amc.compile_plan(path, rules=[], **options)
    return amc.load_state_dict(path, plan=plan, **options)


def traced(path, new, **options):
    plan = amc.trace_loader(dict, path, **options)
    assert [target.name for target in plan.targets] == list(TENSORS)
    return amc.load_with(dict, path, **options)


DOORS = {
    "load_state_dict": lambda path, new, **options: amc.load_state_dict(path, rules=[], **options),
    "load_model": filled,
    "compile_plan": planned,
    "trace_loader and load_with": traced,
    "convert_checkpoint": converted,
    "verify_checkpoint": verified,
    "save_checkpoint, carry": carried,
    "save_checkpoint, reference": saved_like,
    "revert_state_dict": lambda path, new, **options: amc.revert_state_dict(TENSORS, reference=path, **options),
    "published_tensors": lambda path, new, **options: dict(
        amc.published_tensors(Parts(), rules=[], reference=path, **options)
    ).keys(),
    "HuggingFaceReader": read_by_dcp,
    "HuggingFaceWriter": written_by_dcp,
}


def check(found):
    if isinstance(found, dict) or hasattr(found, "values"):
        assert_same(dict(found), TENSORS)
    else:
        assert list(found) == list(TENSORS)


@pytest.mark.parametrize("door", DOORS.values(), ids=DOORS)
def test_url_needs_the_headers_of_storage_options(door, web, tmp_path):
    web.authorization = "Bearer hidden"
    with pytest.raises(REFUSED, match="401") as error:
        door(web.url, tmp_path / "refused")
    assert "hidden" not in str(error.value)
    assert not (tmp_path / "refused").exists()
    check(door(web.url, tmp_path / "new", **SECRET))


@contextmanager
def hub_of(folder, tmp_path, monkeypatch):
    with loopback_hub.serve({NAME: folder}, token="hidden") as hub:
        loopback_hub.use(hub, tmp_path / "cache", monkeypatch)
        yield hub


@pytest.mark.parametrize("path", [NAME, f"hf://{NAME}", f"hf://{NAME}@main"])
@pytest.mark.parametrize("door", DOORS.values(), ids=DOORS)
def test_repository_needs_the_token_and_its_weights_are_not_downloaded(door, path, folder, tmp_path, monkeypatch):
    with hub_of(folder, tmp_path, monkeypatch) as hub:
        with pytest.raises(REFUSED, match=NAME) as error:
            door(path, tmp_path / "refused", token="wrong")
        assert "wrong" not in str(error.value)
        check(door(path, tmp_path / "new", token="hidden", revision="main"))
        assert not [*(tmp_path / "cache").rglob("*.safetensors")]
        assert hub.requests_of(".safetensors")


@pytest.mark.parametrize("door", DOORS.values(), ids=DOORS)
def test_home_directory_subfolder_and_variant_are_understood(door, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = write_sharded(tmp_path / "models" / "inner")
    (folder / "model.safetensors.index.json").rename(folder / "model.safetensors.index.fp16.json")
    check(door("~/models", tmp_path / "new", subfolder="inner", variant="fp16"))


def test_destination_in_the_home_directory_is_understood(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    amc.convert_checkpoint(folder, "~/new", rules=[])
    assert_same(written(tmp_path / "new"), TENSORS)


def test_one_set_of_options_serves_a_url_and_a_repository(web, folder, tmp_path, monkeypatch):
    web.authorization = "Bearer hidden"
    with hub_of(folder, tmp_path, monkeypatch):
        for pair in ((web.url, NAME), (NAME, web.url)):
            assert amc.verify_checkpoint(*pair, token="hidden", **SECRET)
        assert amc.verify_checkpoint(web.url, f"hf://{NAME}@main", token="hidden", **SECRET)


def test_options_that_a_url_cannot_use_are_refused(web, tmp_path):
    for options in ({"revision": "main"}, {"local_files_only": True}):
        with pytest.raises(UnsupportedError, match=rf"{next(iter(options))}: for the Hub only"):
            amc.convert_checkpoint(web.url, tmp_path / "new", rules=[], **options)
    with pytest.raises(UnsupportedError, match="token: for the Hub only"):
        amc.load_state_dict(web.url, token="hidden")


def test_conversion_of_a_url_copies_what_accompanies_the_weights(url, folder, tmp_path):
    for name in ("tokenizer.json", "generation_config.json", "adapter_config.json"):
        (folder / name).write_text(json.dumps({"name": name}))
    if url.startswith("memory"):
        import fsspec

        for name in ("tokenizer.json", "generation_config.json", "adapter_config.json"):
            fsspec.filesystem("memory").put(str(folder / name), f"/bucket/{folder.name}/{name}")
    report = amc.convert_checkpoint(url, tmp_path / "new", rules=[])
    expected = ("adapter_config.json", "config.json", "generation_config.json", "tokenizer.json")
    assert report.files_copied == expected
    assert_same(written(tmp_path / "new"), TENSORS)
    assert all((tmp_path / "new" / name).read_text() == (folder / name).read_text() for name in expected)
    assert amc.convert_checkpoint(url, tmp_path / "new", rules=[]).was_complete


def test_conversion_of_one_file_behind_a_url_copies_nothing_else(url, tmp_path):
    report = amc.convert_checkpoint(f"{url}/model-00002-of-00002.safetensors", tmp_path / "new", rules=[])
    assert report.files_copied == ()
    assert sorted(os.listdir(tmp_path / "new")) == ["model.safetensors"]


def test_interrupted_conversion_of_a_url_continues_from_any_directory(web, tmp_path, monkeypatch):
    arguments = {"rules": [], "max_shard_size": 12_000}
    seen = []

    def interrupt(*_):
        seen.append(0)
        if len(seen) == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("automodel_conv.publishing.conversion_files.compare_file", interrupt)
        with pytest.raises(KeyboardInterrupt):
            amc.convert_checkpoint(web.url, tmp_path / "new", **arguments)
    assert (tmp_path / "new" / STAGING_NAME).is_dir()
    monkeypatch.chdir(tmp_path)
    report = amc.convert_checkpoint(web.url, tmp_path / "new", **arguments)
    assert report.files_resumed == 2
    assert_same(written(tmp_path / "new"), TENSORS)


def test_conversion_of_a_url_whose_file_changed_does_not_continue(web, folder, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("automodel_conv.publishing.conversion_files.compare_file", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            amc.convert_checkpoint(web.url, tmp_path / "new", rules=[], max_shard_size=12_000)
    save_file({name: TENSORS[name] for name in "ab"} | {"e": torch.ones(5)}, folder / "other.safetensors")
    (folder / "other.safetensors").replace(folder / "model-00001-of-00002.safetensors")
    with pytest.raises(DestinationError, match="model-00001"):
        amc.convert_checkpoint(web.url, tmp_path / "new", rules=[], max_shard_size=12_000)


def test_map_of_a_url_is_refused_and_one_of_a_repository_downloads_it(web, folder, tmp_path, monkeypatch):
    with pytest.raises(UnsupportedError, match=r"(?s)a URL, where only.*download the files first; memory_map=False"):
        amc.load_state_dict(web.url, memory_map=True)
    with hub_of(folder, tmp_path, monkeypatch):
        loaded = amc.load_state_dict(NAME, rules=[], memory_map=True, token="hidden")
    assert_same(loaded, TENSORS)
    assert loaded.report.bytes_mapped
    assert len({path.name for path in (tmp_path / "cache").rglob("*.safetensors")}) == 2


def test_report_counts_what_was_received(web, folder):
    report = amc.load_state_dict(web.url, rules=[], threads=4).report
    assert report.bytes_received == web.sent
    assert report.requests == len(web.requests)
    assert (report.retries, report.connections >= 1) == (0, True)
    assert f" {report.requests}, 0 of them repeated\n" in str(report)
    local = amc.load_state_dict(folder, rules=[]).report
    assert (local.requests, local.retries, local.connections, local.bytes_received) == (0, 0, 0, 0)
    assert "requests" not in str(local)


def test_bar_of_a_load_shows_what_is_received(web, capsys):
    pytest.importorskip("tqdm")
    amc.load_state_dict(web.url, rules=[], progress=True)
    shown = capsys.readouterr().err
    assert "B received" in shown
    assert "connections, 0 retries" in shown


@pytest.mark.parametrize("url", [True, False])
def test_commands_read_urls_and_repositories(url, web, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    web.authorization = "Bearer hidden"
    options = ["--storage-option", 'headers={"Authorization": "Bearer hidden"}'] if url else ["--token", "hidden"]
    with hub_of(folder, tmp_path, monkeypatch):
        path = web.url if url else NAME
        for command in ("plan PATH --no-model", "convert PATH new --no-model", "verify PATH new --no-model"):
            denied = run(*command.replace("PATH", path).split())
            assert denied.exit_code == 1
            assert "hidden" not in denied.output
            result = run(*command.replace("PATH", path).split(), *options)
            assert result.exit_code == 0, result.output
        dry = run("convert", path, "newer", "--no-model", "--dry-run", *options)
        assert dry.exit_code == 0, dry.output
    assert_same(written(tmp_path / "new"), TENSORS)
