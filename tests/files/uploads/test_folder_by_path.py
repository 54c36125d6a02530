"""Tests of the folders that paths and URLs name."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

import automodel_conv as amc
from automodel_conv.errors import UnsupportedError
from automodel_conv.files.source_options import SourceSettings
from automodel_conv.files.uploads.folder_by_path import folder_of
from automodel_conv.files.uploads.hub_store import HubStore
from automodel_conv.files.uploads.output_folders import LocalFolder
from tests.cli.support import run
from tests.files.remote.support import write_sharded


@pytest.mark.parametrize("path", ["out", Path("out"), b"out"])
def test_path_is_a_directory_whatever_the_options(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert folder_of(path, SourceSettings(storage_options={"key": "of the source"})) == LocalFolder(
        str(tmp_path / "out")
    )


@pytest.mark.parametrize(
    ("url", "bucket", "prefix"),
    [
        ("s3://bucket/a/b", "bucket", "a/b/"),
        ("s3://bucket/a/b/", "bucket", "a/b/"),
        ("s3a://bucket/a", "bucket", "a/"),
        ("s3://bucket", "bucket", ""),
    ],
)
def test_url_of_a_bucket(url, bucket, prefix):
    pytest.importorskip("s3fs")
    store = folder_of(url, SourceSettings(storage_options={"anon": True})).store
    assert (store.bucket, store.prefix, store.url) == (bucket, prefix, url.rstrip("/"))


def test_url_of_the_hub():
    pytest.importorskip("huggingface_hub")
    assert isinstance(
        folder_of("hf://org/name", SourceSettings(storage_options={"key": "of the source"})).store, HubStore
    )


def test_waiting_files_are_in_the_cache_under_the_url_and_the_endpoint(cache, monkeypatch):
    pytest.importorskip("s3fs")
    directories = [
        folder_of(url, SourceSettings(storage_options=options)).directory
        for url, options in [
            ("s3://bucket/a", {}),
            ("s3://bucket/b", {}),
            ("s3://bucket/a", {"endpoint_url": "http://127.0.0.1:1"}),
        ]
    ]
    assert len(set(directories)) == 3
    assert all(os.path.dirname(path) == str(cache / "automodel_conv" / "uploads") for path in directories)
    assert (
        folder_of("s3://bucket/a/", SourceSettings(storage_options={"key": "k", "secret": "other"})).directory
        == directories[0]
    )
    assert not cache.exists()
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/me")
    assert folder_of("s3://bucket/a").directory.startswith("/home/me/.cache/automodel_conv/uploads/")


REFUSED = {
    "gs://bucket/a": "write to a local directory, then upload it",
    "https://host/a": "write to a local directory, then upload it",
    "file:///tmp/a": "write to a local directory, then upload it",
    "s3://user:hidden@bucket/a": "pass credentials in storage_options=",
    "s3://bucket/a?X-Amz-Signature=hidden": "pass credentials in storage_options=",
}


@pytest.mark.parametrize("url", REFUSED)
@pytest.mark.parametrize("door", ["convert", "save", "convert_adapter"])
def test_other_urls_are_refused_before_anything_is_read_or_written(url, door, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    calls = {
        "convert": lambda: amc.convert_checkpoint("absent", url),
        "save": lambda: amc.save_checkpoint({"a": torch.ones(2)}, url, rules=[]),
        "convert_adapter": lambda: amc.convert_adapter("absent", url, base="absent", layout="vllm"),
    }
    with pytest.raises(UnsupportedError) as caught:
        calls[door]()
    assert REFUSED[url] in str(caught.value)
    assert "hidden" not in str(caught.value)
    assert os.listdir(tmp_path) == []


def test_bucket_must_be_named():
    pytest.importorskip("s3fs")
    with pytest.raises(UnsupportedError, match="a URL without a bucket"):
        folder_of("s3://")


def test_missing_library_is_named_with_its_extra(monkeypatch):
    def fail(*arguments, **named):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr("fsspec.core.url_to_fs", fail)
    with pytest.raises(UnsupportedError, match=r'(?s)s3://bucket/a.*pip install "automodel-conv\[s3\]"'):
        folder_of("s3://bucket/a")


@pytest.mark.parametrize("command", ["convert source URL --no-model", "convert source URL --dry-run --no-model"])
def test_commands_refuse_other_urls(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_sharded(tmp_path / "source")
    result = run(*command.replace("URL", "gs://bucket/folder").split())
    assert result.exit_code == 1
    assert "files cannot be written to this kind of URL" in result.stderr
    assert os.listdir(tmp_path) == ["source"]
