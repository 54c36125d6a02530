"""Tests of the fast JSON parser: it accepts usual headers and returns the same as the strict parser."""

from __future__ import annotations

import json
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from automodel_conv.errors import CheckpointError
from automodel_conv.files import header
from automodel_conv.files.fast_json import usual_columns, usual_object
from automodel_conv.files.header import _checked_columns, _checked_object, _decode
from automodel_conv.files.source import LocalFile
from tests.fuzz import mutate
from tests.fuzz.targets import entry, header_seeds, index_seeds

TWO = {"a.0": entry("BF16", [2, 2], 0, 8), "b": entry("U8", [3], 8, 11)}


def columns(data):
    """Return the columns of the strict parser, or None if it refuses the data."""
    try:
        return _checked_columns(bytearray(data), "x")
    except CheckpointError:
        return None


def compact(entries):
    return json.dumps(entries, separators=(",", ":")).encode()


def json_of(file):
    return file[8 : 8 + int.from_bytes(file[:8], "little")]


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}, {"format": "pt", "layout": "nemo"}])
def test_headers_of_safetensors_are_usual(metadata):
    tensors = {"a.0.w": torch.zeros(2, 3), "é": torch.zeros(()), "none": torch.zeros(0, 4, dtype=torch.int64)}
    data = json_of(save(tensors, metadata))
    parsed = usual_columns(data)
    assert parsed is not None
    assert parsed == columns(data)
    assert parsed.metadata == (metadata or {})


@pytest.mark.parametrize("metadata", [{"format": "pt"}, {}])
@pytest.mark.parametrize("separators", [(",", ":"), (", ", ": ")])
def test_headers_of_python_are_usual(metadata, separators):
    data = json.dumps({"__metadata__": metadata, **TWO}, separators=separators).encode() + b"   "
    parsed = usual_columns(data)
    assert parsed is not None
    assert parsed == columns(data)
    assert parsed.metadata == metadata


def test_index_of_transformers_is_usual():
    index = {"metadata": {"total_size": 3}, "weight_map": {f"a.{i}.w": "x.safetensors" for i in range(3)}}
    assert usual_object((json.dumps(index, indent=2, sort_keys=True) + "\n").encode()) == index


def test_escapes_are_usual():
    data = json.dumps({"é": TWO["a.0"], "\U0001f600": TWO["b"]}).encode()
    assert b"\\u" in data
    parsed = usual_columns(data)
    assert parsed is not None
    assert parsed == columns(data)
    assert parsed.names == ["é", "\U0001f600"]


def test_members_come_in_any_order():
    data = compact({"a": {"data_offsets": [0, 3], "shape": [3], "dtype": "U8"}})
    parsed = usual_columns(data)
    assert parsed is not None
    assert parsed == columns(data) == (["a"], ["U8"], [(3,)], [0], [3], {})


def test_a_pair_of_f4_values_is_one_element():
    parsed = usual_columns(compact({"a": entry("F4", [2, 4], 0, 4)}))
    assert parsed is not None
    assert parsed == columns(compact({"a": entry("F4", [2, 4], 0, 4)}))
    assert parsed.shapes == [(2, 2)]


def test_equal_shapes_are_one_object():
    data = compact({"a": entry("U8", [300, 500], 0, 150000), "b": entry("U8", [300, 500], 150000, 300000)})
    parsed = usual_columns(data)
    assert parsed is not None
    assert parsed.shapes[0] is parsed.shapes[1]
    assert parsed.dtypes[0] is parsed.dtypes[1]


