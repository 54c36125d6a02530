"""Tests of the temporary folder with the small files of a checkpoint behind a URL."""

from __future__ import annotations

import gc
import os
import tempfile
from pathlib import Path

import pytest

from automodel_conv.errors import WriteError
from automodel_conv.files.remote.small_files import SmallFiles


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch):
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def test_files_and_folders_are_written_and_removed_with_the_last_reference(temporary):
    files = {"config.json": b"{}", "code/inner/a.py": b"pass", "empty": b""}
    small = SmallFiles(files)
    assert {name: Path(small.folder, name).read_bytes() for name in files} == files
    assert Path(small.folder).parent == temporary
    other = small
    del small
    gc.collect()
    assert os.listdir(temporary)
    del other
    gc.collect()
    assert not os.listdir(temporary)


def test_folder_without_files_is_made(temporary):
    small = SmallFiles({})
    assert os.listdir(small.folder) == []


def test_folder_is_removed_after_an_error(temporary):
    with pytest.raises(WriteError):
        SmallFiles({"a": b"file", "a/b": b"below a file"})
    gc.collect()
    assert not os.listdir(temporary)


def test_temporary_folder_that_cannot_be_written_is_an_error(temporary):
    temporary.rmdir()
    with pytest.raises(WriteError, match="temporary"):
        SmallFiles({})


def test_folder_that_somebody_removed_is_no_error(temporary):
    small = SmallFiles({"a": b""})
    os.remove(Path(small.folder, "a"))
    os.rmdir(small.folder)
    del small
    gc.collect()
