"""Tests of URLs that cannot be read: what is missing, broken or refused is named, and no credentials are shown."""

from __future__ import annotations

import os
import subprocess
import sys
import traceback
from pathlib import Path

import fsspec
import pytest

import automodel_conv as amc
from automodel_conv.errors import CheckpointError, ReadError
from automodel_conv.files import choosing, located
from automodel_conv.files.remote import requests
from tests.comparing import assert_same
from tests.files.remote.support import TENSORS


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(requests, "FIRST_WAIT_SECONDS", 0.001)


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


def test_missing_folder_is_named(url):
    with pytest.raises(CheckpointError, match=r"(?s)where: +\S+absent"):
        amc.open_checkpoint(f"{url}/absent")


def test_missing_index_is_named(url):
    with pytest.raises(CheckpointError, match=r"(?s)cannot be read.*where: +\S+absent.safetensors.index.json"):
        amc.open_checkpoint(f"{url}/absent.safetensors.index.json")


def test_index_above_the_limit_is_refused_like_a_local_one(url, folder, monkeypatch):
    size = (folder / "model.safetensors.index.json").stat().st_size
    monkeypatch.setattr(located, "MAX_INDEX_BYTES", size)
    assert_same(amc.load_state_dict(url, rules=[]), TENSORS)
    for module in (located, choosing):
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
    with pytest.raises(ReadError, match="404"):
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
    with pytest.raises(CheckpointError, match=r"(?s)where: +http://127.0.0.1:1/m.*Connect") as error:
        amc.open_checkpoint("http://user:hidden@127.0.0.1:1/m?token=hidden")
    assert "hidden" not in str(error.value)


def test_unknown_protocol_is_named():
    with pytest.raises(CheckpointError, match="Protocol not known: nowhere"):
        amc.open_checkpoint("nowhere://bucket/folder")


@pytest.mark.parametrize(
    ("hidden", "url", "advice"),
    [
        ("s3fs", "s3://bucket/folder", 'pip install "automodel-conv[s3]"'),
        ("gcsfs", "gs://bucket/folder", 'pip install "automodel-conv[gcs]"'),
        ("fsspec", "s3://bucket/folder", 'pip install "automodel-conv[s3]"'),
    ],
)
def test_missing_library_names_the_extra(hidden, url, advice):
    code = f"import automodel_conv as amc; amc.open_checkpoint({url!r})"
    hide = Path(__file__).parents[2] / "hide"
    environment = os.environ | {"PYTHONPATH": f"{hide}:{os.environ.get('PYTHONPATH', '')}", "HIDDEN_PACKAGES": hidden}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert result.returncode == 1
    assert f"do:       {advice}" in result.stderr
