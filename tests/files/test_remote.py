"""Tests of checkpoints behind URLs: equal bytes, the requests that they cost, and errors without credentials."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import tempfile
import traceback
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
from automodel_conv.errors import CheckpointError, QuantizationError, ReadError, UnsupportedError, WriteError
from automodel_conv.files import choosing, remote
from automodel_conv.files.remote import SmallFiles, find_folder
from automodel_conv.integrations.dcp import HuggingFaceReader, HuggingFaceWriter
from tests.cli.support import run, value
from tests.comparing import assert_same
from tests.loopback_web import serve

TENSORS = {name: torch.arange(3000, dtype=torch.int32) + number for number, name in enumerate("abcd")}


def write_sharded(folder: Path) -> Path:
    """Write two files, their index and a config."""
    folder.mkdir(parents=True)
    files = {"model-00001-of-00002.safetensors": "ab", "model-00002-of-00002.safetensors": "cd"}
    for file, names in files.items():
        save_file({name: TENSORS[name] for name in names}, folder / file)
    weight_map = {name: file for file, names in files.items() for name in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text('{"model_type": "none"}')
    return folder


@pytest.fixture
def folder(tmp_path):
    return write_sharded(tmp_path / "published")


@pytest.fixture
def web(folder):
    pytest.importorskip("aiohttp", reason="fsspec reads http with it")
    with serve(folder) as web:
        yield web


@pytest.fixture(params=["file", "memory", "http"])
def url(request, folder):
    """Return the URL of the folder on each kind of storage."""
    if request.param == "http":
        yield request.getfixturevalue("web").url
    elif request.param == "file":
        yield f"file://{folder}"
    else:
        store = fsspec.filesystem("memory")
        store.put(str(folder), "/bucket/", recursive=True)
        yield f"memory://bucket/{folder.name}"
        store.rm("/bucket", recursive=True)


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
    pytest.importorskip("aiohttp")
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


def test_plan_reads_no_tensor_data_and_a_load_refuses_padded_rows(web, folder):
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
    assert max(one.range[1] for one in web.of(".safetensors")) == checkpoint.offsets[0]
    for options in ({"plan": plan}, {"rules": []}):
        with pytest.raises(QuantizationError, match="end in padding"):
            amc.load_state_dict(web.url, **options)


@pytest.fixture(scope="module")
def moe(tmp_path_factory):
    """Write a small model with experts."""
    pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("moe")
    write_checkpoint(TINY, str(folder))
    return folder


@pytest.mark.parametrize("layout", [None, "nemo"])
def test_experts_of_a_model_are_those_of_the_local_files(moe, layout):
    pytest.importorskip("aiohttp")
    with serve(moe) as web:
        assert_same(amc.load_state_dict(web.url, layout=layout), amc.load_state_dict(moe, layout=layout))
        files = list(moe.glob("*.safetensors"))
        data = [one.range for one in web.requests if one.method == "GET" and one.name.endswith(".safetensors")]
        extra = sum(stop - start for start, stop in data) - sum(path.stat().st_size for path in files)
        assert extra == 0 or layout is not None  # each byte once; transposed experts are read over small gaps


def test_commands_plan_and_load_a_url(moe):
    pytest.importorskip("aiohttp")
    with serve(moe) as web:
        planned, local = run("plan", web.url), run("plan", moe)
        assert planned.exit_code == 0, planned.output
        assert planned.stdout == local.stdout
        loaded = run("load", web.url)
        assert loaded.exit_code == 0, loaded.output
        assert value(loaded.stdout, "tensors") == value(run("load", moe).stdout, "tensors")


def test_opening_costs_two_ranges_a_file_and_no_tensor_data(web, folder):
    checkpoint = amc.open_checkpoint(web.url)
    for file in range(2):
        name = os.path.basename(checkpoint.files[file])
        data = checkpoint.offsets[checkpoint.file_ids.index(file)]
        assert [one.range for one in web.of(name)] == [(0, 8), (8, data)]
        assert len(web.of(name, "HEAD")) == 1
    others = [one.name for one in web.requests if not one.name.endswith(".safetensors")]
    assert sorted(others) == [
        "config.json",
        "hf_quant_config.json",
        "model.safetensors.checksums.json",
        "model.safetensors.index.json",
    ]
    assert web.sent < sum(path.stat().st_size for path in folder.iterdir()) / 10


def test_load_requests_the_size_of_each_file_once(web):
    amc.load_state_dict(web.url, rules=[], threads=4)
    assert sorted(one.name for one in web.of(".safetensors", "HEAD")) == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]


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
    web.takes_ranges = False
    with pytest.raises(CheckpointError, match="ignores ranges"):
        amc.open_checkpoint(web.url)


def test_server_without_head_is_read(web):
    web.takes_head = False
    assert_same(amc.load_state_dict(web.url, rules=[]), TENSORS)


@pytest.mark.parametrize("status", [401, 403, 404, 410])
def test_small_files_that_a_server_denies_are_absent(web, folder, status):
    web.absent_status = status
    assert_same(amc.load_state_dict(web.url, rules=[]), TENSORS)
    (folder / "config.json").unlink()
    assert amc.open_checkpoint(f"{web.url}/model-00001-of-00002.safetensors").names == ["a", "b"]
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(CheckpointError, match=rf"(?s)where: +\S+/model.*safetensors.*{status}"):
        amc.open_checkpoint(web.url)
    with pytest.raises(CheckpointError, match=rf"(?s)where: +\S+/absent.*json\n.*{status if status != 404 else ''}"):
        amc.open_checkpoint(f"{web.url}/absent.safetensors.index.json")
    (folder / "model-00002-of-00002.safetensors").rename(folder / "model.safetensors")
    assert amc.open_checkpoint(web.url).names == ["c", "d"]


def test_first_denied_file_is_named_if_nothing_can_be_read(web):
    web.status = 403
    with pytest.raises(CheckpointError, match=r"(?s)where: +\S+/model.safetensors.index.json\n.*403.*access rights"):
        amc.open_checkpoint(web.url)


def test_server_without_ranges_is_refused_before_it_sends_a_file(web, folder):
    web.takes_ranges = False
    with (folder / "model-00001-of-00002.safetensors").open("r+b") as file:
        file.truncate(100_000_000)
    for name in ("", "/model-00001-of-00002.safetensors"):
        with pytest.raises(CheckpointError, match=r"ignores ranges.*download the files"):
            amc.open_checkpoint(web.url + name)
    (folder / "config.json").unlink()
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(CheckpointError, match="ignores ranges"):
        amc.open_checkpoint(f"{web.url}/model-00001-of-00002.safetensors")
    assert web.sent < 20_000_000


def test_missing_file_is_named(url, folder, request):
    name = "model-00002-of-00002.safetensors"
    kind = url.partition(":")[0]
    (folder / name).unlink()
    if kind == "memory":
        fsspec.filesystem("memory").rm(f"/bucket/{folder.name}/{name}")
    with pytest.raises(CheckpointError, match=name):
        amc.open_checkpoint(url)


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


def test_missing_folder_is_named(url):
    with pytest.raises(CheckpointError, match=r"(?s)where: +\S+absent"):
        amc.open_checkpoint(f"{url}/absent")


def test_missing_index_is_named(url):
    with pytest.raises(CheckpointError, match=r"(?s)cannot be read.*where: +\S+absent.safetensors.index.json"):
        amc.open_checkpoint(f"{url}/absent.safetensors.index.json")


def test_index_above_the_limit_is_refused_like_a_local_one(url, folder, monkeypatch):
    size = (folder / "model.safetensors.index.json").stat().st_size
    monkeypatch.setattr(remote, "MAX_INDEX_BYTES", size)
    assert_same(amc.load_state_dict(url, rules=[]), TENSORS)
    for module in (remote, choosing):
        monkeypatch.setattr(module, "MAX_INDEX_BYTES", size - 1)
    with pytest.raises(CheckpointError, match=r"where: +\S+://\S+/model.safetensors.index.json\n") as of_url:
        amc.open_checkpoint(url)
    with pytest.raises(CheckpointError) as of_folder:
        amc.open_checkpoint(folder)
    texts = [str(error.value).splitlines() for error in (of_url, of_folder)]
    assert texts[0][0] == texts[1][0] == "an index is too large"
    assert texts[0][2] == texts[1][2]


def test_folder_without_weights_is_described(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"(?s)no safetensors weights.*where: +file://"):
        amc.open_checkpoint(f"file://{tmp_path}")


def test_file_shorter_than_its_header_states_is_refused(url, folder, request):
    name = "model-00001-of-00002.safetensors"
    data = (folder / name).read_bytes()[:-100]
    (folder / name).write_bytes(data)
    if url.startswith("memory"):
        fsspec.filesystem("memory").pipe(f"/bucket/{folder.name}/{name}", data)
    with pytest.raises(CheckpointError, match=rf"(?s)a file is truncated.*{name}"):
        amc.open_checkpoint(url)


def test_answer_that_ends_early_names_file_and_tensor(web):
    web.missing_bytes = 100
    with pytest.raises(ReadError, match=r"(?s)model-0000[12]-of-00002.safetensors.*tensor: .*instead of"):
        amc.load_state_dict(web.url, rules=[])


def test_file_that_vanishes_after_opening_is_an_error(web, folder):
    checkpoint = amc.open_checkpoint(web.url)
    (folder / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(OSError, match="404"):
        checkpoint.sources[0].identity()
    with pytest.raises(ReadError, match="FileNotFoundError"):
        checkpoint.sources[0].open().read_into([memoryview(bytearray(8))], 0)
    assert checkpoint.sources[1].identity() == checkpoint.sources[1].identity()


@pytest.mark.parametrize("status", [403, 500])
def test_errors_show_the_status_and_no_credentials(web, status):
    secret = web.url.replace("http://", "http://user:hidden1@")
    web.status = status
    for url in (secret, f"{web.url}?token=hidden2", f"{secret}/a.safetensors?X-Amz-Signature=hidden3&b=hidden'4"):
        with pytest.raises(CheckpointError) as error:
            amc.open_checkpoint(url)
        text = "".join(traceback.format_exception(error.value))
        assert str(status) in str(error.value)
        assert "/models/tiny" in str(error.value)
        assert "hidden" not in text


def test_unreachable_server_is_an_error_without_credentials():
    pytest.importorskip("aiohttp")
    with pytest.raises(CheckpointError, match=r"(?s)where: +http://127.0.0.1:1/m.*Connect") as error:
        amc.open_checkpoint("http://user:hidden@127.0.0.1:1/m?token=hidden")
    assert "hidden" not in str(error.value)


def test_unknown_protocol_is_named():
    with pytest.raises(CheckpointError, match="Protocol not known: nowhere"):
        amc.open_checkpoint("nowhere://bucket/folder")


@pytest.mark.parametrize(
    ("hidden", "url", "advice"),
    [
        ("aiohttp", "https://host/folder", 'pip install "automodel-conv[http]"'),
        ("s3fs", "s3://bucket/folder", 'pip install "automodel-conv[s3]"'),
        ("gcsfs", "gs://bucket/folder", 'pip install "automodel-conv[gcs]"'),
        ("fsspec", "s3://bucket/folder", 'pip install "automodel-conv[s3]"'),
    ],
)
def test_missing_library_names_the_extra(hidden, url, advice):
    code = f"import automodel_conv as amc; amc.open_checkpoint({url!r})"
    hide = Path(__file__).parent.parent / "hide"
    environment = os.environ | {"PYTHONPATH": f"{hide}:{os.environ.get('PYTHONPATH', '')}", "HIDDEN_PACKAGES": hidden}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert result.returncode == 1
    assert f"do:       {advice}" in result.stderr


LOADS = "download the files first; load_state_dict(...) reads URLs"
WRITE = "write to a local directory, then upload it"
REFUSE = {
    "convert_checkpoint from": (lambda url, path: amc.convert_checkpoint(url, path / "new"), LOADS),
    "convert_checkpoint to": (lambda url, path: amc.convert_checkpoint(path, url), WRITE),
    "verify_checkpoint": (lambda url, path: amc.verify_checkpoint(url, path), LOADS),
    "verify_checkpoint of": (lambda url, path: amc.verify_checkpoint(path, url), LOADS),
    "save_checkpoint": (lambda url, path: amc.save_checkpoint({"a": torch.ones(2)}, url, rules=[]), WRITE),
    "save_checkpoint with": (lambda url, path: amc.save_checkpoint({}, path / "new", rules=[], carry=url), LOADS),
    "memory_map": (
        lambda url, path: amc.load_state_dict(url, memory_map=True),
        "download the files first; memory_map=False reads URLs",
    ),
    "HuggingFaceWriter": (lambda url, path: HuggingFaceWriter(url, rules=[]), WRITE),
    "HuggingFaceReader": (lambda url, path: HuggingFaceReader(url, rules=[]).read_metadata(), LOADS),
}


@pytest.mark.parametrize(("call", "advice"), REFUSE.values(), ids=REFUSE)
def test_functions_for_local_paths_refuse_urls(call, advice, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = write_sharded(tmp_path / "source")
    with pytest.raises(UnsupportedError, match=r"(?s)a URL, where only.*s3://bucket/folder\n.*do: ") as error:
        call("s3://user:hidden@bucket/folder", source)
    assert error.value.args[0].endswith(f"\n  do:       {advice}")
    assert "hidden" not in str(error.value)
    assert os.listdir(tmp_path) == ["source"]  # no folder named "s3:"


@pytest.mark.parametrize(
    ("command", "advice"),
    [
        ("convert URL new", "automodel-conv load reads URLs"),
        ("convert URL new --dry-run", "automodel-conv load reads URLs"),
        ("convert source URL --no-model", WRITE),
        ("convert source URL --dry-run --no-model", WRITE),
        ("verify URL", "automodel-conv load reads URLs"),
        ("bench URL", "automodel-conv load reads URLs"),
    ],
)
def test_commands_for_local_paths_refuse_urls(command, advice, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_sharded(tmp_path / "source")
    result = run(*command.replace("URL", "s3://bucket/folder").split())
    assert result.exit_code == 1
    assert "a URL, where only a path on this machine is supported" in result.stderr
    assert f"{advice}\n" in result.stderr
    assert os.listdir(tmp_path) == ["source"]


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


@pytest.mark.parametrize(
    ("url", "path", "name", "shown"),
    [
        ("https://u:p@h/a/b/?q=1", "https://u:p@h/a/b", "", "https://h/a/b"),
        ("https://h/a/model.safetensors?q=a/b", "https://h/a", "model.safetensors", "https://h/a"),
        ("memory://b/x.json", "/b", "x.json", "memory://b"),
        ("memory://x.json", "/x.json", "", "memory://x.json"),
        ("memory://", "", "", "memory://"),
        ("memory:///x.json", "", "x.json", "memory://"),
        ("file:///", "", "", "file://"),
        ("file:///x.json", "", "x.json", "file://"),
    ],
)
def test_url_is_taken_apart(url, path, name, shown):
    if url.startswith("https"):
        pytest.importorskip("aiohttp")
    found = find_folder(url)
    assert (found.path, found.name, found.url) == (path, name, shown)