ENTRY = '{"dtype":"U8","shape":[3],"data_offsets":[0,3]}'
NOT_USUAL = {
    "a name twice": f'{{"a":{ENTRY},"a":{ENTRY}}}',
    "a member twice": '{"a":{"dtype":"I8","dtype":"U8","shape":[3],"data_offsets":[0,3]}}',
    "a member twice, another not at all": '{"a":{"dtype":"U8","dtype":"U8","data_offsets":[0,3]}}',
    "one entry with too many members, one with too few": '{"a":{"dtype":"U8","shape":[3],"data_offsets":[0,3],"x":1},'
    '"b":{"dtype":"U8","data_offsets":[3,3]}}',
    "a key of the metadata twice": f'{{"__metadata__":{{"k":"v","k":"w"}},"a":{ENTRY}}}',
    "the metadata twice": f'{{"__metadata__":{{"k":"v"}},"__metadata__":{{"k":"v"}},"a":{ENTRY}}}',
    "metadata of numbers": f'{{"__metadata__":{{"k":1}},"a":{ENTRY}}}',
    "metadata that is a tensor": f'{{"__metadata__":{ENTRY},"a":{ENTRY}}}',
    "metadata that is a string": f'{{"__metadata__":"pt","a":{ENTRY}}}',
    "a name twice, once with an escape": f'{{"a":{ENTRY},"\\u0061":{ENTRY}}}',
    "a colon that is no member": f'{{"a":{ENTRY},"b:":{ENTRY.replace("[0,3]", "[3,6]")}}}',
    "a colon in an escape for a name twice": f'{{"b\\u003a":{ENTRY},"a":{ENTRY},"a":{ENTRY}}}',
    **{
        f"half a surrogate pair, {half}": f'{{"{half}":{ENTRY}}}'
        for half in (r"\ud800", r"\udfff", r"\ud800A", r"\ud800\u0041", r"\ud800\ud800", r"\udc00\ud800")
    },
    "-0 elements": '{"a":{"dtype":"U8","shape":[-0],"data_offsets":[0,0]}}',
    "a start of -0": ENTRY.join(['{"a":', "}"]).replace("[0,3]", "[-0,3]"),
    "a fraction": '{"a":{"dtype":"U8","shape":[3.0],"data_offsets":[0,3]}}',
    "an exponent": '{"a":{"dtype":"U8","shape":[3e0],"data_offsets":[0,3]}}',
    "a leading zero": '{"a":{"dtype":"U8","shape":[03],"data_offsets":[0,3]}}',
    "true": '{"a":{"dtype":"U8","shape":[true],"data_offsets":[0,1]}}',
    "a number in a string": '{"a":{"dtype":"U8","shape":["3"],"data_offsets":[0,3]}}',
    "metadata that is null": f'{{"__metadata__":null,"a":{ENTRY}}}',
    "null": '{"a":null}',
    "no shape": '{"a":{"dtype":"U8","shape":null,"data_offsets":[0,1]}}',
    "NaN": '{"a":{"dtype":"U8","shape":[NaN],"data_offsets":[0,3]}}',
    "a negative size": '{"a":{"dtype":"U8","shape":[-3,-1],"data_offsets":[0,3]}}',
    "a size that wraps": f'{{"a":{{"dtype":"U8","shape":[{2**64 + 3}],"data_offsets":[0,3]}}}}',
    "a product that wraps": f'{{"a":{{"dtype":"U8","shape":[{2**32},{2**32}],"data_offsets":[0,0]}}}}',
    "a product that wraps before a zero": f'{{"a":{{"dtype":"U8","shape":[{2**62},4,0],"data_offsets":[0,0]}}}}',
    "a size of 5,000 digits": f'{{"a":{{"dtype":"U8","shape":[{"9" * 5000}],"data_offsets":[0,3]}}}}',
    "an unknown dtype": ENTRY.join(['{"a":', "}"]).replace("U8", "Q9"),
    "a negative start": '{"a":{"dtype":"U8","shape":[3],"data_offsets":[-3,0]}}',
    "an end before the start": '{"a":{"dtype":"U8","shape":[3],"data_offsets":[3,0]}}',
    "another size": '{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,3]}}',
    "half a byte": '{"a":{"dtype":"F4","shape":[3],"data_offsets":[0,1]}}',
    "three offsets": '{"a":{"dtype":"U8","shape":[3],"data_offsets":[0,3,3]}}',
    "F4 values that do not pair": '{"a":{"dtype":"F4","shape":[2,1],"data_offsets":[0,1]}}',
    "F4 without a dimension": '{"a":{"dtype":"F4","shape":[],"data_offsets":[0,0]}}',
    "a depth of 100,000": '{"a":' + "[" * 100_000 + "]" * 100_000 + "}",
    "a depth of 100,000 where nobody looks": ENTRY.join(['{"a":', "}"])[:-2]
    + ',"x":'
    + "[" * 100_000
    + "]" * 100_000
    + "}}",
    "65 dimensions": f'{{"a":{{"dtype":"U8","shape":{[1] * 65},"data_offsets":[0,1]}}}}',
    "a byte after the end": f'{{"a":{ENTRY}}}\0',
    "a comma at the end": f'{{"a":{ENTRY},}}',
    "an object that is cut": f'{{"a":{ENTRY}',
    "a list": "[]",
    "nothing": "",
}


