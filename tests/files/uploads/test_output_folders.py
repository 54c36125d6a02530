"""Tests of folders to write to, of which a directory and a store have the same functions."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from automodel_conv.files.source import opened
from automodel_conv.files.staging import STAGING_NAME
from automodel_conv.files.uploads.output_folders import LocalFolder
from tests.files.uploads.support import complete, new_folder, s3_folder, shards


@pytest.fixture(params=["directory", "store"])
def folder(request, tmp_path):
    if request.param == "directory":
        return LocalFolder(str(tmp_path / "out"))
    return s3_folder(request.getfixturevalue("server"), new_folder())


def read(folder, name):
    with opened(folder.source(name)) as source:
        data = bytearray(source.size())
        source.read_into([memoryview(data)], 0)
        return bytes(data)


def test_files_are_listed_measured_and_read(folder):
    assert folder.names() == []
    assert folder.size("config.json") is None
    files = complete(folder, shards())
    assert {name for name in folder.names() if name != "tokenizer"} == {name for name in files if "/" not in name}
    for name, data in files.items():
        assert (folder.size(name), read(folder, name)) == (len(data), data)
    assert folder.size("absent") is None


def test_directory_holds_all_files_and_a_store_one_after_another(folder):
    plan = [shard for size in (10, 30, 20, 5) for shard in shards(1, size)]
    assert folder.most_on_disk(plan) == (plan[1:3] if folder.is_remote else plan)
    assert [*folder.most_on_disk([])] == []
    assert [*folder.most_on_disk(plan[:1])] == plan[:1]
    assert folder.batches(plan) == ([[shard] for shard in plan] if folder.is_remote else [plan])
    assert bool(folder.upload_bytes) == folder.is_remote


def test_name_is_the_path_or_the_url(folder, tmp_path):
    assert folder.name == (folder.store.url if folder.is_remote else str(tmp_path / "out"))


def test_unfinished_work_is_in_the_directory_on_this_machine(folder, tmp_path):
    with folder.open(shards(), None) as place:
        assert place.path("a").startswith(f"{folder.directory}/{STAGING_NAME}/")


def test_leftovers_of_complete_work_are_removed(folder):
    staging = Path(folder.directory, STAGING_NAME)
    staging.mkdir(parents=True)
    (staging / "lock").touch()
    (staging / "model.safetensors").write_bytes(b"half")
    for _ in range(2):
        folder.remove_leftovers()
        assert not staging.exists()
        assert os.path.exists(folder.directory) != folder.is_remote
