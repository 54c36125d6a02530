"""Tests of ``open_checkpoint``: which files and tensors belong to a checkpoint, by index, name or path."""

import errno
import json
import os
import sys
import threading

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from automodel_conv.errors import CheckpointError, ReadError
from automodel_conv.execution.reading import read_whole
from automodel_conv.files import system
from automodel_conv.files.checkpoint import Checkpoint, open_checkpoint, open_files
from automodel_conv.files.staging import STAGING_NAME
from tests.files.support import TWO, A, content, packed, refused, write_sharded


@pytest.mark.parametrize("given_path", ["", "model.safetensors.index.json"])
def test_shards_of_an_index_are_read_in_the_order_of_their_names(tmp_path, given_path):
    checkpoint = open_checkpoint(write_sharded(tmp_path, TWO) / given_path)
    assert checkpoint.files == (str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors"))
    assert checkpoint.names == ["x", "z", "y"]
    assert checkpoint.file_ids == [0, 1, 1]
    assert [content(checkpoint, name) for name in "xyz"] == [b"xxx", b"y", b"zz"]


def test_files_are_opened_with_the_tensors_in_the_order_of_safetensors(tmp_path):
    paths = [tmp_path / "z.safetensors", tmp_path / "a.safetensors"]
    save_file({"b": torch.ones(2, dtype=torch.float32), "c": torch.ones(2), "a": torch.ones(1).half()}, paths[0])
    save_file({"y": torch.ones(1), "x": torch.ones(1).half(), "c": torch.zeros(2)}, paths[1])
    given = []
    for path in paths:
        with safe_open(path, "pt") as file:
            given += [(str(path), name) for name in file.keys() if (path, name) != (paths[0], "c")]
    checkpoint = open_files([(str(path), "") for path in paths])
    found = [checkpoint.files[file] for file in checkpoint.file_ids]
    assert [*zip(found, checkpoint.names, strict=True)] == given
    assert open_checkpoint(paths[0]).names == ["b", "c", "a"]
    assert read_whole(checkpoint.names.index("c"), checkpoint).tolist() == [0, 0]


def test_only_index_is_used_under_any_name(tmp_path):
    write_sharded(tmp_path, TWO, index="diffusion.safetensors.index.json")
    assert open_checkpoint(tmp_path).names == ["x", "z", "y"]


def test_metadata_of_all_files_is_merged(tmp_path):
    write_sharded(tmp_path, TWO)
    for file, metadata in (("a", {"format": "pt", "k": "a"}), ("b", {"k": "b"})):
        path = tmp_path / f"{file}.safetensors"
        path.write_bytes(packed({"__metadata__": metadata, file: A}, b"12"))
    index = {"weight_map": {"a": "a.safetensors", "b": "b.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert open_checkpoint(tmp_path).metadata == {"format": "pt", "k": "b"}


def test_stray_files_next_to_an_index_are_not_opened(tmp_path, monkeypatch):
    write_sharded(tmp_path, TWO)
    for name in ("model.safetensors", "stray.safetensors", "pytorch_model.bin"):
        (tmp_path / name).write_bytes(b"not a checkpoint")
    opened, real = [], system.open_readonly
    monkeypatch.setattr(system, "open_readonly", lambda path: opened.append(path) or real(path))
    assert open_checkpoint(tmp_path).names == ["x", "z", "y"]
    names = ["a.safetensors", "b.safetensors", "model.safetensors.index.json"]
    assert sorted(map(os.path.basename, opened)) == names


@pytest.mark.parametrize(
    "files",
    [
        ["model.safetensors", "other.safetensors"],
        ["anything.safetensors"],
        ["x-00001-of-00001.safetensors"],
    ],
    ids=str,
)
def test_directory_with_one_file_to_choose_is_read(tmp_path, files):
    (tmp_path / files[0]).write_bytes(packed({"a": A}, b"12"))
    for other in files[1:]:
        (tmp_path / other).write_bytes(b"not opened")
    assert open_checkpoint(tmp_path).files == (str(tmp_path / files[0]),)


def test_links_to_files_elsewhere_are_followed(tmp_path):
    snapshot, blobs = tmp_path / "snapshots" / "abc", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    write_sharded(snapshot, TWO)
    for number, name in enumerate(sorted(os.listdir(snapshot))):
        (snapshot / name).rename(blobs / str(number))
        (snapshot / name).symlink_to(f"../../blobs/{number}")
    checkpoint = open_checkpoint(snapshot)
    assert checkpoint.files == (str(snapshot / "a.safetensors"), str(snapshot / "b.safetensors"))
    assert content(checkpoint, "x") == b"xxx"


def test_shard_in_a_subfolder_is_read(tmp_path):
    write_sharded(tmp_path, {"sub/a.safetensors": {"x": b"xxx"}})
    assert content(open_checkpoint(tmp_path), "x") == b"xxx"


def test_unindexed_tensors_are_not_part_of_the_checkpoint(tmp_path):
    write_sharded(tmp_path, TWO, {"x": "a.safetensors", "z": "b.safetensors"})
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.names == ["x", "z"]
    assert checkpoint.position == {"x": 0, "z": 1}
    assert content(checkpoint, "z") == b"zz"
    assert checkpoint.unindexed == (("y", "b.safetensors"),)


def test_unindexed_tensors_are_sorted_by_file_then_name(tmp_path):
    shards = {"b.safetensors": {"z": b"z", "keep": b"k", "a": b"aa"}, "a.safetensors": {"y": b"y", "stay": b"s"}}
    write_sharded(tmp_path, shards, {"keep": "b.safetensors", "stay": "a.safetensors"})
    found = open_checkpoint(tmp_path).unindexed
    assert found == (("y", "a.safetensors"), ("a", "b.safetensors"), ("z", "b.safetensors"))


def test_single_file_is_opened_whole_despite_an_index(tmp_path):
    write_sharded(tmp_path, TWO, {"x": "a.safetensors", "z": "b.safetensors"})
    checkpoint = open_checkpoint(tmp_path / "b.safetensors")
    assert sorted(checkpoint.names) == ["y", "z"]
    assert checkpoint.unindexed == ()


@pytest.mark.parametrize("winner", ["a.safetensors", "b.safetensors"])
def test_index_decides_between_two_files_with_one_name(tmp_path, winner):
    shards = {"a.safetensors": {"t": b"aa", "x": b"x"}, "b.safetensors": {"y": b"y", "t": b"bb"}}
    weight_map = {"x": "a.safetensors", "y": "b.safetensors", "t": winner}
    checkpoint = open_checkpoint(write_sharded(tmp_path, shards, weight_map))
    assert sorted(checkpoint.names) == ["t", "x", "y"]
    assert {name: checkpoint.names[row] for name, row in checkpoint.position.items()} == {name: name for name in "txy"}
    assert content(checkpoint, "t") == winner[:1].encode() * 2
    assert content(checkpoint, "y") == b"y"
    (loser,) = shards.keys() - {winner}
    assert checkpoint.unindexed == (("t", loser),)


def test_relative_path_becomes_absolute(tmp_path, monkeypatch):
    (tmp_path / "model.safetensors").write_bytes(packed({"a": A}, b"12"))
    monkeypatch.chdir(tmp_path)
    checkpoint = open_checkpoint("model.safetensors")
    assert checkpoint.directory == str(tmp_path)
    assert checkpoint.path == str(tmp_path / "model.safetensors")


def test_local_path_like_a_repository_name_is_not_downloaded(tmp_path, monkeypatch):
    (tmp_path / "org").mkdir()
    (tmp_path / "org" / "name").mkdir()
    write_sharded(tmp_path / "org" / "name", TWO)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert open_checkpoint("org/name").names == ["x", "z", "y"]


def test_finished_checkpoint_next_to_unfinished_work_is_read(tmp_path):
    write_sharded(tmp_path, TWO)
    (tmp_path / STAGING_NAME).mkdir()
    assert open_checkpoint(tmp_path).names == ["x", "z", "y"]


def test_unindexed_name_in_two_files_belongs_to_neither(tmp_path):
    shards = {"a.safetensors": {"t": b"aa", "x": b"x"}, "b.safetensors": {"y": b"y", "t": b"bb"}}
    checkpoint = open_checkpoint(write_sharded(tmp_path, shards, {"x": "a.safetensors", "y": "b.safetensors"}))
    assert checkpoint.names == ["x", "y"]
    assert checkpoint.unindexed == (("t", "a.safetensors"), ("t", "b.safetensors"))


def open_with_a_failing_call(path, monkeypatch, name, fail_at=None, outcome=None):
    """Open a checkpoint while the n-th call of one file function fails.

    Returns the number of calls of that function, the files that were opened, and the error.
    """
    lock, calls, opened = threading.Lock(), [], []

    def watch(function, note):
        real = getattr(system, function)

        def watched(*arguments):
            if function == name:
                with lock:
                    number = len(calls)
                    calls.append(arguments)
                if number == fail_at:
                    if isinstance(outcome, OSError):
                        raise outcome
                    return outcome
            result = real(*arguments)
            note(result, arguments)
            return result

        patch.setattr(system, function, watched)

    caught = None
    with monkeypatch.context() as patch:
        watch("open_readonly", lambda file, _: opened.append(file))
        if name != "open_readonly":
            watch(name, lambda *_: None)
        try:
            open_checkpoint(path)
        except CheckpointError as error:
            caught = error
    return len(calls), opened, caught


@pytest.mark.parametrize(
    ("name", "outcome"),
    [
        ("preadv", OSError(errno.EIO, "Input/output error")),
        ("preadv", 0),
        ("open_readonly", PermissionError(errno.EACCES, "Permission denied")),
        ("size", OSError(errno.EIO, "Input/output error")),
        ("list_names", PermissionError(errno.EACCES, "Permission denied")),
    ],
    ids=["preadv-EIO", "preadv-end", "open-EACCES", "size-EIO", "list-EACCES"],
)
def test_failing_file_call_is_one_error_and_leaves_nothing_open(tmp_path, monkeypatch, name, outcome):
    write_sharded(tmp_path, {f"{i:02}.safetensors": {f"t{i}": b"x"} for i in range(20)})
    total, opened, caught = open_with_a_failing_call(tmp_path, monkeypatch, name)
    assert caught is None
    assert total == {"preadv": 41, "open_readonly": 21, "size": 21, "list_names": 1}[name]
    assert len(opened) == 21
    assert all(file.closed for file in opened)
    for fail_at in range(total):
        _, opened, caught = open_with_a_failing_call(tmp_path, monkeypatch, name, fail_at, outcome)
        assert caught is not None, fail_at
        assert str(tmp_path) in str(caught)
        assert all(file.closed for file in opened)


def test_checkpoint_built_from_columns_reads_local_files(tmp_path):
    """Build one as callers did before files could come from other places."""
    save_file({"a": torch.arange(3)}, tmp_path / "a.safetensors")
    opened = open_checkpoint(tmp_path / "a.safetensors")
    fields = (opened.path, opened.directory, opened.files, opened.names, opened.dtypes, opened.shapes, opened.file_ids)
    made = Checkpoint(*fields, opened.offsets, opened.nbytes, opened.metadata, opened.position)
    assert made.sources == opened.sources
    assert torch.equal(read_whole(0, made), torch.arange(3))
    (tmp_path / "a.safetensors").unlink()
    with pytest.raises(ReadError, match=r"a\.safetensors"):
        read_whole(0, made)


def test_repository_without_huggingface_hub_is_an_error_with_advice(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    refused("org/name", "org/name", "pip install 'huggingface_hub>=1.23'")


@pytest.mark.parametrize(
    "path",
    [
        "missing",
        "./missing/name",
        "../a/b",
        "a/b/c",
        "/missing/x",
        "a/b.safetensors",
        "a/b.bin",
    ],
)
def test_missing_path_unlike_a_repository_name_is_not_downloaded(monkeypatch, path, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    refused(path, "no such checkpoint", path)


@pytest.mark.parametrize("parent", [".", "{here}"])
def test_similar_names_next_to_a_missing_path_are_listed(monkeypatch, parent, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    for name in ("qwen3-nemo", "qwen3-nem0", "qwen3_nemo", "qwen3 nemo", "other"):
        (tmp_path / name).mkdir()
    start = parent.format(here=tmp_path)
    text = refused(f"{start}/qwen3-nemos/", "no such checkpoint", f"similar:\n    {start}/qwen3-nemo\n")
    assert text.count(f"\n    {start}/") == 3
    assert f"{start}/other" not in text
    assert "similar" not in refused("missing/qwen3-nemo.safetensors", "no such checkpoint")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "step-100").mkdir()
    refused("runs/step-10", "is not installed to download it", "similar:\n    runs/step-100\n")


def test_home_directory_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    save_file({"x": torch.ones(2)}, tmp_path / "model.safetensors")
    assert open_checkpoint("~/model.safetensors").files == (str(tmp_path / "model.safetensors"),)
    refused("~/checkpoint", "no such checkpoint", str(tmp_path / "checkpoint"))
    refused("~nobody-has-this-name/checkpoint", "no such checkpoint", "~nobody-has-this-name/checkpoint")


def test_indexed_tensor_missing_from_its_file_is_named(tmp_path):
    weight_map = {"x": "a.safetensors", "y": "a.safetensors", "lost": "b.safetensors"}
    write_sharded(tmp_path, TWO, weight_map)
    text = refused(tmp_path, str(tmp_path), "'lost' in b.safetensors")
    assert "'y' in a.safetensors, which b.safetensors holds" in text
    assert "'x'" not in text


def test_bad_shard_among_good_ones_is_named(tmp_path):
    write_sharded(tmp_path, {f"{i}.safetensors": {f"t{i}": b"x"} for i in range(40)})
    os.truncate(tmp_path / "23.safetensors", os.path.getsize(tmp_path / "23.safetensors") - 1)
    refused(tmp_path, str(tmp_path / "23.safetensors"), "tensor 't23'")
