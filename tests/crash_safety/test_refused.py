"""Tests of full disks and refused system calls: an error, then success once the cause is gone."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import automodel_conv as amc
from automodel_conv.errors import ReadError, WriteError
from automodel_conv.files import system
from automodel_conv.files.staging import STAGING_NAME
from tests.crash_safety.support import (
    KINDS,
    SIZES,
    arguments_of,
    assert_refused,
    assert_whole_or_refused,
    copy_of,
    count_calls,
    everything,
    fail_calls,
    finish,
    new_directory,
    noted,
)
from tests.faults import replace_calls


@contextlib.contextmanager
def small_disk(path: Path, nbytes: int) -> Iterator[None]:
    """Mount a file system of ``nbytes``."""
    path.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={nbytes}", "tmpfs", str(path)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"mounting requires root: {mounted.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", str(path)], check=True)


@pytest.mark.parametrize("kind", ["nemo", "transformers"])
def test_full_disk_is_reported_and_conversion_resumes_with_more_space(source, wanted, tmp_path, monkeypatch, kind):
    with small_disk(tmp_path / "disk", 1 << 20):
        ballast = tmp_path / "disk" / "ballast"
        ballast.write_bytes(bytes(600_000))
        directory = new_directory(tmp_path / "disk" / "out", source)
        arguments = {"source": source, "destination": directory, **KINDS[kind]}
        assert_refused(lambda: amc.convert_checkpoint(**arguments), WriteError, "too little room", str(directory))
        assert not assert_whole_or_refused(directory, wanted[kind])
        with monkeypatch.context() as patch:  # another process fills the disk after the space check
            patch.setattr(system, "free_bytes", lambda path: 1 << 40)
            assert_refused(lambda: amc.convert_checkpoint(**arguments), WriteError, "No space left", "room for")
        assert not assert_whole_or_refused(directory, wanted[kind])
        assert 0 < len(noted(directory)) < 5
        ballast.unlink()
        assert finish(source, directory, kind, wanted) > 0


def test_save_to_a_full_disk_leaves_it_unchanged(model, source, wanted, tmp_path):
    with small_disk(tmp_path / "disk", 1 << 20):
        ballast = tmp_path / "disk" / "ballast"
        ballast.write_bytes(bytes(600_000))
        directory = new_directory(tmp_path / "disk" / "out", source)
        before = everything(directory)
        assert_refused(
            lambda: amc.save_checkpoint(model, directory, **SIZES), WriteError, "No space left", str(directory)
        )
        assert everything(directory) == before
        ballast.unlink()
        amc.save_checkpoint(model, directory, **SIZES)
        assert everything(directory) == wanted["saved"]


def test_space_of_a_truncated_file_counts_as_free_for_it(source, wanted, tmp_path):
    with small_disk(tmp_path / "disk", 900_000):
        directory = new_directory(tmp_path / "disk" / "out", source)
        big = KINDS["nemo"] | {"max_shard_size": "1GB"}
        with pytest.MonkeyPatch.context() as patch:
            fail_calls(patch, "sync", errno.EIO, lambda number: number == 2)  # the first sync is of the journal
            assert_refused(lambda: amc.convert_checkpoint(source, directory, **big), WriteError, "Input/output error")
        assert os.path.getsize(directory / STAGING_NAME / "nemo.safetensors") > 450_000
        amc.convert_checkpoint(source, directory, **big)
        amc.open_checkpoint(directory)


@pytest.mark.parametrize("limit", [0, 100, 40_000, 90_000])
@pytest.mark.parametrize("kind", ["nemo", "transformers"])
def test_file_size_limit_is_reported_and_conversion_resumes_without_it(forked, source, wanted, tmp_path, kind, limit):
    directory = new_directory(tmp_path / "out", source)
    answer = forked.run("convert", arguments=arguments_of(source, directory, kind), limit=limit)
    assert answer["outcome"] == "WriteError", answer
    assert "File too large" in answer["text"]
    assert (answer["descriptors"], answer["workers"], answer["later"]) == (0, [], 0)
    assert not assert_whole_or_refused(directory, wanted[kind])
    finish(source, directory, kind, wanted)


@pytest.mark.parametrize("name", ["pwritev", "reserve", "write_end", "copy_file"])
def test_disk_that_becomes_full_during_the_run(source, wanted, tmp_path, monkeypatch, name):
    total = len(count_calls((name,), lambda: amc.convert_checkpoint(source, tmp_path / "counted", **KINDS["nemo"])))
    assert total > 1
    for first in range(1, total + 1):
        directory = new_directory(tmp_path / f"{first}", source)
        with monkeypatch.context() as patch:
            fail_calls(patch, name, errno.ENOSPC, lambda number, first=first: number >= first)
            call = partial(amc.convert_checkpoint, source, directory, **KINDS["nemo"])
            assert_refused(call, WriteError, "No space left", str(directory))
        assert not assert_whole_or_refused(directory, wanted["nemo"])
        finish(source, directory, "nemo", wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_read_error_names_the_file_and_keeps_finished_files(source, wanted, tmp_path, monkeypatch, kind):
    directory = new_directory(tmp_path / "out", source)
    broken = str(source / "model-00005-of-00005.safetensors")

    def fail(number: int, name: str, arguments: tuple[Any, ...]) -> None:
        file, at = arguments[0], arguments[2 if name == "preadv" else 1]
        if os.path.realpath(f"/proc/self/fd/{file}") == broken and at > 8:  # past the header
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        replace_calls(("preadv", "copy_range"), before=fail, put=patch.setattr)
        call = partial(amc.convert_checkpoint, source, directory, **KINDS[kind])
        assert_refused(call, ReadError, broken, "Input/output error", "model.layers.")
    assert not assert_whole_or_refused(directory, wanted[kind])
    assert noted(directory)
    assert finish(source, directory, kind, wanted) > 0


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS], ids=errno.errorcode.get)
@pytest.mark.parametrize("name", ["make_directory", "open_append", "create", "rename"])
def test_directory_that_is_not_writable(model, source, wanted, tmp_path, monkeypatch, name, code):
    directory = new_directory(tmp_path / "out", source)
    before = everything(directory)
    with monkeypatch.context() as patch:
        fail_calls(patch, name, code, lambda number: True)
        assert_refused(
            lambda: amc.save_checkpoint(model, directory, **SIZES), WriteError, os.strerror(code), str(directory)
        )
        if name != "open_append":  # the lock needs it
            assert everything(directory) == before
        call = partial(amc.convert_checkpoint, source, directory, **KINDS["nemo"])
        assert_refused(call, WriteError, os.strerror(code), str(directory))
    assert not assert_whole_or_refused(directory, wanted["nemo"])
    finish(source, directory, "nemo", wanted)


@pytest.mark.skipif(os.geteuid() == 0, reason="root ignores permissions")
def test_a_directory_without_permission(source, wanted, tmp_path):
    directory = new_directory(tmp_path / "out", source)
    directory.chmod(stat.S_IRUSR | stat.S_IXUSR)
    try:
        call = partial(amc.convert_checkpoint, source, directory, **KINDS["nemo"])
        assert_refused(call, WriteError, "Permission denied", str(directory))
    finally:
        directory.chmod(stat.S_IRWXU)
    finish(source, directory, "nemo", wanted)


def test_read_only_files_next_to_the_weights(model, source, wanted, tmp_path):
    copied = copy_of(source, tmp_path / "source")
    (copied / "config.json").chmod(0o444)
    directory = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        fail_calls(patch, "rename", errno.EIO, lambda number: True)
        call = partial(amc.convert_checkpoint, copied, directory, **KINDS["nemo"])
        assert_refused(call, WriteError, "Input/output error")
    finish(copied, directory, "nemo", wanted)
