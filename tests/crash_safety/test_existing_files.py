"""Tests of two writers at once, and of existing directories: checkpoints, unfinished work, journals, damaged files."""

from __future__ import annotations

import errno
import json
import os
import signal
from functools import partial
from typing import Any

import pytest
import transformers

import automodel_conv as amc
from automodel_conv.errors import ConversionError, DestinationError, VerificationError, WriteError
from automodel_conv.files.staging import STAGING_NAME
from tests.crash_safety.disk import stop
from tests.crash_safety.support import (
    INDEX,
    KINDS,
    SIZES,
    arguments_of,
    assert_refused,
    assert_whole_or_refused,
    calls_of,
    copy_of,
    count_calls,
    everything,
    fail_calls,
    files,
    finish,
    new_directory,
    noted,
)
from tests.faults import replace_calls


def test_a_second_conversion_of_the_same_process_is_refused(source, wanted, tmp_path, monkeypatch):
    directory = new_directory(tmp_path / "out", source)
    call = partial(amc.convert_checkpoint, source, directory, **KINDS["nemo"])
    refused = []

    def again(number: int, name: str, arguments: tuple[Any, ...]) -> None:
        if number in (2, 5):
            assert_refused(call, DestinationError, "another process writes", str(directory))
            refused.append(number)

    with monkeypatch.context() as patch:
        replace_calls(("create",), before=again, put=patch.setattr)
        call()
    assert refused == [2, 5]
    assert files(directory) == wanted["nemo"]


def test_second_process_is_refused_but_not_after_a_kill(forked, model, source, wanted, tmp_path):
    directory = new_directory(tmp_path / "out", source)
    forked.start("convert", arguments=arguments_of(source, directory, "nemo"), call=50, hold=True)
    child = forked.answer()["holds"]
    before = everything(directory)
    call = partial(amc.convert_checkpoint, source, directory, **KINDS["nemo"])
    assert_refused(call, DestinationError, "another process writes", str(directory))
    assert_refused(partial(call, resume=False), DestinationError, "another process writes")
    assert_refused(partial(amc.save_checkpoint, model, directory), DestinationError, "another process writes")
    assert everything(directory) == before
    os.kill(child, signal.SIGKILL)
    assert os.WIFSIGNALED(forked.answer()["status"])
    assert finish(source, directory, "nemo", wanted) > 0


@pytest.mark.parametrize(
    "name", [INDEX, "model.safetensors", "pytorch_model.bin", "model-00001-of-00009.safetensors", "model.gguf"]
)
def test_directory_with_a_checkpoint_is_refused_and_unchanged(model, source, tmp_path, name):
    directory = new_directory(tmp_path / "out", source)
    (directory / name).write_bytes(b"mine")
    before = everything(directory)
    for call in (
        partial(amc.convert_checkpoint, source, directory, **KINDS["nemo"]),
        partial(amc.convert_checkpoint, source, directory, resume=False, **KINDS["nemo"]),
        partial(amc.save_checkpoint, model, directory, **SIZES),
    ):
        assert_refused(call, DestinationError, "holds a checkpoint already", name, str(directory))
        assert everything(directory) == before
        assert sorted(os.listdir(directory)) == sorted(before)


def test_converting_onto_the_source_itself_is_refused(source, tmp_path):
    copied = copy_of(source, tmp_path / "source")
    before = everything(copied)
    assert_refused(partial(amc.convert_checkpoint, copied, copied), DestinationError, "the directory of the source")
    assert everything(copied) == before


@pytest.mark.parametrize("call", [8, 40, 70])
def test_unfinished_work_of_another_kind_is_refused_and_can_still_finish(forked, model, source, wanted, tmp_path, call):
    directory = new_directory(tmp_path / "out", source)
    forked.run("convert", arguments=arguments_of(source, directory, "nemo"), signal="SIGKILL", call=call)
    before = everything(directory)
    other = partial(amc.convert_checkpoint, source, directory, **KINDS["transformers"])
    error = assert_refused(other, DestinationError, "begun with: layout='nemo'", "this call:  layout=None")
    assert "source files" not in str(error)
    assert_refused(partial(amc.save_checkpoint, model, directory), DestinationError, "layout='nemo'", "a save")
    assert everything(directory) == before
    finish(source, directory, "nemo", wanted)


@pytest.mark.parametrize("call", [8, 40, 86, 89])
def test_without_resume_the_conversion_restarts_as_any_kind(forked, source, wanted, tmp_path, call):
    directory = new_directory(tmp_path / "out", source)
    forked.run("convert", arguments=arguments_of(source, directory, "nemo"), signal="SIGKILL", call=call)
    assert (directory / STAGING_NAME).is_dir()
    report = amc.convert_checkpoint(source, directory, resume=False, **KINDS["transformers"])
    assert report.files_resumed == 0
    assert everything(directory) == wanted["transformers"]


