"""Tests of folders behind URLs: names, small files, options, and the addresses of their files."""

from __future__ import annotations

import json
import os
from urllib.parse import quote

import fsspec
import pytest
import torch
from safetensors.torch import save_file

import automodel_conv as amc
from automodel_conv.errors import CheckpointError, UnsupportedError
from automodel_conv.files.remote import requests
from automodel_conv.files.remote.folders import find_folder
from automodel_conv.files.remote.fsspec_files import FsspecFile
from automodel_conv.files.remote.requests import WebError
from automodel_conv.files.remote.web_files import WebFile
from tests.comparing import assert_same
from tests.files.remote.scripted import only, scripted
from tests.files.remote.support import TENSORS, write_sharded
from tests.loopback_faults import Faults, busy, failing
from tests.loopback_messages import Answer
from tests.loopback_store import serve

ODD_NAMES = ["a b", "a%20b", "a#b", "a?b", "a%b", "ü", "日本", "a+b", "a&b=c;d", 'a"b', "a'b", "(a)"]


@pytest.fixture
def folder(tmp_path):
    return write_sharded(tmp_path / "published")


@pytest.fixture
def memory(folder):
    store = fsspec.filesystem("memory")
    store.put(str(folder), "/bucket/", recursive=True)
    yield f"memory://bucket/{folder.name}"
    store.rm("/bucket", recursive=True)


@pytest.mark.parametrize(
    ("url", "name", "shown", "one"),
    [
        ("https://u:p@h/a/b/?q=1", "", "https://h/a/b", False),
        ("https://h/a/model.safetensors?q=a/b", "model.safetensors", "https://h/a", True),
        ("https://h/a/model.safetensors", "model.safetensors", "https://h/a", False),
        ("https://h/a/x.json#part", "x.json", "https://h/a", False),
        ("https://h/a%20b/x%20y.json", "x y.json", "https://h/a%20b", False),
        ("https://h/a/..%2Fx.json", "..%2Fx.json", "https://h/a", False),
        ("HTTPS://h:1/a b", "", "https://h:1/a%20b", False),
        ("https://h", "", "https://h", False),
        ("https://h/", "", "https://h", False),
        ("https://[::1]:1/a", "", "https://[::1]:1/a", False),
    ],
)
def test_web_url_is_taken_apart(url, name, shown, one):
    found = find_folder(url, "", None)
    assert (found.name, found.url, found.is_one_file, found.lists_names) == (name, shown, one, False)


@pytest.mark.parametrize(
    ("url", "name", "shown"),
    [
        ("memory://b/x.json", "x.json", "memory://b"),
        ("memory://x.json", "", "memory://x.json"),
        ("memory://", "", "memory://"),
        ("memory:///x.json", "x.json", "memory://"),
        ("memory://b/a#b?c", "", "memory://b/a#b"),
        ("file:///", "", "file://"),
        ("file:///x.json", "x.json", "file://"),
    ],
)
def test_url_of_a_store_is_taken_apart(url, name, shown):
    found = find_folder(url, "", None)
    assert (found.name, found.url, found.is_one_file, found.lists_names) == (name, shown, False, True)


@pytest.mark.parametrize("name", ODD_NAMES)
def test_folders_subfolders_and_files_of_any_name_are_read(tmp_path, name):
    write_sharded(tmp_path / "served" / name)
    with serve(tmp_path / "served") as server:
        for url, subfolder in ((f"{server.url}/{quote(name)}", ""), (server.url, name)):
            assert_same(amc.load_state_dict(url, rules=[], subfolder=subfolder), TENSORS)
        if not {"#", "?", "%"} & {*name}:  # as a person would type it
            assert_same(amc.load_state_dict(f"{server.url}/{name}", rules=[]), TENSORS)