@pytest.mark.parametrize("name", NOT_USUAL)
def test_wrong_or_unusual_headers_are_left_to_the_strict_parser(name):
    assert usual_columns(NOT_USUAL[name].encode()) is None


@pytest.mark.parametrize("data", [b'{"\xff":1}', b'{"a\xed\xa0\x80":{"dtype":"U8","shape":[3],"data_offsets":[0,3]}}'])
def test_headers_that_are_not_utf8_are_left_to_the_strict_parser(data):
    assert usual_columns(data) is None
    assert usual_object(data) is None


def test_shapes_of_very_many_sizes_are_refused_at_once():
    shape = ",".join(["9"] * 1_000_000)
    data = f'{{"a":{{"dtype":"U8","shape":[{shape}],"data_offsets":[0,3]}}}}'.encode()
    assert usual_columns(data) is None
    with pytest.raises(CheckpointError, match="too large"):
        _checked_columns(bytearray(data), "x")


def assert_same(data):
    parsed_columns = usual_columns(data)
    assert parsed_columns is None or parsed_columns == columns(data)
    parsed = usual_object(data)
    if parsed is not None:
        strict = _checked_object(bytearray(data), "x", _decode)
        assert repr(parsed) == repr(strict)  # compares NaN, -0.0 and the order of names too


@pytest.mark.parametrize("seeds", [header_seeds, index_seeds])
def test_mutations_parse_as_by_the_strict_parser(seeds):
    random, taken = Random(1), 0
    texts = [json_of(file) for file in seeds()] if seeds is header_seeds else seeds()
    for _ in range(3000):
        data = random.choice(texts)
        for _ in range(random.randint(1, 2)):
            data = mutate.json_bytes(data, random)
        assert_same(data)
        taken += usual_object(data) is not None
    assert 300 < taken < 2900


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
SIZES = st.integers(0, 3) | st.sampled_from([-1, 2**32, 2**63, 2**64, 1.0, True, None, "3"])
ENTRIES = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["U8", "F4", "BF16", "Q"]) | VALUES,
        "shape": st.lists(SIZES, max_size=3) | VALUES,
        "data_offsets": st.lists(SIZES, min_size=2, max_size=2) | VALUES,
        "more": VALUES,
    },
)


@given(
    st.dictionaries(st.sampled_from(["a", "b", "__metadata__", "c:d", "é", "\n"]), ENTRIES | VALUES, max_size=3),
    st.booleans(),
    st.booleans(),
)
@settings(max_examples=150)
def test_any_json_parses_as_by_the_strict_parser(entries, escaped, twice):
    text = json.dumps(entries, ensure_ascii=escaped)
    if twice and len(entries) > 1:
        text = text.replace(json.dumps(list(entries)[1], ensure_ascii=escaped), json.dumps(next(iter(entries))), 1)
    assert_same(text.encode("utf-8", "surrogatepass"))


def test_headers_are_read_only_by_the_usual_parser(tmp_path, monkeypatch):
    monkeypatch.setattr(header, "_checked_columns", None)
    (tmp_path / "x.safetensors").write_bytes(save({"a": torch.zeros(2, 3)}))
    assert header.read_header(LocalFile(str(tmp_path / "x.safetensors"))).shapes == [(2, 3)]
