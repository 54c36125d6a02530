"""Tests of unfinished work of an earlier process: resumed if it is the same, otherwise refused or discarded."""

import json
import os

import pytest

from automodel_conv.errors import DestinationError
from automodel_conv.files import system
from automodel_conv.files.journal import append_record, read_journal
from automodel_conv.files.resuming import resume_or_discard
from automodel_conv.files.shards import Spec, shard_of
from automodel_conv.files.staging import JOURNAL_NAME, STAGING_NAME

INDEX = "model.safetensors.index.json"
SHARDS = [shard_of(f"model-{n:05}-of-00002.safetensors", [Spec(f"w{n}", "F32", (2,))]) for n in (1, 2)]
FIRST, SECOND = (shard.name for shard in SHARDS)
WORK = {"files": {"a": [1, 2], "b": [3, 4]}, "layout": "nemo"}


@pytest.fixture
def directory(tmp_path):
    (tmp_path / STAGING_NAME).mkdir()
    return tmp_path


def begun(directory, *records, work=WORK, place=STAGING_NAME, names=()):
    """Write a journal with these records, and whole shards."""
    for shard in SHARDS:
        if shard.name in names:
            (directory / place / shard.name).write_bytes(bytes(shard.nbytes))
    with system.open_append(str(directory / STAGING_NAME / JOURNAL_NAME)) as file:
        for record in ({"work": work}, *records):
            append_record(file.fileno(), record)


def resumed(directory, work=WORK, resume=True):
    """Return the finished shards and the records of the journal afterwards."""
    with system.open_append(str(directory / STAGING_NAME / JOURNAL_NAME)) as file:
        fd = file.fileno()
        found = resume_or_discard(read_journal(fd), fd, str(directory), SHARDS, work, resume, INDEX)
        return found, read_journal(fd)


def test_a_new_directory_begins_with_the_work(directory):
    assert resumed(directory) == (set(), (WORK, set(), set(), {}))


def test_finished_shards_of_the_same_work_are_kept_and_other_files_removed(directory):
    begun(directory, {"finished": FIRST}, names=[FIRST, SECOND])
    (directory / STAGING_NAME / "config.json").touch()
    finished, state = resumed(directory, work=dict(WORK, files={"b": (3, 4), "a": (1, 2)}))
    assert finished == state.finished == {FIRST}
    assert sorted(os.listdir(directory / STAGING_NAME)) == [JOURNAL_NAME, FIRST]


def test_a_shard_that_has_lost_bytes_is_written_again_whatever_its_size_is_later(directory):
    begun(directory, {"finished": FIRST}, {"finished": SECOND}, names=[FIRST, SECOND])
    os.truncate(directory / STAGING_NAME / SECOND, 50)
    finished, state = resumed(directory)
    assert finished == state.finished == {FIRST}
    assert not (directory / STAGING_NAME / SECOND).exists()


def test_without_resume_nothing_is_kept(directory):
    begun(directory, {"finished": FIRST}, names=[FIRST])
    assert resumed(directory, resume=False) == (set(), (WORK, set(), set(), {}))
    assert os.listdir(directory / STAGING_NAME) == [JOURNAL_NAME]


def with_options(work=WORK, **options):
    return {"options": options, **work}


def test_work_is_the_same_if_only_options_are_spelled_differently(directory):
    begun(directory, {"finished": FIRST}, work=with_options(layout="None"), names=[FIRST])
    assert resumed(directory, work=with_options(layout="'transformers'"))[0] == {FIRST}


def test_journal_without_options_resumes(directory):
    begun(directory, {"finished": FIRST}, names=[FIRST])
    assert resumed(directory, work=with_options(layout="'nemo'"))[0] == {FIRST}


def test_options_of_other_work_are_named_and_not_its_digests(directory):
    begun(directory, work=with_options({"tensors": "04ab", "files": ["a"]}, layout="'nemo'", drop="[]"))
    with pytest.raises(DestinationError) as caught:
        resumed(directory, work=with_options({"tensors": "17cd", "files": ["b"]}, layout="'vllm'", drop="[]"))
    assert "    begun with: layout='nemo'\n    this call:  layout='vllm'\n  do:" in str(caught.value)


def test_source_files_of_other_work_are_named(directory):
    begun(directory, work=with_options(layout="'nemo'"))
    with pytest.raises(DestinationError) as caught:
        resumed(directory, work=with_options(WORK | {"files": {"a": [1, 3]}}, layout="'nemo'"))
    assert "  found:\n    files differ: a, b\n  do:" in str(caught.value)


def test_other_work_is_refused_with_the_keys_that_differ(directory):
    begun(directory, {"finished": FIRST}, names=[FIRST])
    before = (directory / STAGING_NAME / JOURNAL_NAME).read_bytes()
    with pytest.raises(DestinationError) as caught:
        resumed(directory, work={"files": {"a": [1, 2], "b": [3, 5]}, "layout": "nemo"})
    text = str(caught.value)
    assert "files differ: b\n" in text
    assert "options that are not recorded" in text
    assert "layout" not in text
    assert (directory / STAGING_NAME / JOURNAL_NAME).read_bytes() == before
    assert (directory / STAGING_NAME / FIRST).exists()


@pytest.mark.parametrize("name", ["model.safetensors", INDEX, FIRST])
def test_weights_that_no_work_left_are_refused(directory, name):
    (directory / name).write_bytes(b"mine")
    with pytest.raises(DestinationError, match=f"(?s)holds a checkpoint already.*{name}"):
        resumed(directory)
    assert (directory / name).read_bytes() == b"mine"


def test_the_index_may_be_in_its_place_once_all_shards_are_finished(directory):
    begun(directory, {"finished": FIRST}, {"finished": SECOND}, place=".", names=[FIRST, SECOND])
    (directory / INDEX).touch()
    assert resumed(directory)[0] == {FIRST, SECOND}
    (directory / FIRST).unlink()
    with pytest.raises(DestinationError, match="holds a checkpoint already"):
        resumed(directory)


def test_files_that_a_save_was_placing_when_it_was_killed_are_removed(directory):
    begun(directory, work=None, place=".", names=[FIRST])
    status = (directory / FIRST).stat()
    placing = {FIRST: [status.st_size, status.st_mtime_ns], INDEX: [1, 1]}
    with open(directory / STAGING_NAME / JOURNAL_NAME, "a") as file:
        file.write(json.dumps({"placing": placing}) + "\n")
    assert resumed(directory, work=None)[0] == set()
    assert os.listdir(directory) == [STAGING_NAME]