GARBAGE = {
    "torn": b'{"finished": "model-0000',
    "no JSON": b"\0\xff\xfe\n",
    "other JSON": b'[1]\n{"finished": []}\n',
    "work of no kind": b'{"work": 5}\n',
    "a list that is finished": b'{"finished": [[]]}\n',
    "a number that is placed": b'{"placing": 3}\n',
}


@pytest.mark.parametrize("text", GARBAGE)
@pytest.mark.parametrize("whole", [False, True], ids=["appended", "whole journal"])
def test_malformed_journal_costs_at_most_the_finished_work(forked, source, wanted, tmp_path, text, whole):
    directory = new_directory(tmp_path / "out", source)
    forked.run("convert", arguments=arguments_of(source, directory, "nemo"), signal="SIGKILL", call=40)
    done = noted(directory)
    journal = directory / STAGING_NAME / "journal.jsonl"
    journal.write_bytes((b"" if whole else journal.read_bytes()) + GARBAGE[text])
    report = amc.convert_checkpoint(source, directory, **KINDS["nemo"])
    assert report.files_resumed == (len(done) if text == "torn" and not whole else 0)
    assert everything(directory) == wanted["nemo"]


@pytest.mark.parametrize("damage", ["truncated", "removed"])
def test_damaged_finished_file_is_written_again_despite_further_failures(source, wanted, tmp_path, damage):
    directory = new_directory(tmp_path / "out", source)
    call = partial(amc.convert_checkpoint, source, directory, **KINDS["nemo"])
    stop(call, 60)
    done = noted(directory)
    assert len(done) > 2
    damaged = directory / STAGING_NAME / min(done)
    lengths = set()
    for number in range(4, 14):  # in some of these the file has its length but not its bytes
        if damage == "removed":
            damaged.unlink(missing_ok=True)
        else:
            os.truncate(damaged, 100)
        stop(call, number)
        lengths.add(os.path.getsize(damaged) if damaged.exists() else None)
        lengths_again = len(wanted["nemo"][damaged.name]) in lengths
        if lengths_again:
            break
        damaged.touch()
    assert lengths_again
    assert call().files_resumed == len(done) - 1
    assert everything(directory) == wanted["nemo"]


def test_unverified_finished_files_are_compared_with_verify(source, wanted, tmp_path):
    directory = new_directory(tmp_path / "out", source)
    call = partial(amc.convert_checkpoint, source, directory, **KINDS["nemo"])
    stop(partial(call, verify=False), 60)
    done = noted(directory)
    assert len(done) > 2
    damaged = directory / STAGING_NAME / min(done)
    data, times = bytearray(damaged.read_bytes()), damaged.stat()
    data[-1] ^= 1
    damaged.write_bytes(data)
    with pytest.raises(VerificationError, match=damaged.name):
        call()
    data[-1] ^= 1
    damaged.write_bytes(data)
    os.utime(damaged, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert call().files_resumed == len(done)
    assert everything(directory) == wanted["nemo"]


def test_index_is_removed_first(model, source, wanted, tmp_path, monkeypatch):
    directory = new_directory(tmp_path / "out", source)

    def look(number: int, name: str, arguments: tuple[Any, ...]) -> None:
        if not arguments[0].startswith(str(directory / STAGING_NAME)):
            assert_whole_or_refused(directory, wanted["saved"])

    last = count_calls(("sync_directory",), partial(amc.save_checkpoint, model, tmp_path / "counted", **SIZES))
    with monkeypatch.context() as patch:
        fail_calls(patch, "sync_directory", errno.EIO, lambda number: number == len(last))
        replace_calls(("remove",), after=look, put=patch.setattr)
        assert_refused(partial(amc.save_checkpoint, model, directory, **SIZES), WriteError, "Input/output error")
    assert not everything(directory)


def test_output_like_an_unnumbered_reference_is_refused_until_complete(forked, source, tmp_path):
    reference = copy_of(source, tmp_path / "reference")
    index = json.loads((reference / INDEX).read_text())
    names = {f"model-{number:05}-of-00005.safetensors": f"part{number}.safetensors" for number in range(2, 6)}
    names["model-00001-of-00005.safetensors"] = "model.safetensors"
    for old, new in names.items():
        (reference / old).rename(reference / new)
    index["weight_map"] = {name: names[file] for name, file in index["weight_map"].items()}
    (reference / INDEX).write_text(json.dumps(index))
    arguments = {"reference": str(reference), "threads": 2}
    total = calls_of(forked, "save", {"directory": str(tmp_path / "counted"), **arguments})
    whole = files(tmp_path / "counted")
    assert set(names.values()) < set(whole)
    for call in range(total - 20, total + 1):
        directory = new_directory(tmp_path / f"{call}", source)
        forked.run(
            "save", arguments={"directory": str(directory), **arguments}, signal="SIGKILL", call=call, when="after"
        )
        if files(directory) != whole:
            with pytest.raises(ConversionError):
                amc.open_checkpoint(directory)
            with pytest.raises((OSError, ValueError)):
                transformers.AutoModelForCausalLM.from_pretrained(directory)
