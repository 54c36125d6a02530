"""Tests of file calls that fail once: the same conversion or save then succeeds."""

from __future__ import annotations

import errno
import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import automodel_conv as amc
from automodel_conv.errors import ConversionError
from automodel_conv.files import system
from automodel_conv.files.staging import STAGING_NAME
from tests.crash_safety.support import (
    KINDS,
    assert_whole_or_refused,
    count_calls,
    everything,
    files,
    finish,
)
from tests.faults import CHANGING, NEVER_FAILING, READING, descriptors, replace_calls, workers


def test_every_file_call_is_watched():
    public = {
        name
        for name, value in vars(system).items()
        if inspect.isfunction(value) and value.__module__ == system.__name__ and not name.startswith("_")
    }
    assert sorted((*CHANGING, *READING, *NEVER_FAILING)) == sorted(public)


def fail_each(call: Callable[[Path], Any], root: Path, then: Callable[[Path, str, bool], None]) -> int:
    """Make each file call of ``call(directory)`` that can fail do so once; return the number of calls.

    Args:
        then: called after each failure with the directory, the failed function, and whether the caller got an error.
    """
    names = (*CHANGING, *READING)
    total = len(count_calls(names, lambda: call(root / "counted")))
    for fails in range(1, total + 1):
        failed = []

        def fail(number: int, name: str, arguments: tuple[Any, ...], fails: int = fails, failed: list = failed) -> None:
            if number == fails:
                failed.append(name)
                raise OSError(errno.EIO, os.strerror(errno.EIO), "/some/file")

        directory = root / f"{fails}"
        before = descriptors()
        with pytest.MonkeyPatch.context() as patch:
            replace_calls(names, before=fail, put=patch.setattr)
            message = None
            try:
                call(directory)
            except ConversionError as error:
                message = str(error)
        assert message is None or "Input/output error" in message
        assert descriptors() == before, failed
        assert workers() == []
        if failed:
            then(directory, failed[0], message is not None)
    return total


# These may fail once without harm: bytes that the kernel cannot copy are read and written, leftovers are removed later.
HARMLESS = {"copy_range", "open_readonly", "remove", "remove_directory", "list_names"}


def test_each_failing_call_is_reported_and_the_conversion_then_finishes(source, wanted, tmp_path):
    kind, harmless = "in few files", []

    def then(directory: Path, name: str, raised: bool) -> None:
        if raised:
            if directory.exists():
                assert_whole_or_refused(directory, wanted[kind])
            finish(source, directory, kind, wanted)
        else:
            harmless.append(name)
        assert files(directory) == wanted[kind]

    total = fail_each(lambda directory: amc.convert_checkpoint(source, directory, **KINDS[kind]), tmp_path, then)
    assert total > 100
    assert set(harmless) <= HARMLESS


@pytest.mark.parametrize("verb", ["convert", "save"])
def test_each_failing_call_is_reported_while_checksums_are_written(model, source, tmp_path, verb):
    def call(directory: Path) -> None:
        if verb == "convert":
            amc.convert_checkpoint(source, directory, rules=[], max_shard_size="1GB", threads=1, checksums=True)
        else:
            amc.save_checkpoint(model, directory, threads=1, checksums=True)

    call(tmp_path / "whole")
    whole, harmless = files(tmp_path / "whole"), []

    def then(directory: Path, name: str, raised: bool) -> None:
        if raised:
            if verb == "save" and directory.exists():  # config and index may remain if no lock is available
                assert everything(directory).keys() <= {f"{STAGING_NAME}/lock", f"{STAGING_NAME}/journal.jsonl"}
            call(directory)
        else:
            harmless.append(name)
        assert files(directory) == whole

    assert fail_each(call, tmp_path, then) > 50
    assert set(harmless) <= HARMLESS
