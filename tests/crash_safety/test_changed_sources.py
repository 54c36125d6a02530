"""Tests of sources that change before a conversion resumes, or while it runs."""

from __future__ import annotations

import os
from functools import partial
from typing import Any

import pytest

import automodel_conv as amc
from automodel_conv.errors import ConversionError, DestinationError, ReadError
from tests.crash_safety.support import (
    KINDS,
    arguments_of,
    assert_refused,
    assert_whole_or_refused,
    copy_of,
    everything,
    finish,
    new_directory,
)
from tests.faults import replace_calls


@pytest.mark.parametrize("kind", KINDS)
def test_source_truncated_while_it_is_read(source, wanted, tmp_path, monkeypatch, kind):
    copied, directory = copy_of(source, tmp_path / "source"), new_directory(tmp_path / "out", source)
    cut = copied / "model-00005-of-00005.safetensors"

    def truncate(number: int, name: str, arguments: tuple[Any, ...]) -> None:
        if number == 2:
            os.truncate(cut, 20_000)

    call = partial(amc.convert_checkpoint, copied, directory, **KINDS[kind])
    with monkeypatch.context() as patch:
        replace_calls(("create",), after=truncate, put=patch.setattr)
        assert_refused(call, ReadError, "ends too early", str(cut))
    assert not assert_whole_or_refused(directory, wanted[kind])
    assert_refused(call, ConversionError, str(cut))
    cut.write_bytes((source / cut.name).read_bytes())
    assert_refused(
        call, DestinationError, "differs from this one", "source files", cut.name
    )  # it may be a different source
    os.utime(cut, ns=(1, 10**18))
    assert finish(copied, directory, kind, wanted) > 0


@pytest.mark.parametrize("change", ["bytes", "time"])
def test_source_changed_before_resuming_is_refused_by_name(forked, source, wanted, tmp_path, change):
    copied, directory = copy_of(source, tmp_path / "source"), new_directory(tmp_path / "out", source)
    forked.run("convert", arguments=arguments_of(copied, directory, "nemo"), signal="SIGKILL", call=40)
    changed = copied / "model-00005-of-00005.safetensors"
    if change == "bytes":
        changed.write_bytes(changed.read_bytes()[:-1] + b"?")
    else:
        os.utime(changed, ns=(1, 2 * 10**18))
    before = everything(directory)
    assert before
    call = partial(amc.convert_checkpoint, copied, directory, **KINDS["nemo"])
    error = assert_refused(call, DestinationError, "differs from this one", changed.name, "resume=False")
    assert "model-00001-of-00005" not in str(error)
    assert everything(directory) == before
    report = amc.convert_checkpoint(copied, directory, resume=False, **KINDS["nemo"])
    assert report.files_resumed == 0
    if change == "time":
        assert everything(directory) == wanted["nemo"]


@pytest.mark.parametrize("gone", [False, True])
def test_source_changed_during_the_run_is_refused_at_its_end(source, wanted, tmp_path, monkeypatch, gone):
    copied, directory = copy_of(source, tmp_path / "source"), new_directory(tmp_path / "out", source)
    changed = copied / "model-00001-of-00005.safetensors"

    def change(number: int, name: str, arguments: tuple[Any, ...]) -> None:
        if number == 1 + len([name for name in wanted["nemo"] if name.endswith(".safetensors")]):
            changed.unlink() if gone else os.utime(changed, ns=(1, 2 * 10**18))

    with monkeypatch.context() as patch:
        replace_calls(("write_end",), after=change, put=patch.setattr)
        call = partial(amc.convert_checkpoint, copied, directory, **KINDS["nemo"])
        assert_refused(call, ReadError if gone else DestinationError, changed.name)
    assert not assert_whole_or_refused(directory, wanted["nemo"])
