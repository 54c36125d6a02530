"""Tests of written headers, division into files, and index, against the libraries that they must match."""

from __future__ import annotations

import json

import pytest
import torch
from huggingface_hub import split_torch_state_dict_into_shards
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save, save_file

from automodel_conv.dtypes import BITS, dtype_code, nbytes, torch_dtype
from automodel_conv.errors import UnsupportedError
from automodel_conv.files.checkpoint import open_checkpoint
from automodel_conv.files.shards import (
    DEFAULT_NAMING,
    PAGE_BYTES,
    Spec,
    divide,
    divide_like,
    index_of,
    parse_size,
    shard_of,
)
from automodel_conv.testing import address_valued


def can_be_saved(code: str) -> bool:
    """Return whether the installed torch has the dtype and the installed safetensors writes it."""
    if torch_dtype(code) is None:
        return False
    try:
        save({"a": address_valued((2,), torch_dtype(code))})
    except (KeyError, ValueError, RuntimeError):
        return False
    return True


DTYPES = [code for code in BITS if can_be_saved(code)]
NAMES = st.text(st.characters(exclude_categories=["C", "Z"]), max_size=12).filter(lambda name: name != "__metadata__")


@st.composite
def tensors_by_name(draw, most=6):
    tensors = {}
    for start, name in enumerate(draw(st.lists(NAMES, unique=True, max_size=most))):
        code = draw(st.sampled_from(DTYPES))
        shape = draw(st.lists(st.integers(0, 5), min_size=code == "F4", max_size=3))
        tensors[name] = address_valued(shape, torch_dtype(code), start * 100)
    return tensors


def specs_of(tensors):
    return [Spec(name, dtype_code(tensor.dtype), tuple(tensor.shape)) for name, tensor in tensors.items()]


def raw(tensor):
    return bytes(tensor.reshape(-1).view(torch.uint8).tolist()) if tensor.numel() else b""


def test_most_dtypes_can_be_compared():
    assert {"BOOL", "F8_E4M3", "F8_E5M2", "U8", "I64", "BF16", "F32", "C64"} <= set(DTYPES)


def text_of(header: bytes) -> bytes:
    """Return the JSON of a header without trailing spaces."""
    assert int.from_bytes(header[:8], "little") == len(header) - 8
    return header[8:].rstrip(b" ")


def header_of(data: bytes) -> bytes:
    """Return the bytes of a file before its data."""
    return data[: 8 + int.from_bytes(data[:8], "little")]


@example({})
@example({"é": torch.ones(3), "quotes \" and \\ and '": torch.ones(()), "": torch.ones(2, 0)})
@example({"😀": torch.ones(1), "\uff5e": torch.ones(1), "z": torch.ones(1), "Z": torch.ones(1)})
@given(tensors_by_name())
def test_header_and_data_equal_those_of_safetensors_except_for_padding(tensors):
    shard = shard_of("a", specs_of(tensors))
    data = bytearray(shard.nbytes)
    data[: len(shard.header)] = shard.header
    for spec, offset in zip(shard.specs, shard.offsets, strict=True):
        data[offset : offset + spec.nbytes] = raw(tensors[spec.name])
    expected = save(tensors, metadata={"format": "pt"})
    assert text_of(shard.header) == text_of(header_of(expected))
    assert data[len(shard.header) :] == expected[len(header_of(expected)) :]


def test_data_starts_at_a_page_for_any_header_length():
    spaces = set()
    for length in range(1, 1000):
        specs = [Spec("a" * 1000, "U8", (1,)), Spec("b" * 1000, "U8", (1,)), Spec("c" * 1000, "U8", (1,))]
        header = shard_of("a", [*specs, Spec("d" * length, "U8", (1,))]).header
        assert len(header) % PAGE_BYTES == 0
        spaces.add(len(header) - 8 - len(text_of(header)))
    assert min(spaces) == 0
    assert 900 < max(spaces) < PAGE_BYTES


@pytest.mark.skipif("F4" not in DTYPES, reason="this torch has no float4")
def test_float4_pairs_are_counted_as_in_safetensors():
    tensors = {"odd": address_valued((3, 1), torch_dtype("F4")), "wide": torch.ones(2, dtype=torch.int64)}
    shard = shard_of("a", specs_of(tensors))
    assert text_of(shard.header) == text_of(header_of(save(tensors, metadata={"format": "pt"})))
    assert b'"shape":[3,2]' in shard.header


def test_float4_scalar_is_refused():
    with pytest.raises(UnsupportedError, match="a is float4 without a dimension"):
        shard_of("model.safetensors", [Spec("a", "F4", ())])


@given(tensors_by_name())
def test_tensors_are_aligned_and_do_not_overlap(tensors):
    shard = shard_of("a", specs_of(tensors))
    end = len(shard.header)
    for spec, offset in zip(shard.specs, shard.offsets, strict=True):
        assert offset == end
        assert offset % max(1, BITS[spec.dtype] // 8) == 0
        end += spec.nbytes
    assert end == shard.nbytes
    assert {spec.name for spec in shard.specs} == set(tensors)


def test_wider_dtypes_that_torch_lacks_keep_their_place_in_the_order():
    specs = [Spec(code, code, (8,)) for code in reversed(BITS)]
    assert [spec.dtype for spec in shard_of("a", specs).specs] == list(BITS)[::-1]
    assert [spec.nbytes for spec in specs] == [nbytes(code, 8) for code in reversed(BITS)]


def test_written_files_open_with_safetensors_and_this_package(tmp_path):
    tensors = {"b": torch.ones(2, 3), "a": torch.ones((), dtype=torch.int64), "é": torch.ones(0, 4, dtype=torch.bool)}
    shard = shard_of("model.safetensors", specs_of(tensors))
    path = tmp_path / shard.name
    path.write_bytes(shard.header + bytes(shard.nbytes - len(shard.header)))
    opened = open_checkpoint(path)
    assert {name: opened.offsets[row] for name, row in opened.position.items()} == {
        spec.name: offset for spec, offset in zip(shard.specs, shard.offsets, strict=True)
    }
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}
        for name, tensor in tensors.items():
            loaded = file.get_tensor(name)
            assert (loaded.shape, loaded.dtype) == (tensor.shape, tensor.dtype)


