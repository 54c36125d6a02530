"""Tests of functions and commands that need local paths: a URL is refused before anything is written."""

from __future__ import annotations

import os

import pytest
import torch

import automodel_conv as amc
from automodel_conv.errors import UnsupportedError
from automodel_conv.integrations.dcp import HuggingFaceReader, HuggingFaceWriter
from tests.cli.support import run
from tests.files.remote.support import write_sharded

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
