"""Tests of checkpoints behind URLs: equal bytes, the requests that they cost, and the copies of small files."""

from __future__ import annotations

import gc
import json
import os
import tempfile
from pathlib import Path

import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from safetensors.torch import save_file
from torch import nn

import automodel_conv as amc
from automodel_conv.cli.demo import TINY
from automodel_conv.cli.demo_process import write_checkpoint
from automodel_conv.errors import CheckpointError, NameProblems, WriteError
from automodel_conv.files.remote.small_files import SmallFiles
from tests.cli.support import run, value
from tests.comparing import assert_same
from tests.files.remote.support import TENSORS
from tests.loopback_web import serve


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """Return the directory for temporary files, which no other process uses."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    return tmp_path / "temporary"


def columns(checkpoint):
    return [checkpoint.names, checkpoint.dtypes, checkpoint.shapes, checkpoint.offsets, checkpoint.nbytes]


def read_config(checkpoint):
    return Path(checkpoint.directory, "config.json").read_text()


def test_headers_are_those_of_the_local_files(url, folder):
    checkpoint = amc.open_checkpoint(url)
    assert columns(checkpoint) == columns(amc.open_checkpoint(folder))
    assert checkpoint.path == url
    assert checkpoint.files[0] == f"{url}/model-00001-of-00002.safetensors"
    assert read_config(checkpoint) == read_config(amc.open_checkpoint(folder))


@pytest.mark.parametrize("ending", ["/", "/model.safetensors.index.json"])
def test_url_may_end_with_a_slash_or_name_the_index(url, folder, ending):
    checkpoint = amc.open_checkpoint(url + ending)
    assert columns(checkpoint) == columns(amc.open_checkpoint(folder))
    assert read_config(checkpoint)


def test_single_file_is_found_in_a_folder_and_by_its_own_url(url, folder):
    one = amc.open_checkpoint(f"{url}/model-00002-of-00002.safetensors")
    assert one.names == ["c", "d"]
    assert read_config(one)


def test_folder_with_one_file_needs_no_index(folder):
    (folder / "model.safetensors.index.json").unlink()
    (folder / "model-00002-of-00002.safetensors").unlink()
    (folder / "model-00001-of-00002.safetensors").rename(folder / "model.safetensors")
    assert amc.open_checkpoint(f"file://{folder}").names == ["a", "b"]
    with serve(folder) as web:
        assert amc.open_checkpoint(web.url).names == ["a", "b"]


@pytest.mark.parametrize("threads", [1, 4])
def test_tensors_are_those_of_the_local_files(url, threads):
    assert_same(amc.load_state_dict(url, rules=[], threads=threads), TENSORS)


def test_model_is_filled_from_a_url(url):
    model = nn.ParameterDict({name: nn.Parameter(torch.full_like(t, -1), False) for name, t in TENSORS.items()})
    report = amc.load_model(model, url, rules=[])
    assert_same(model.state_dict(), TENSORS)
    assert report.bytes_read == sum(tensor.nbytes for tensor in TENSORS.values())


def test_plan_is_that_of_the_local_files(url, folder):
    assert amc.compile_plan(url, rules=[]).to_json() == amc.compile_plan(folder, rules=[]).to_json()
    plan = amc.compile_plan(folder, rules=[])
    assert_same(amc.load_state_dict(url, plan=plan), TENSORS)


def test_plan_reads_no_tensor_data_and_a_load_of_padded_rows_refuses_it(web, folder):
    codes = {"a.weight_packed": torch.zeros(2, 2, dtype=torch.int32), "a.weight_scale": torch.ones(2, 1)}
    save_file(codes | {"a.weight_shape": torch.tensor([2, 13])}, folder / "model.safetensors")
    (folder / "model.safetensors.index.json").unlink()
    scheme = {"weights": {"num_bits": 4, "type": "int", "strategy": "channel"}}
    settings = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"0": scheme}}
    (folder / "config.json").write_text(json.dumps({"quantization_config": settings}))
    checkpoint = amc.open_checkpoint(web.url)
    plan = amc.compile_plan(checkpoint, rules=[])
    amc.compile_plan(web.url, rules=[])
    assert checkpoint.is_remote
    first = [one.range for one in web.of(".safetensors")]
    assert first == [(0, 1 << 16)] * 2  # the first request, which has the header
    assert plan.targets[0].shape == (2, 16)
    with pytest.raises(NameProblems, match=r"in another form(.|\n)*a\.weight: the plan reads(.|\n)*13 columns"):
        amc.load_state_dict(web.url, plan=plan)
    assert amc.load_state_dict(web.url, rules=[])["a.weight"].shape == (2, 13)


@pytest.fixture(scope="module")
def moe(tmp_path_factory):
    """Write a small model with experts."""
    pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("moe")
    write_checkpoint(TINY, str(folder))
    return folder


@pytest.mark.parametrize("layout", [None, "nemo"])
def test_experts_of_a_model_are_those_of_the_local_files(moe, layout):
    with serve(moe) as web:
        assert_same(amc.load_state_dict(web.url, layout=layout), amc.load_state_dict(moe, layout=layout))
        sizes = {path.name: path.stat().st_size for path in moe.glob("*.safetensors")}
        opened = {one.name: one for one in reversed(web.of(".safetensors"))}  # the first request for each file
        later = [one for one in web.of(".safetensors") if one is not opened[one.name]]
        assert opened.keys() == sizes.keys()
        assert sum(one.range[1] - one.range[0] for one in later) <= sum(sizes.values())  # each byte once


def test_commands_plan_and_load_a_url(moe):
    with serve(moe) as web:
        planned, local = run("plan", web.url), run("plan", moe)
        assert planned.exit_code == 0, planned.output
        assert planned.stdout == local.stdout
        loaded = run("load", web.url)
        assert loaded.exit_code == 0, loaded.output
        assert value(loaded.stdout, "tensors") == value(run("load", moe).stdout, "tensors")


def test_opening_costs_one_range_a_file(web, folder):
    checkpoint = amc.open_checkpoint(web.url)
    for file in range(2):
        name = os.path.basename(checkpoint.files[file])
        assert [one.range for one in web.of(name)] == [(0, 4096)]
        assert not web.of(name, "HEAD")
    others = [one.name for one in web.requests if not one.name.endswith(".safetensors")]
    assert sorted(others) == [
        "config.json",
        "hf_quant_config.json",
        "model.safetensors.checksums.json",
        "model.safetensors.index.json",
    ]


def test_header_longer_than_expected_costs_a_second_range(web, folder):
    names = [f"a.name.that.is.rather.long.{number:05}" for number in range(2000)]
    save_file({name: torch.ones(1) for name in names}, folder / "model.safetensors")
    (folder / "model.safetensors.index.json").unlink()
    checkpoint = amc.open_checkpoint(web.url)
    assert checkpoint.names == names
    assert [one.range for one in web.of(".safetensors")] == [(0, 1 << 16), (1 << 16, checkpoint.offsets[0])]


def test_presigned_url_is_one_file(web):
    web.query = "X-Amz-Signature=hidden&X-Amz-Credential=also"
    checkpoint = amc.open_checkpoint(f"{web.url}/model-00001-of-00002.safetensors?{web.query}")
    assert checkpoint.names == ["a", "b"]
    assert {one.name for one in web.requests} == {"model-00001-of-00002.safetensors"}
    assert "hidden" not in repr(checkpoint) + repr(checkpoint.sources) + checkpoint.path


def test_query_of_a_folder_is_repeated_for_each_file(web):
    web.query = "token=hidden"
    assert_same(amc.load_state_dict(f"{web.url}?{web.query}", rules=[]), TENSORS)


def test_settings_of_fsspec_apply(web, monkeypatch):
    web.authorization = "Bearer hidden"
    with pytest.raises(CheckpointError, match="401"):
        amc.open_checkpoint(web.url)
    headers = {"Authorization": web.authorization}
    monkeypatch.setitem(fsspec.config.conf, "http", {"client_kwargs": {"headers": headers}})
    assert_same(amc.load_state_dict(web.url, rules=[]), TENSORS)
    with pytest.raises(CheckpointError, match="401"):
        amc.open_checkpoint(web.url, storage_options={"headers": {"Authorization": "another"}})
    web.takes_ranges = False
    with pytest.raises(CheckpointError, match="ignores ranges"):
        amc.open_checkpoint(web.url)


def test_server_without_head_is_read(web):
    web.takes_head = False
    assert_same(amc.load_state_dict(web.url, rules=[]), TENSORS)


@pytest.mark.parametrize("url", ["memory://", "memory:///", "memory:///model.safetensors.index.json"])
def test_files_at_the_root_of_a_file_system_are_read(url, folder):
    store = fsspec.filesystem("memory")
    store.put([str(path) for path in folder.iterdir()], [f"/{path.name}" for path in folder.iterdir()])
    try:
        assert_same(amc.load_state_dict(url, rules=[]), TENSORS)
        assert amc.open_checkpoint(url).files[0] == "memory:///model-00001-of-00002.safetensors"
    finally:
        for path in folder.iterdir():
            store.rm(f"/{path.name}")


def test_root_of_this_machine_is_not_the_current_directory(folder, monkeypatch):
    monkeypatch.chdir(folder)
    with pytest.raises(CheckpointError, match=r"where: +file://\n"):
        amc.open_checkpoint("file:///")


def test_small_files_are_removed_with_the_checkpoint(url, temporary):
    checkpoint = amc.open_checkpoint(url)
    sources = checkpoint.sources
    del checkpoint
    gc.collect()
    assert len(os.listdir(temporary)) == 1
    del sources
    gc.collect()
    assert not os.listdir(temporary)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # the child calls nothing that takes a lock
def test_forked_process_leaves_the_small_files_of_its_parent(temporary):
    small = SmallFiles({"config.json": b"{}"})
    child = os.fork()
    if not child:
        del small
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert Path(small.folder, "config.json").read_text() == "{}"
    del small
    assert not os.listdir(temporary)


def test_small_files_are_removed_after_an_error(url, folder, temporary):
    with pytest.raises(CheckpointError):
        amc.open_checkpoint(f"{url}/absent")
    gc.collect()
    assert not os.listdir(temporary)


def test_temporary_folder_that_cannot_be_written_is_an_error(url, temporary):
    temporary.rmdir()
    with pytest.raises(WriteError, match=r"(?s)cannot write to a directory.*where: +\S*temporary"):
        amc.open_checkpoint(url)


class Remembering(MemoryFileSystem):
    """A file system that remembers listings, as those of object stores do."""

    protocol = "remembering"

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.removeprefix("remembering://"))

    def ls(self, path, detail=True, **kwargs):
        if path not in self.dircache:
            self.dircache[path] = super().ls(path, detail=False)
        return self.dircache[path] if path in self.dircache else super().ls(path, detail=False)


def test_files_that_another_process_adds_are_seen(folder):
    fsspec.register_implementation("remembering", Remembering, clobber=True)
    store, late = fsspec.filesystem("memory"), "model-00002-of-00002.safetensors"
    store.put(str(folder), "/remembered/", recursive=True)
    try:
        data = store.cat_file(f"/remembered/{folder.name}/{late}")
        store.rm(f"/remembered/{folder.name}/{late}")
        with pytest.raises(CheckpointError):
            amc.open_checkpoint(f"remembering://remembered/{folder.name}")
        store.rm(f"/remembered/{folder.name}/model.safetensors.index.json")
        store.rm(f"/remembered/{folder.name}/model-00001-of-00002.safetensors")
        store.pipe_file(f"/remembered/{folder.name}/model.safetensors", data)
        assert amc.open_checkpoint(f"remembering://remembered/{folder.name}").names == ["c", "d"]
    finally:
        store.rm("/remembered", recursive=True)