@pytest.mark.parametrize("name", ODD_NAMES)
@pytest.mark.parametrize("query", ["", "?token=a%2Fb+c"])
def test_index_may_name_files_of_any_name(tmp_path, name, query):
    file = f"{name}.safetensors"
    save_file({"a": TENSORS["a"]}, tmp_path / file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": file}}))
    with serve(tmp_path, query=query.removeprefix("?") or None) as server:
        checkpoint = amc.open_checkpoint(server.url + query)
        assert checkpoint.files == (f"{server.url}/{quote(file, safe=chr(43) + chr(38) + '=;()' + chr(39))}",)
        assert_same(amc.load_state_dict(server.url + query, rules=[]), {"a": TENSORS["a"]})
        assert {one.path for one in server.of(".safetensors")} == {f"/{file}"}
        assert_same(amc.load_state_dict(f"{server.url}/{quote(file)}{query}", rules=[]), {"a": TENSORS["a"]})
        assert_same(amc.load_state_dict(f"file://{tmp_path}", rules=[]), {"a": TENSORS["a"]})


def test_name_with_an_escaped_slash_reaches_no_other_folder(tmp_path):
    (tmp_path / "served").mkdir()
    with serve(tmp_path / "served") as server, pytest.raises(CheckpointError, match="404"):
        amc.open_checkpoint(f"{server.url}/..%2F..%2Fmodel.safetensors.index.json")


def test_small_files_are_fetched_at_once_and_errors_stay_their_own(folder):
    names = ["config.json", "absent", "model.safetensors.index.json"]
    with serve(folder, latency=0.05) as server:
        config, absent, index = find_folder(server.url, "", None).fetch(names, 1 << 20)
        assert config == (folder / names[0]).read_bytes()
        assert index == (folder / names[2]).read_bytes()
        assert isinstance(absent, WebError)
        assert absent.status == 404
        assert server.most_connections == 3


def test_small_files_are_asked_for_again(folder, monkeypatch):
    monkeypatch.setattr(requests, "FIRST_WAIT_SECONDS", 0.001)
    with serve(folder, faults=Faults([busy("0"), failing(500), None])) as server:
        found = find_folder(server.url, "", None)
        [data] = found.fetch(["config.json"], 1 << 20)
        assert data == (folder / "config.json").read_bytes()
        assert (found.connections.traffic.requests, found.connections.traffic.retries) == (3, 2)


def test_compressed_small_file_is_named_with_the_reason(folder):
    def compressed(asked, answer):
        return Answer(200, {**answer.headers, "Content-Encoding": "gzip"}, b"\x1f\x8b")

    with scripted(folder, only("config.json", compressed)) as server:
        with pytest.raises(CheckpointError, match=r"(?s)where: +\S+/config.json\n.*compresses"):
            amc.open_checkpoint(server.url)


@pytest.mark.parametrize(
    "options",
    [
        {"headers": {"Authorization": "Bearer hidden"}},
        {"client_kwargs": {"headers": {"Authorization": "Bearer hidden"}}},
        {"client_kwargs": {"headers": {"Authorization": "other"}}, "headers": {"Authorization": "Bearer hidden"}},
        {"headers": {"authorization": "Bearer hidden"}},
    ],
)
def test_headers_are_sent_with_each_request(folder, options):
    with serve(folder, authorization="Bearer hidden") as server:
        assert_same(amc.load_state_dict(server.url, rules=[], storage_options=options), TENSORS)
        assert all(one.headers["authorization"] == "Bearer hidden" for one in server.requests)


@pytest.mark.parametrize("options", [None, {}, {"headers": None}, {"client_kwargs": None}, {"client_kwargs": {}}])
def test_options_may_be_empty(folder, options):
    with serve(folder) as server:
        assert_same(amc.load_state_dict(server.url, rules=[], storage_options=options), TENSORS)


def test_unknown_options_are_named_without_their_values():
    options = {"anon": "hidden", "client_kwargs": {"auth": "hidden", "headers": {"X": "hidden"}}}
    with pytest.raises(UnsupportedError, match=r"(?s)headers, as in.*found: +anon, client_kwargs\['auth'\]") as error:
        amc.open_checkpoint("https://h/a", storage_options=options)
    assert "hidden" not in str(error.value)


def test_user_and_password_of_a_url_are_sent_unless_a_header_has_others(folder):
    with serve(folder, authorization="Basic dXNlcjpwL3c=") as server:
        url = server.url.replace("://", "://user:p%2Fw@")
        assert_same(amc.load_state_dict(url, rules=[]), TENSORS)
    with serve(folder, authorization="Bearer other") as server:
        url = server.url.replace("://", "://user:p%2Fw@")
        options = {"headers": {"Authorization": "Bearer other"}}
        assert_same(amc.load_state_dict(url, rules=[], storage_options=options), TENSORS)


@pytest.mark.parametrize(
    "url",
    [
        "http://user:hidden/1@h/a",
        "http://user:hidden?1@h/a",
        "http://user:hidden#1@h/a",
        "http://user:hidden@h:port/a",
        "https://user:hidden@a..b/?hidden",
    ],
)
def test_url_that_cannot_be_taken_apart_is_refused_without_its_password(url):
    with pytest.raises(CheckpointError, match=r"(?s)cannot be read.*where: +https?://\.\.\.\n.*%2F") as error:
        amc.open_checkpoint(url)
    assert "hidden" not in str(error.value)


def test_token_with_a_line_break_is_one_error_that_does_not_show_it(folder):
    with serve(folder) as server, pytest.raises(CheckpointError, match="line break") as error:
        amc.open_checkpoint(server.url, storage_options={"headers": {"Authorization": "Bearer hidden\n"}})
    assert "hidden" not in str(error.value)


@pytest.mark.parametrize("scheme", ["s3", "s3a", "gs", "gcs"])
@pytest.mark.parametrize("user", ["user:hidden@", "hidden@", "user:hidden/1@"])
def test_bucket_with_a_password_is_refused_before_a_library_shows_it(scheme, user):
    with pytest.raises(UnsupportedError, match=rf"(?s)user or a password.*where: +{scheme}://\.\.\.\n") as error:
        amc.open_checkpoint(f"{scheme}://{user}bucket/folder")
    assert "hidden" not in str(error.value)


def test_store_lists_names_and_fetches_small_files(memory, folder):
    found = find_folder(memory, "", None)
    assert sorted(found.names()) == sorted(os.listdir(folder))
    config, absent, cut = found.fetch(["config.json", "absent", "model.safetensors.index.json"], 5)
    assert config == (folder / "config.json").read_bytes()[:6]
    assert isinstance(absent, FileNotFoundError)
    assert len(cut) == 6
    fsspec.filesystem("memory").pipe_file(f"/bucket/{folder.name}/code/a.py", b"")
    assert "code" in found.names()
    assert "code/a.py" in found.names(below=True)


def test_store_that_does_not_exist_is_an_os_error():
    with pytest.raises(OSError, match="FileNotFoundError"):
        find_folder("memory://absent", "", None).names()


def test_files_of_stores_are_read_through_fsspec(memory):
    file = find_folder(memory, "", None).file("model-00001-of-00002.safetensors", 8, None)
    assert isinstance(file, FsspecFile)
    assert file.describe() == f"{memory}/model-00001-of-00002.safetensors"


@pytest.mark.parametrize("query", ["", "?X-Amz-Signature=s"])
def test_files_of_web_servers_are_read_by_range(query):
    file = find_folder(f"https://u:p@h/a{query}", "", None).file("b c", 8, None)
    assert isinstance(file, WebFile)
    assert file.describe() == "https://h/a/b%20c"
    assert file._locate().url == f"https://u:p@h/a/b%20c{query}"


@pytest.mark.parametrize("shape", [(0,), (0, 3), (), (1,)])
def test_tensors_without_and_with_one_element_are_read(tmp_path, shape):
    tensors = {"a": torch.full(shape, 7.0), "b": torch.empty(0)}
    save_file(tensors, tmp_path / "model.safetensors")
    with serve(tmp_path) as server:
        for threads in (None, 1):
            assert_same(amc.load_state_dict(server.url, rules=[], threads=threads), tensors)
    assert_same(amc.load_state_dict(f"file://{tmp_path}", rules=[]), tensors)


def test_checkpoint_without_tensors_is_read(tmp_path):
    save_file({}, tmp_path / "model.safetensors")
    with serve(tmp_path) as server:
        assert amc.load_state_dict(server.url, rules=[]) == {}


@pytest.mark.parametrize("nbytes", [0, 1, 7])
def test_files_too_short_for_a_header_are_named(tmp_path, nbytes):
    (tmp_path / "model.safetensors").write_bytes(bytes(nbytes))
    with serve(tmp_path) as server:
        with pytest.raises(CheckpointError, match=rf"(?s)too short.*/model.safetensors\n.*found: +{nbytes} bytes"):
            amc.open_checkpoint(server.url)
