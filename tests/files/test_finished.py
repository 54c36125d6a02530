"""Tests of recognizing a finished conversion by sizes, headers and small files."""

import errno
import os

import pytest

from automodel_conv.errors import ReadError
from automodel_conv.files import finished, system
from automodel_conv.files.finished import is_finished
from automodel_conv.files.shards import CHECKSUMS_NAME, Spec, shard_of
from automodel_conv.files.staging import STAGING_NAME
from automodel_conv.files.uploads.output_folders import LocalFolder

INDEX = "model.safetensors.index.json"


@pytest.fixture
def work(tmp_path):
    """Write a finished directory; return it with the arguments that describe it."""
    directory, source = tmp_path / "out", tmp_path / "source"
    directory.mkdir()
    source.mkdir()
    shards = [shard_of(f"model-{n:05}-of-00002.safetensors", [Spec(f"w{n}", "F32", (2,))]) for n in (1, 2)]
    for shard in shards:
        (directory / shard.name).write_bytes(shard.header + b"\1" * (shard.nbytes - len(shard.header)))
    texts = {INDEX: b"index", "config.json": b"{}"}
    for name, text in texts.items():
        (directory / name).write_bytes(text)
    for place in (directory / "tokenizer.json", source / "tokenizer.json"):
        place.write_bytes(b"words" * 3)
    return directory, [shards, texts, {"tokenizer.json": str(source / "tokenizer.json")}, False]


def test_exactly_these_files_are_finished_whatever_the_data_is(work):
    directory, arguments = work
    assert is_finished(LocalFolder(str(directory)), *arguments)
    (directory / "README.md").write_text("of somebody")
    assert is_finished(LocalFolder(str(directory)), *arguments)


def change_byte(path, offset):
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


CHANGES = {
    "no directory": lambda d: d.rename(d.parent / "elsewhere"),
    "unfinished work": lambda d: ((d / STAGING_NAME).mkdir(), (d / STAGING_NAME / "journal.jsonl").touch()),
    "a shard is gone": lambda d: (d / "model-00002-of-00002.safetensors").unlink(),
    "a shard is shorter": lambda d: os.truncate(d / "model-00002-of-00002.safetensors", 100),
    "another header": lambda d: change_byte(d / "model-00001-of-00002.safetensors", 20),
    "another index": lambda d: change_byte(d / INDEX, 4),
    "no config": lambda d: (d / "config.json").unlink(),
    "more weights": lambda d: (d / "more.safetensors").touch(),
    "checksums": lambda d: (d / CHECKSUMS_NAME).touch(),
    "another tokenizer": lambda d: change_byte(d / "tokenizer.json", 14),
    "a longer tokenizer": lambda d: (d / "tokenizer.json").write_bytes(b"words" * 4),
    "no tokenizer": lambda d: (d / "tokenizer.json").unlink(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_anything_else_is_not(work, change, monkeypatch):
    monkeypatch.setattr(finished, "_STEP_BYTES", 7)
    directory, arguments = work
    assert is_finished(LocalFolder(str(directory)), *arguments)
    CHANGES[change](directory)
    assert not is_finished(LocalFolder(str(directory)), *arguments)


def test_checksums_must_be_there_if_they_are_asked_for(work):
    directory, (*arguments, _) = work
    assert not is_finished(LocalFolder(str(directory)), *arguments, True)
    (directory / CHECKSUMS_NAME).touch()
    assert is_finished(LocalFolder(str(directory)), *arguments, True)


def test_failed_read_is_an_error(work, monkeypatch):
    def refuse(path):
        raise OSError(errno.EACCES, "Permission denied")

    directory, arguments = work
    monkeypatch.setattr(system, "list_names", refuse)
    with pytest.raises(ReadError, match=r"(?s)cannot read the directory.*out.*Permission denied"):
        is_finished(LocalFolder(str(directory)), *arguments)
