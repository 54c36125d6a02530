"""Tests of ``convert --dry-run``: it reports what a conversion would do, and neither writes nor reads data."""

import re

from automodel_conv.files import system
from automodel_conv.files.staging import STAGING_NAME
from tests.cli.support import run, value


def test_dry_run_prints_needed_space_and_writes_nothing(plain, no_tensor_data, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    result = run("convert", plain, tmp_path / "new" / "er", "--no-model", "--max-shard-size", "10B", "--dry-run")
    assert result.exit_code == 0, result.output
    assert "reads 32 bytes," in result.stdout
    assert value(result.stdout, "files") == "2"
    for label in ("reads", "writes", "needs on the disk", "free on the disk", "left out"):
        assert label in result.stdout
    assert sorted(tmp_path.rglob("*")) == before


def test_dry_run_fails_if_the_disk_is_too_full(plain, tmp_path, monkeypatch):
    monkeypatch.setattr(system, "free_bytes", lambda directory: 100)
    result = run("convert", plain, tmp_path / "new", "--no-model", "--dry-run")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: the disk has too little room\n")
    assert re.search(r"found:    100 bytes free, [\d.]+ \w+ too few\n  do:       remove other files, or", result.stderr)
    assert "needs on the disk" in result.stdout
    # Space that an unfinished conversion uses is free for its completion, or for another conversion.
    (tmp_path / "new" / STAGING_NAME).mkdir(parents=True)
    (tmp_path / "new" / STAGING_NAME / "model.safetensors").write_bytes(bytes(5000))
    result = run("convert", plain, tmp_path / "new", "--no-model", "--dry-run")
    assert result.exit_code == 0, result.output
    assert value(result.stdout, "unfinished work") == "yes"


def test_dry_run_fails_if_the_destination_has_a_checkpoint(plain):
    result = run("convert", plain, plain, "--no-model", "--dry-run")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: the directory holds a checkpoint already\n")


def test_carried_and_left_out_tensors_are_named(plain, tmp_path):
    result = run("convert", plain, tmp_path / "new", "--no-model", "--drop", "b", "--dry-run")
    assert result.exit_code == 0, result.output
    assert value(result.stdout, "left out") == "1"
    assert value(result.stdout, "carried as they are") == "0"
    assert "left out:\n    b\n" in result.stdout
    assert "unfinished work" not in result.stdout
