import errno
import json
import os
import struct
import sys
import tempfile
import threading
import tracemalloc

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from automodel_conv.dtypes import BITS, dtype_code, torch_dtype
from automodel_conv.errors import CheckpointError, ReadError, UnsupportedError
from automodel_conv.execution.reading import read_whole
from automodel_conv.files import system
from automodel_conv.files.checkpoint import Checkpoint, open_checkpoint
from automodel_conv.files.header import MAX_HEADER_BYTES
from automodel_conv.files.staging import STAGING_NAME

A = {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}
B = {"dtype": "BF16", "shape": [2], "data_offsets": [2, 6]}


def packed(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(start, stop, dtype="U8", shape=None):
    shape = [stop - start] if shape is None else shape
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def write_sharded(directory, shards, weight_map=None, index="model.safetensors.index.json"):
    """Files of U8 tensors, ``{file: {name: bytes}}``, and an index over them."""
    for file, tensors in shards.items():
        header, data = {}, b""
        for name, content in tensors.items():
            header[name] = entry(len(data), len(data) + len(content))
            data += content
        path = directory / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(packed(header, data))
    if weight_map is None:
        weight_map = {name: file for file, tensors in shards.items() for name in tensors}
    (directory / index).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return directory


TWO = {"b.safetensors": {"z": b"zz", "y": b"y"}, "a.safetensors": {"x": b"xxx"}}


def content(checkpoint, name):
    """The bytes that the columns say belong to a tensor."""
    row = checkpoint.position[name]
    with open(checkpoint.files[checkpoint.file_ids[row]], "rb") as file:
        file.seek(checkpoint.offsets[row])
        return file.read(checkpoint.nbytes[row])


def refused(path, *words, error=CheckpointError):
    """``open_checkpoint`` refuses ``path``, and the text has all the words."""
    with pytest.raises(error) as caught:
        open_checkpoint(path)
    for word in words:
        assert word in str(caught.value)
    return str(caught.value)


def refused_header(tmp_path, header, *words, data=b"123456"):
    path = tmp_path / "model.safetensors"
    path.write_bytes(packed(header, data))
    return refused(path, str(path), *words)


def test_golden_bytes(tmp_path):
    path = tmp_path / "golden.safetensors"
    path.write_bytes(
        b"\xc5\x00\x00\x00\x00\x00\x00\x00"
        b'{"__metadata__":{"format":"pt"},'
        b'"w":{"dtype":"F32","shape":[1,2],"data_offsets":[0,8]},'
        b'"s":{"dtype":"BF16","shape":[],"data_offsets":[8,10]},'
        b'"q":{"dtype":"F4","shape":[2,4],"data_offsets":[10,14]}}'
        b"ABCDEFGHijKLMN"
    )
    checkpoint = open_checkpoint(path)
    assert checkpoint.path == str(path)
    assert checkpoint.directory == str(tmp_path)
    assert checkpoint.files == (str(path),)
    assert checkpoint.names == ["w", "s", "q"]
    assert checkpoint.dtypes == ["F32", "BF16", "F4"]
    assert checkpoint.shapes == [(1, 2), (), (2, 2)]
    assert checkpoint.file_ids == [0, 0, 0]
    assert checkpoint.offsets == [205, 213, 215]
    assert checkpoint.nbytes == [8, 2, 4]
    assert checkpoint.metadata == {"format": "pt"}
    assert checkpoint.position == {"w": 0, "s": 1, "q": 2}
    assert [content(checkpoint, name) for name in "wsq"] == [b"ABCDEFGH", b"ij", b"KLMN"]


TORCH_CODES = [code for code in BITS if torch_dtype(code) is not None]


@st.composite
def state_dicts(draw):
    names = draw(st.lists(st.text(st.characters(exclude_categories=["C", "Z"])), unique=True, max_size=6))
    tensors = {}
    for name in names:
        if name == "__metadata__":
            continue
        dtype = torch_dtype(draw(st.sampled_from(TORCH_CODES)))
        shape = draw(st.lists(st.sampled_from([0, 1, 2, 3, 5]), max_size=4))
        count = torch.Size(shape).numel() * dtype.itemsize
        flat = torch.tensor(draw(st.lists(st.integers(0, 255), min_size=count, max_size=count)))
        flat = flat.to(torch.uint8)
        if dtype is torch.bool:
            flat %= 2
        tensors[name] = flat.view(dtype).reshape(shape) if shape else flat.view(dtype)[0]
    return tensors


@settings(
    max_examples=100,
    deadline=None,
    suppress_health_check=[HealthCheck.data_too_large],
    derandomize=True,
)
@given(state_dicts())
@example({"colon: in a name": torch.tensor([1, 2]), "": torch.tensor(1.5), "é": torch.zeros(0, 3)})
def test_columns_agree_with_what_safetensors_wrote(tensors):
    tensors = {name: tensor for name, tensor in tensors.items() if tensor.dim() or dtype_code(tensor.dtype) != "F4"}
    with tempfile.TemporaryDirectory() as directory:
        path = os.path.join(directory, "model.safetensors")
        save_file({name: tensor.clone() for name, tensor in tensors.items()}, path)
        checkpoint = open_checkpoint(directory)
        assert sorted(checkpoint.names) == sorted(tensors)
        for name, tensor in tensors.items():
            row = checkpoint.position[name]
            assert checkpoint.names[row] == name
            assert checkpoint.dtypes[row] == dtype_code(tensor.dtype)
            assert checkpoint.shapes[row] == tuple(tensor.shape)
            assert content(checkpoint, name) == bytes(tensor.reshape(-1).view(torch.uint8).tolist())
        assert checkpoint.offsets == sorted(checkpoint.offsets)


def test_every_dtype_of_the_format_is_read(tmp_path):
    header, start = {}, 0
    for code, bits in BITS.items():
        header[code] = entry(start, start + bits, code, [4, 2])
        start += bits
    (tmp_path / "model.safetensors").write_bytes(packed(header, bytes(start)))
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.dtypes == list(BITS)
    assert checkpoint.nbytes == list(BITS.values())
    assert checkpoint.shapes == [(4, 1) if code == "F4" else (4, 2) for code in BITS]


@pytest.mark.parametrize("header", [{}, {"__metadata__": {"a": "b"}}, {"__metadata__": None}], ids=str)
def test_file_without_tensors_is_read(tmp_path, header):
    (tmp_path / "model.safetensors").write_bytes(packed(header))
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.names == []
    assert checkpoint.metadata == (header.get("__metadata__") or {})


@pytest.mark.parametrize("padding", range(8))
def test_any_alignment_of_the_data_is_read(tmp_path, padding):
    path = tmp_path / "model.safetensors"
    path.write_bytes(packed(json.dumps({"a": A, "b": B}).encode() + b" " * padding, b"abcdef"))
    checkpoint = open_checkpoint(path)
    assert [content(checkpoint, name) for name in "ab"] == [b"ab", b"cdef"]


def test_rows_follow_the_data_where_the_header_does_not(tmp_path):
    header = {"c": entry(3, 6), "empty": entry(3, 3), "a": entry(0, 2), "b": entry(2, 3)}
    (tmp_path / "model.safetensors").write_bytes(packed(header, b"aabccc"))
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.names == ["a", "b", "empty", "c"]
    assert [content(checkpoint, name) for name in checkpoint.names] == [b"aa", b"b", b"", b"ccc"]


def test_unknown_fields_of_an_entry_are_ignored(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(packed({"a": {**A, "note": {"x": [1]}}}, b"12"))
    assert open_checkpoint(tmp_path).names == ["a"]


@pytest.mark.parametrize("given_path", ["", "model.safetensors.index.json"])
def test_shards_of_an_index_are_read_in_the_order_of_their_names(tmp_path, given_path):
    checkpoint = open_checkpoint(write_sharded(tmp_path, TWO) / given_path)
    assert checkpoint.files == (str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors"))
    assert checkpoint.names == ["x", "z", "y"]
    assert checkpoint.file_ids == [0, 1, 1]
    assert [content(checkpoint, name) for name in "xyz"] == [b"xxx", b"y", b"zz"]


def test_index_of_another_name_is_used_when_it_is_the_only_one(tmp_path):
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


def test_stray_files_beside_an_index_are_not_opened(tmp_path, monkeypatch):
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


def test_shard_in_a_folder_below_is_read(tmp_path):
    write_sharded(tmp_path, {"sub/a.safetensors": {"x": b"xxx"}})
    assert content(open_checkpoint(tmp_path), "x") == b"xxx"


def test_tensors_that_the_index_leaves_out_are_no_part_of_the_checkpoint_and_are_named(tmp_path):
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


def test_a_file_that_is_opened_by_itself_is_whole_whatever_an_index_beside_it_says(tmp_path):
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


def test_local_path_of_that_shape_is_not_downloaded(tmp_path, monkeypatch):
    (tmp_path / "org").mkdir()
    (tmp_path / "org" / "name").mkdir()
    write_sharded(tmp_path / "org" / "name", TWO)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert open_checkpoint("org/name").names == ["x", "z", "y"]


def test_repository_without_huggingface_hub_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    refused("org/name", "org/name", "pip install huggingface_hub")


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
        "",
    ],
)
def test_missing_path_of_another_shape_is_not_downloaded(monkeypatch, path, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    refused(path, "no such checkpoint", path)


@pytest.mark.parametrize("size", range(8))
def test_file_too_short_for_a_header(tmp_path, size):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"\0" * size)
    refused(path, str(path), "at least 8 bytes", f"{size} bytes")


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + 64 * "0" + "\nsize 4976698672\n"
LOOKALIKES = {
    "git-lfs": (POINTER.encode(), ["Git-LFS pointer", "git lfs pull"]),
    "xet": (b"# xet version 0\nfilesize = 5\nhash = '00'\n", ["Xet pointer"]),
    "page": (b"\n<!DOCTYPE html><html><head><title>Sign in</title>" + 900 * b"x", ["page of HTML", "login"]),
    "answer": (b'{"error": "Repository not found"}', ["JSON", "Repository not found"]),
    "words": (b"Access to model is restricted." * 40, ["text: Access to model is restricted.", "login"]),
    "short": (b"404", ["text: 404"]),
    "pickle": (b"PK\x03\x04" + bytes(60), ["torch.save"]),
    "accents": (("é" * 400).encode(), ["text: é"]),
}


@pytest.mark.parametrize(("data", "words"), LOOKALIKES.values(), ids=LOOKALIKES)
def test_what_stands_in_the_place_of_weights_is_told(tmp_path, data, words):
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    refused(tmp_path, str(path), "not a safetensors file", *words)


@pytest.mark.parametrize("length", [int.from_bytes(start, "little") for start in (b"\x80\x02", b"\x1f\x8b", b"<a>")])
def test_a_cut_file_is_not_taken_for_what_the_length_of_its_header_looks_like(tmp_path, length):
    (tmp_path / "model.safetensors").write_bytes(length.to_bytes(8, "little") + b'{"a":')
    refused(tmp_path, "the length of a header is impossible", "truncated", f"{length} bytes")


@pytest.mark.parametrize("data", [POINTER.encode(), b"<html></html>"])
def test_what_stands_in_the_place_of_an_index_is_told(tmp_path, data):
    write_sharded(tmp_path, TWO)
    (tmp_path / "model.safetensors.index.json").write_bytes(data)
    words = ["git lfs pull"] if data.startswith(b"v") else ["page of HTML"]
    refused(tmp_path, "malformed JSON", "model.safetensors.index.json", *words)


def test_an_index_that_is_cut_is_told_as_malformed(tmp_path):
    write_sharded(tmp_path, TWO)
    (tmp_path / "model.safetensors.index.json").write_bytes(b'{"weight_map": {"x": "a.saf')
    assert "login" not in refused(tmp_path, "malformed JSON")


@pytest.mark.parametrize("placed", [[], ["model-00001-of-00002.safetensors"], ["a.safetensors"], ["config.json"]])
def test_an_unfinished_conversion_is_named_as_one(tmp_path, placed):
    (tmp_path / STAGING_NAME).mkdir()
    for name in placed:
        (tmp_path / name).write_bytes(packed({}))
    refused(tmp_path, "not finished", STAGING_NAME, "same conversion or save again")
    refused(tmp_path / STAGING_NAME, "not finished", str(tmp_path))


def test_a_finished_checkpoint_beside_unfinished_work_is_read(tmp_path):
    write_sharded(tmp_path, TWO)
    (tmp_path / STAGING_NAME).mkdir()
    assert open_checkpoint(tmp_path).names == ["x", "z", "y"]


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, MAX_HEADER_BYTES + 1, MAX_HEADER_BYTES, 41])
def test_impossible_header_length_costs_no_memory(tmp_path, length):
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", length) + b"{" + b" " * 39)
    tracemalloc.start()
    try:
        refused(path, str(path), f"{length} bytes", "at most 40 bytes")
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


def test_header_over_the_limit_of_the_format_costs_no_memory(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", MAX_HEADER_BYTES + 1) + b"{")
    os.truncate(path, 2 * MAX_HEADER_BYTES)
    tracemalloc.start()
    try:
        refused(path, str(path), f"at most {MAX_HEADER_BYTES} bytes")
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("header", "words"),
    [
        (b"", ["not a JSON object"]),
        (b"[]", ["not a JSON object"]),
        (b' {"a":1}', ["not a JSON object"]),
        (b"\xef\xbb\xbf{}", ["not a JSON object"]),
        (b'{"a":', ["malformed JSON"]),
        (b"{}\0\0", ["malformed JSON"]),
        (b'{"\xff":1}', ["malformed JSON", "utf-8"]),
        (b'{"a":{"dtype":"U8","shape":[NaN],"data_offsets":[0,2]}}', ["malformed JSON", "NaN"]),
        (b'{"\\ud800":{"dtype":"U8","shape":[6],"data_offsets":[0,6]}}', ["surrogates"]),
        (b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", ["malformed JSON"]),
        (b'{"a":{"shape":[' + b"9" * 5000 + b"]}}", ["malformed JSON"]),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_malformed_json(tmp_path, header, words):
    refused_header(tmp_path, header, *words)


ENTRY = b'{"dtype":"U8","shape":[6],"data_offsets":[0,6]}'


@pytest.mark.parametrize(
    ("header", "name"),
    [
        (b'{"a":' + ENTRY + b',"a":' + ENTRY + b"}", "'a' occurs 2 times"),
        (b'{"a":' + ENTRY + b',"\\u0061":' + ENTRY + b"}", "'a' occurs 2 times"),
        (b'{"a:b":' + ENTRY + b',"a:b":' + ENTRY + b"}", "'a:b' occurs 2 times"),
        (b'{"a":{"dtype":"I8",' + ENTRY[1:] + b"}", "'dtype' occurs 2 times"),
        (b'{"a":{"x":{"y":1,"y":1},' + ENTRY[1:] + b"}", "'y' occurs 2 times"),
        (b'{"__metadata__":{"k":"1","k":"2"},"a":' + ENTRY + b"}", "'k' occurs 2 times"),
        (b'{"__metadata__":{},"__metadata__":{},"a":' + ENTRY + b"}", "'__metadata__' occurs 2"),
    ],
)
def test_duplicate_key_is_named(tmp_path, header, name):
    refused_header(tmp_path, header, "malformed JSON", name)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dtype": "F7"}, ["unknown dtype", "'F7'", "BF16"]),
        ({"dtype": ["U8"]}, ["unknown dtype"]),
        ({"dtype": None}, ["unknown dtype"]),
        ({"shape": 6}, ["malformed shape"]),
        ({"shape": None}, ["malformed shape"]),
        ({"shape": "6"}, ["malformed shape"]),
        ({"shape": [-6]}, ["malformed shape"]),
        ({"shape": [6.0]}, ["malformed shape"]),
        ({"shape": [6, True]}, ["malformed shape"]),
        ({"shape": [[6]]}, ["malformed shape"]),
        ({"shape": [2**63]}, ["too large"]),
        ({"shape": [2**60]}, ["too large"]),
        ({"shape": [2**60 - 1]}, ["do not fit"]),
        ({"shape": [2**31, 2**31]}, ["too large"]),
        ({"shape": [2**32, 2**32]}, ["too large"]),
        ({"shape": [0, 2**64], "data_offsets": [0, 0]}, ["too large"]),
        ({"shape": [2**62, 2**62, 0], "data_offsets": [0, 0]}, ["too large"]),
        ({"shape": [2**40] * 100_000}, ["too large"]),
        ({"shape": [5]}, ["40 bits for U8 [5]", "[0, 6]"]),
        ({"shape": [7]}, ["56 bits for U8 [7]", "[0, 6]"]),
        ({"shape": []}, ["8 bits for U8 []", "[0, 6]"]),
        ({"dtype": "F4", "shape": [11]}, ["44 bits for F4"]),
        ({"dtype": "F4", "shape": [4, 3]}, ["do not pair"]),
        ({"dtype": "F4", "shape": []}, ["4 bits for F4 []"]),
        ({"dtype": "F6_E2M3", "shape": [7]}, ["42 bits for F6_E2M3 [7]"]),
        ({"data_offsets": [6, 0]}, ["malformed data_offsets"]),
        ({"data_offsets": [-6, 0]}, ["malformed data_offsets"]),
        ({"data_offsets": [0.0, 6.0]}, ["malformed data_offsets"]),
        ({"data_offsets": [False, 6]}, ["malformed data_offsets"]),
        ({"data_offsets": "06"}, ["malformed data_offsets"]),
        ({"data_offsets": [0]}, ["malformed entry"]),
        ({"data_offsets": [0, 6, 6]}, ["malformed entry"]),
        ({"data_offsets": 6}, ["malformed entry"]),
        ({"data_offsets": None}, ["malformed entry"]),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_malformed_entry_names_file_and_tensor(tmp_path, changes, words):
    header = {"layer.weight": {**entry(0, 6), **changes}}
    text = refused_header(tmp_path, header, "tensor 'layer.weight'", *words)
    assert len(text) < 2000


@pytest.mark.parametrize("value", [None, 1, "x", [], {}, {"dtype": "U8", "shape": [6]}], ids=str)
def test_incomplete_entry_names_file_and_tensor(tmp_path, value):
    refused_header(tmp_path, {"t": value}, "tensor 't'", "malformed entry")


@pytest.mark.parametrize("metadata", [1, 0, "", [], False, {"a": 1}, {"a": None}], ids=repr)
def test_malformed_metadata(tmp_path, metadata):
    refused_header(tmp_path, {"__metadata__": metadata, "a": entry(0, 6)}, "__metadata__")


@pytest.mark.parametrize(
    ("header", "words"),
    [
        ({"a": entry(0, 2), "b": entry(3, 6)}, ["gap", "tensor 'b'", "start 2", "start 3", "'a'"]),
        ({"a": entry(1, 6)}, ["gap", "tensor 'a'", "start 0", "start 1"]),
        ({"a": entry(0, 4), "b": entry(2, 6)}, ["overlap", "tensor 'b'", "start 4", "start 2"]),
        ({"a": entry(0, 6), "b": entry(0, 6)}, ["overlap", "tensor 'b'", "start 6", "start 0"]),
        ({"a": entry(0, 6), "z": entry(3, 3)}, ["overlap", "tensor 'z'", "start 6", "start 3"]),
        ({"a": entry(0, 4), "b": entry(4, 9), "c": entry(9, 10)}, ["truncated", "tensor 'b'"]),
        ({"a": entry(0, 4)}, ["bytes after the last tensor", "tensor 'a'", "4 bytes", "6 bytes"]),
        ({}, ["bytes after the last tensor", "0 bytes", "6 bytes"]),
    ],
    ids=str,
)
def test_data_that_is_not_covered_once(tmp_path, header, words):
    refused_header(tmp_path, header, *words)


@given(st.data())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_a_file_cut_anywhere_is_refused(data):
    whole = packed({"a": A, "b": B}, b"abcdef")
    cut = data.draw(st.integers(0, len(whole) - 1))
    with tempfile.TemporaryDirectory() as directory:
        path = os.path.join(directory, "model.safetensors")
        with open(path, "wb") as file:
            file.write(whole[:cut])
        refused(path, path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["malformed JSON"]),
        ("{", ["malformed JSON"]),
        ("[]", ["malformed JSON", "list"]),
        ("{}", ["weight_map"]),
        ('{"weight_map": []}', ["weight_map"]),
        ('{"weight_map": {}}', ["weight_map"]),
        ('{"weight_map": {"t": 1}}', ["tensor 't'"]),
        ('{"weight_map": {"t": ["a"]}}', ["tensor 't'"]),
        ('{"weight_map": {"t": "a.safetensors", "t": "b.safetensors"}}', ["'t' occurs 2 times"]),
    ],
)
def test_malformed_index(tmp_path, text, words):
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(text)
    refused(tmp_path, str(path), *words)


@pytest.mark.parametrize(
    "file",
    [
        "",
        "..",
        "../evil.safetensors",
        "sub/../../evil.safetensors",
        "sub\\..\\..\\evil.safetensors",
        "{root}/evil.safetensors",
        "//host/evil.safetensors",
        "\\evil.safetensors",
        "C:\\evil.safetensors",
        "C:evil.safetensors",
        "a\0.safetensors",
    ],
)
def test_index_cannot_name_a_file_outside_of_its_directory(tmp_path, file, monkeypatch):
    (tmp_path / "evil.safetensors").write_bytes(packed({"t": A}, b"12"))
    directory = tmp_path / "checkpoint"
    (directory / "sub").mkdir(parents=True)
    write_sharded(directory, {}, {"t": file.format(root=tmp_path)})
    opened, real = [], system.open_readonly
    monkeypatch.setattr(system, "open_readonly", lambda path: opened.append(path) or real(path))
    refused(directory, "outside of its directory", "tensor 't'", str(directory))
    assert opened == [str(directory / "model.safetensors.index.json")]


def test_missing_shards_are_all_named(tmp_path):
    weight_map = {"x": "a.safetensors", "p": "c.safetensors", "q": "d.safetensors"}
    write_sharded(tmp_path, TWO, weight_map)
    refused(tmp_path, "2 of 3 files", str(tmp_path), "c.safetensors", "d.safetensors")


def test_directory_in_place_of_a_shard_is_a_missing_shard(tmp_path):
    write_sharded(tmp_path, TWO)
    (tmp_path / "a.safetensors").unlink()
    (tmp_path / "a.safetensors").mkdir()
    refused(tmp_path, "1 of 2 files", "a.safetensors")


def test_tensor_of_the_index_that_its_file_lacks_is_named(tmp_path):
    weight_map = {"x": "a.safetensors", "y": "a.safetensors", "lost": "b.safetensors"}
    write_sharded(tmp_path, TWO, weight_map)
    text = refused(tmp_path, str(tmp_path), "'lost' in b.safetensors")
    assert "'y' in a.safetensors, which b.safetensors holds" in text
    assert "'x'" not in text


def test_name_in_two_files_that_the_index_leaves_out_belongs_to_neither(tmp_path):
    shards = {"a.safetensors": {"t": b"aa", "x": b"x"}, "b.safetensors": {"y": b"y", "t": b"bb"}}
    checkpoint = open_checkpoint(write_sharded(tmp_path, shards, {"x": "a.safetensors", "y": "b.safetensors"}))
    assert checkpoint.names == ["x", "y"]
    assert checkpoint.unindexed == (("t", "a.safetensors"), ("t", "b.safetensors"))


def test_bad_shard_among_good_ones_is_named(tmp_path):
    write_sharded(tmp_path, {f"{i}.safetensors": {f"t{i}": b"x"} for i in range(40)})
    os.truncate(tmp_path / "23.safetensors", os.path.getsize(tmp_path / "23.safetensors") - 1)
    refused(tmp_path, str(tmp_path / "23.safetensors"), "tensor 't23'")


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ([], ["no safetensors weights", "empty directory"]),
        (["config.json"], ["no safetensors weights", "config.json"]),
        (["a.safetensors", "b.safetensors"], ["model.safetensors.index.json is missing"]),
        (["model-00002-of-00003.safetensors"], ["model.safetensors.index.json is missing"]),
        (["a.safetensors.index.json", "b.safetensors.index.json"], ["more than one index"]),
    ],
    ids=str,
)
def test_directory_without_a_clear_checkpoint(tmp_path, files, words):
    for file in files:
        (tmp_path / file).write_bytes(b"")
    refused(tmp_path, str(tmp_path), *words, *files)


@pytest.mark.parametrize(
    ("file", "advice"),
    [
        ("pytorch_model.bin", "save_pretrained"),
        ("model.pt", "save_pretrained"),
        ("model.pth", "save_pretrained"),
        ("model.pkl", "save_pretrained"),
        ("model.Q4_K.gguf", "gguf_file"),
    ],
)
def test_other_formats_are_refused_with_advice(tmp_path, file, advice):
    (tmp_path / file).write_bytes(b"")
    refused(tmp_path / file, str(tmp_path / file), advice, error=UnsupportedError)
    refused(tmp_path, str(tmp_path), file, advice, error=UnsupportedError)
    write_sharded(tmp_path, {}, {"t": file})
    refused(tmp_path, str(tmp_path / file), advice, error=UnsupportedError)


def test_file_of_no_known_kind_is_refused(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"")
    refused(tmp_path / "model.onnx", "model.onnx", ".safetensors", error=UnsupportedError)


def open_with_a_failing_call(path, monkeypatch, name, fail_at=None, outcome=None):
    """Open a checkpoint while the n-th call of one file function fails.

    Returns the number of calls of that function, the descriptors opened and closed, and the error.
    """
    lock, calls, opened, closed = threading.Lock(), [], [], []

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
        watch("open_readonly", lambda fd, _: opened.append(fd))
        watch("close", lambda _, arguments: closed.extend(arguments))
        if name not in ("open_readonly", "close"):
            watch(name, lambda *_: None)
        try:
            open_checkpoint(path)
        except CheckpointError as error:
            caught = error
    return len(calls), opened, closed, caught


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
def test_any_failing_file_call_is_one_clean_error_and_leaves_nothing_open(tmp_path, monkeypatch, name, outcome):
    write_sharded(tmp_path, {f"{i:02}.safetensors": {f"t{i}": b"x"} for i in range(20)})
    total, opened, closed, caught = open_with_a_failing_call(tmp_path, monkeypatch, name)
    assert caught is None
    assert total == {"preadv": 41, "open_readonly": 21, "size": 21, "list_names": 1}[name]
    assert len(opened) == 21
    assert sorted(opened) == sorted(closed)
    for fail_at in range(total):
        _, opened, closed, caught = open_with_a_failing_call(tmp_path, monkeypatch, name, fail_at, outcome)
        assert caught is not None, fail_at
        assert str(tmp_path) in str(caught)
        assert sorted(opened) == sorted(closed)


def test_one_made_of_columns_reads_its_files_on_this_machine(tmp_path):
    """As callers made it before files had other places to come from."""
    save_file({"a": torch.arange(3)}, tmp_path / "a.safetensors")
    opened = open_checkpoint(tmp_path / "a.safetensors")
    fields = (opened.path, opened.directory, opened.files, opened.names, opened.dtypes, opened.shapes, opened.file_ids)
    made = Checkpoint(*fields, opened.offsets, opened.nbytes, opened.metadata, opened.position)
    assert made.sources == opened.sources
    assert torch.equal(read_whole(0, made), torch.arange(3))
    (tmp_path / "a.safetensors").unlink()
    with pytest.raises(ReadError, match=r"a\.safetensors"):
        read_whole(0, made)