@example([100, 1, 99, 101, 100, 1], 100)
@example([101], 100)
@example([101, 1], 100)
@example([1, 101], 100)
@example([50, 50, 50], 100)
@given(
    st.lists(st.integers(1, 60) | st.sampled_from([99, 100, 101, 200]), min_size=1, max_size=14), st.integers(1, 120)
)
def test_division_equals_that_of_huggingface_hub(sizes, most_bytes):
    tensors = {f"t{n * 7 % 15}": torch.empty(size, dtype=torch.uint8) for n, size in enumerate(sizes)}
    theirs = split_torch_state_dict_into_shards(
        tensors, filename_pattern="model{suffix}.safetensors", max_shard_size=most_bytes
    )
    shards = divide(specs_of(tensors), most_bytes)
    assert {shard.name: sorted(spec.name for spec in shard.specs) for shard in shards} == {
        name: sorted(names) for name, names in theirs.filename_to_tensors.items()
    }
    assert [shard.name for shard in shards] == list(theirs.filename_to_tensors)
    index = index_of(shards)
    assert (index is not None) == theirs.is_sharded
    if index is not None:
        assert json.loads(index)["weight_map"] == theirs.tensor_to_filename
        assert json.loads(index)["metadata"]["total_size"] == theirs.metadata["total_size"]


def test_empty_tensors_go_into_the_file_of_their_predecessors():
    specs = [Spec("a", "U8", (10,)), Spec("b", "U8", (0,)), Spec("c", "U8", (10,)), Spec("d", "F32", (3, 0))]
    shards = divide(specs, 10)
    assert [{spec.name for spec in shard.specs} for shard in shards] == [{"a", "b"}, {"c", "d"}]


def test_no_tensors_are_one_empty_file_without_an_index():
    [shard] = divide([], 10)
    assert shard.name == "model.safetensors"
    assert text_of(shard.header) == text_of(save({}, metadata={"format": "pt"}))
    assert index_of([shard]) is None


def test_division_like_a_reference_keeps_its_nonempty_files():
    files = {"a": "two.safetensors", "b": "one.safetensors", "c": "two.safetensors", "gone": "three.safetensors"}
    specs = [Spec(name, "F32", (2,)) for name in "cab"]
    shards = divide_like(specs, files)
    assert {shard.name: [spec.name for spec in shard.specs] for shard in shards} == {
        "one.safetensors": ["b"],
        "two.safetensors": ["a", "c"],
    }
    index = json.loads(index_of(shards))
    assert index["weight_map"] == {name: files[name] for name in "abc"}


def test_a_single_file_under_another_name_has_an_index():
    [shard] = divide_like([Spec("a", "F32", (2,))], {"a": "weights.safetensors"})
    assert json.loads(index_of([shard]))["weight_map"] == {"a": "weights.safetensors"}


def test_index_equals_that_of_save_pretrained(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(tmp_path, max_shard_size=3000)
    shards = divide(specs_of(model.state_dict()), 3000)
    assert len(shards) > 2
    assert index_of(shards) == (tmp_path / DEFAULT_NAMING.index_name).read_bytes()
    for shard in shards:
        assert text_of(shard.header) == text_of(header_of((tmp_path / shard.name).read_bytes()))


def test_index_of_names_beyond_ascii_is_read_back(tmp_path):
    tensors = {"é": torch.ones(3), "😀": torch.ones(2)}
    shards = divide(specs_of(tensors), 12)
    assert len(shards) == 2
    for shard in shards:
        save_file({spec.name: tensors[spec.name] for spec in shard.specs}, tmp_path / shard.name)
    (tmp_path / DEFAULT_NAMING.index_name).write_bytes(index_of(shards))
    assert set(open_checkpoint(tmp_path).names) == set(tensors)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (1, 1),
        (5_000_000_000, 5_000_000_000),
        ("5GB", 5_000_000_000),
        ("5gb", 5_000_000_000),
        (" 300 MB ", 300_000_000),
        ("0.5KB", 500),
        ("1.5 MiB", 3 << 19),
        ("2TiB", 2 << 40),
        ("3TB", 3 * 10**12),
        ("17B", 17),
        ("17 kib", 17 << 10),
    ],
)
def test_sizes_are_bytes_or_units(size, expected):
    assert parse_size(size) == expected


@pytest.mark.parametrize(
    "size",
    [0, -1, True, None, 1.5, "", "5", "GB", "5 G B", "-5GB", "5GBs", "0GB", "0.4B", "1e3MB", b"5GB", "9" * 400 + "B"],
)
def test_malformed_size_is_refused(size):
    with pytest.raises(UnsupportedError, match="not a size"):
        parse_size(size)


@pytest.mark.parametrize("words", ["5GB", "300MB", "17KB", "1TB"])
def test_units_agree_with_huggingface_hub(words):
    parse = pytest.importorskip("huggingface_hub.serialization._base").parse_size_to_int
    assert parse_size(words) == parse(words)


@pytest.mark.parametrize("name", ["a\nb", "a" * 1025, "\x1b[2J"])
def test_name_that_would_be_refused_is_not_written(name):
    with pytest.raises(UnsupportedError, match="an invalid tensor name"):
        shard_of("model.safetensors", [Spec(name, "U8", (1,))])
