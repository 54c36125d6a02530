"""Tests of ``open_destination``: a directory that becomes a checkpoint. Killed processes: ``crash_safety``."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from automodel_conv.errors import DestinationError, WriteError
from automodel_conv.files import system
from automodel_conv.files.destination import open_destination
from automodel_conv.files.shards import DEFAULT_NAMING, Shard, Spec, shard_of
from automodel_conv.files.staging import STAGING_NAME

WORK = {"source files": {"a": [1, 2], "b": [3, 4]}, "files": ["x"]}


def shards(count: int = 3) -> list[Shard]:
    names = [f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]
    return [shard_of(name, [Spec(f"w{number}", "F32", (4,))]) for number, name in enumerate(names)]


def write(place, shard: Shard) -> None:
    Path(place.path(shard.name)).write_bytes(bytes(shard.nbytes))
    place.finish(shard)


def test_only_the_final_files_exist_at_the_end(tmp_path):
    plan = shards()
    with open_destination(str(tmp_path / "out"), plan, WORK) as place:
        for shard in plan:
            assert shard.name in place.unfinished
            write(place, shard)
        place.write("config.json", b"{}")
        assert os.listdir(tmp_path / "out") == [STAGING_NAME]
        place.commit(b"index")
    assert not place.unfinished
    assert system.list_names(str(tmp_path / "out")) == [
        "config.json",
        *(shard.name for shard in plan),
        DEFAULT_NAMING.index_name,
    ]
    assert (tmp_path / "out" / DEFAULT_NAMING.index_name).read_bytes() == b"index"


def test_the_index_is_moved_after_all_other_files_are_synced(tmp_path, monkeypatch):
    plan, events = shards(), []
    rename, sync = system.rename, system.sync_directory
    monkeypatch.setattr(system, "rename", lambda *names: (events.append(os.path.basename(names[1])), rename(*names)))
    monkeypatch.setattr(system, "sync_directory", lambda path: (events.append(os.path.basename(path)), sync(path)))
    with open_destination(str(tmp_path / "out"), plan, WORK) as place:
        for shard in plan:
            write(place, shard)
        place.commit(b"index")
    assert events == [STAGING_NAME, *(shard.name for shard in plan), "out", DEFAULT_NAMING.index_name, "out"]


def test_files_that_look_like_a_checkpoint_are_moved_after_the_index(tmp_path, monkeypatch):
    plan = [
        shard_of(name, [Spec(name, "F32", (4,))]) for name in ("a.safetensors", "model.safetensors", "z.safetensors")
    ]
    events, rename = [], system.rename
    monkeypatch.setattr(system, "rename", lambda *names: (events.append(os.path.basename(names[1])), rename(*names)))
    with open_destination(str(tmp_path), plan, WORK) as place:
        for shard in plan:
            write(place, shard)
        place.commit(b"index")
    assert events == [DEFAULT_NAMING.index_name, "a.safetensors", "z.safetensors", "model.safetensors"]


def interrupted(directory: Path, plan: list[Shard], work=WORK, *, finished: int = 1, resume: bool = True) -> list[str]:
    """Write some files and then fail; return the files that were finished at the start."""
    with pytest.raises(RuntimeError), open_destination(str(directory), plan, work, resume=resume) as place:  # noqa: PT012
        finished_before = sorted({shard.name for shard in plan} - place.unfinished)
        for shard in plan[:finished]:
            if shard.name in place.unfinished:
                write(place, shard)
        raise RuntimeError
    return finished_before


def test_work_resumes_with_finished_files_and_removes_leftovers(tmp_path):
    plan = shards()
    assert interrupted(tmp_path, plan, finished=2) == []
    leftover = tmp_path / STAGING_NAME / plan[2].name
    leftover.write_bytes(b"half")
    assert interrupted(tmp_path, plan, finished=2) == [plan[0].name, plan[1].name]
    assert not leftover.exists()
    assert interrupted(tmp_path, plan, resume=False) == []


def test_work_that_cannot_resume_leaves_nothing(tmp_path):
    interrupted(tmp_path, shards(), None, finished=3)
    assert os.listdir(tmp_path) == []


def test_interrupted_work_that_cannot_resume_is_removed(tmp_path):
    staging = tmp_path / STAGING_NAME
    staging.mkdir()
    (staging / "journal.jsonl").write_text(json.dumps({"work": None}) + "\n")
    (staging / "model.safetensors").write_bytes(b"half")
    assert interrupted(tmp_path, shards(), WORK) == []
    assert sorted(os.listdir(staging)) == ["journal.jsonl", "lock", "model-00001-of-00003.safetensors"]


def test_files_of_an_interrupted_commit_are_removed_but_not_those_of_others(tmp_path):
    mine, theirs = tmp_path / "model-00001-of-00002.safetensors", tmp_path / "model-00002-of-00002.safetensors"
    for path in (mine, theirs):
        path.write_bytes(b"data")
    staging = tmp_path / STAGING_NAME
    staging.mkdir()
    placing = {mine.name: [*system.identity(str(mine))], theirs.name: [4, 1], DEFAULT_NAMING.index_name: [5, 1]}
    (staging / "journal.jsonl").write_text(f'{{"work": null}}\n{json.dumps({"placing": placing})}\n')
    with (
        pytest.raises(DestinationError, match=theirs.name),
        open_destination(str(tmp_path), shards(2), None),
    ):
        pass
    assert os.listdir(tmp_path) == [theirs.name]


def test_other_work_is_refused_with_the_keys_that_differ(tmp_path):
    interrupted(tmp_path, shards())
    other = {"source files": {"a": [1, 2], "b": [3, 5]}, "files": ["x"], "new": 1}
    with (
        pytest.raises(DestinationError) as caught,
        open_destination(str(tmp_path), shards(), other, resume=True),
    ):
        pass
    text = str(caught.value)
    assert "\n    begun with: options that are not recorded\n" in text
    assert "\n    new differ\n    source files differ: b\n" in text


@pytest.mark.parametrize("kind", ["file", "file in the way"])
def test_impossible_directory_is_a_write_error(tmp_path, kind):
    (tmp_path / "out").write_bytes(b"")
    directory = tmp_path / "out" if kind == "file" else tmp_path / "out" / "inner"
    with pytest.raises(WriteError, match="out"), open_destination(str(directory), shards(), WORK):
        pass


def test_finished_file_that_is_missing_at_the_end_is_an_error(tmp_path):
    plan = shards()
    with open_destination(str(tmp_path), plan, WORK) as place:
        for shard in plan:
            write(place, shard)
        os.remove(place.path(plan[1].name))
        with pytest.raises(WriteError, match=plan[1].name):
            place.commit(b"index")
        assert system.list_names(str(tmp_path)) == [STAGING_NAME]
