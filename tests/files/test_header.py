"""Tests of headers: those of safetensors are read, and wrong ones are refused by name without using memory."""

import json
import os
import struct
import tempfile
import tracemalloc

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from automodel_conv.dtypes import BITS, dtype_code, torch_dtype
from automodel_conv.files.checkpoint import open_checkpoint
from automodel_conv.files.header import MAX_HEADER_BYTES
from tests.files.support import A, content, entry, packed, refused

B = {"dtype": "BF16", "shape": [2], "data_offsets": [2, 6]}


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
def test_columns_agree_with_headers_of_safetensors(tensors):
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


def test_rows_are_in_data_order(tmp_path):
    header = {"c": entry(3, 6), "empty": entry(3, 3), "a": entry(0, 2), "b": entry(2, 3)}
    (tmp_path / "model.safetensors").write_bytes(packed(header, b"aabccc"))
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.names == ["a", "b", "empty", "c"]
    assert [content(checkpoint, name) for name in checkpoint.names] == [b"aa", b"b", b"", b"ccc"]


def test_unknown_fields_of_an_entry_are_ignored(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(packed({"a": {**A, "note": {"x": [1]}}}, b"12"))
    assert open_checkpoint(tmp_path).names == ["a"]


@pytest.mark.parametrize("size", range(8))
def test_file_too_short_for_a_header(tmp_path, size):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"\0" * size)
    refused(path, str(path), "at least 8 bytes", f"{size} bytes")


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
def test_data_that_is_not_covered_exactly_once(tmp_path, header, words):
    refused_header(tmp_path, header, *words)


@given(st.data())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_file_truncated_anywhere_is_refused(data):
    whole = packed({"a": A, "b": B}, b"abcdef")
    cut = data.draw(st.integers(0, len(whole) - 1))
    with tempfile.TemporaryDirectory() as directory:
        path = os.path.join(directory, "model.safetensors")
        with open(path, "wb") as file:
            file.write(whole[:cut])
        refused(path, path)
