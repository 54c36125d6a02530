"""Tests of files in their final places: paths, checks and removal."""

import os

from automodel_conv.files.final_files import folders_of, is_placed, path_below, remove_placed


def place(directory, name, content=b"x"):
    """Write a file; return its size and modification time."""
    path = directory / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


def test_a_path_has_the_folders_of_its_name():
    assert path_below("out", "a") == os.path.join("out", "a")
    assert path_below("out", "tokenizer/added/a") == os.path.join("out", "tokenizer", "added", "a")


def test_inner_folders_come_before_outer_ones_and_each_once():
    assert folders_of(["a", "b"], "out") == []
    assert folders_of(["a/b/c", "a/d"], "out") == [os.path.join("out", "a", "b"), os.path.join("out", "a")]


def test_a_file_is_in_its_place_with_the_size_and_time_that_it_had(tmp_path):
    size, time = place(tmp_path, "b/a", b"four")
    assert is_placed(str(tmp_path), "b/a", [size, time])
    assert not is_placed(str(tmp_path), "b/a", [size + 1, time])
    assert not is_placed(str(tmp_path), "b/a", [size, time + 1])
    assert not is_placed(str(tmp_path), "a", [size, time])


def test_files_are_removed_last_one_first_and_their_folders_if_they_are_empty(tmp_path, monkeypatch):
    placed = {name: place(tmp_path, name) for name in ("config.json", "mine/b", "shared/c", "index.json")}
    place(tmp_path, "shared/other")
    removed, remove = [], os.remove
    monkeypatch.setattr("automodel_conv.files.system.remove", lambda path: (removed.append(path), remove(path)))
    remove_placed(str(tmp_path), placed)
    assert removed == [str(tmp_path / name) for name in ("index.json", "shared/c", "mine/b", "config.json")]
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["other", "shared"]


def test_a_file_that_was_replaced_since_is_kept(tmp_path):
    placed = {"a": place(tmp_path, "a"), "b": place(tmp_path, "b")}
    place(tmp_path, "a", b"of another")
    remove_placed(str(tmp_path), placed)
    assert os.listdir(tmp_path) == ["a"]
    remove_placed(str(tmp_path), {})
    assert os.listdir(tmp_path) == ["a"]
