"""Tests of hostile files in every public function: one clear error each, quickly, in little memory, nothing written.

Files that are only broken are in ``test_broken_checkpoints`` and ``files/``; ``fuzz`` searches for unforeseen ones.
``docs/reliability.md`` has the table of all of them.
"""

import json
import os
import pickle
import struct
import sys
import time
import tracemalloc

import pytest
import torch

pytest.importorskip("transformers", reason="uses merging rules of transformers")
if sys.platform != "linux":
    pytest.skip("uses pipes and devices of Linux", allow_module_level=True)

import automodel_conv as amc
from automodel_conv.errors import ConversionError
from automodel_conv.testing import POISON
from tests.fault_sweep import Model, rules, write_source

MOST_SECONDS = 20
MOST_BYTES = 20 << 20
SHARD = "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"


def with_header(text, data=b""):
    """Return a function that turns the second shard into a file with this header."""

    def make(directory):
        (directory / SHARD).write_bytes(struct.pack("<Q", len(text)) + text + data)

    return make


def entry(shape, start, stop, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def headed(entries, data=b""):
    return with_header(json.dumps(entries).encode(), data)


def replaced_by(make):
    """Return a function that replaces the second shard."""

    def replace(directory):
        (directory / SHARD).unlink()
        make(directory / SHARD)

    return replace


def index_replaced_by(make):
    def replace(directory):
        (directory / INDEX).unlink()
        make(directory / INDEX)

    return replace


def pointing(file):
    return lambda directory: (directory / INDEX).write_text(json.dumps({"weight_map": {"layers.0.norm": file}}))


def sparse(path):
    """Write the largest sparse file that the file system accepts, up to 8 EiB, as one tensor of a header."""
    for power in range(62, 40, -1):
        header = json.dumps({"layers.1.norm": entry([2**power], 0, 2**power, "U8")}).encode()
        with path.open("wb") as file:
            file.write(struct.pack("<Q", len(header)) + header)
            try:
                file.truncate(8 + len(header) + 2**power)
                return
            except OSError:
                continue


def only_pickled(directory):
    """Write weights that run code when they are unpickled."""

    class Harm:
        def __reduce__(self):
            return os._exit, (66,)

    for path in directory.iterdir():
        path.unlink()
    (directory / "pytorch_model.bin").write_bytes(pickle.dumps(Harm()))


HOSTILE = {
    "a header of 2^63 bytes": (
        lambda d: (d / SHARD).write_bytes(struct.pack("<Q", 2**63) + b"{}"),
        [SHARD, str(2**63)],
    ),
    "a header of 100 MB that is not there": (
        lambda d: (d / SHARD).write_bytes(struct.pack("<Q", 99_999_999) + b"{}"),
        [SHARD, "99999999"],
    ),
    "an array 100,000 deep": (with_header(b'{"a":' + b"[" * 100_000), [SHARD, "JSON"]),
    "an object 100,000 deep": (with_header(b'{"a":' * 100_000), [SHARD, "JSON"]),
    "a number of a million digits": (with_header(b'{"a":' + b"9" * 1_000_000 + b"}"), [SHARD, "JSON"]),
    "NaN": (with_header(b'{"__metadata__": NaN}'), [SHARD, "NaN"]),
    "Infinity": (with_header(b'{"a": {"dtype": "U8", "shape": [Infinity], "data_offsets": [0, 1]}}'), [SHARD]),
    "a name that is not UTF-8": (with_header(b'{"\xff": 1}'), [SHARD, "utf-8"]),
    "half of a surrogate pair": (
        with_header(b'{"\\ud800": {"dtype": "U8", "shape": [], "data_offsets": [0, 1]}}', b"1"),
        [SHARD],
    ),
    "a name of 2,000 characters": (headed({"a" * 2000: entry([1], 0, 4)}, bytes(4)), [SHARD, "2000 characters"]),
    "a name of two lines": (
        headed({"a\n  found:    b": entry([1], 0, 4)}, bytes(4)),
        [SHARD, "invalid tensor name", "U+000A at position 1"],
    ),
    "a key twice": (
        with_header(b'{"a": {"dtype": "U8", "dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}', b"1"),
        [SHARD, "dtype"],
    ),
    "ranges that overlap": (headed({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, bytes(12)), [SHARD, "overlap"]),
    "a range behind the end": (headed({"a": entry([2**40], 0, 2**42)}, bytes(8)), [SHARD, "truncated"]),
    "a product that overflows to nothing": (headed({"a": entry([2**32, 2**32], 0, 0)}), [SHARD, "too large"]),
    "a product that overflows to one": (headed({"a": entry([2**63 + 1, 2**63 + 1], 0, 4)}, bytes(4)), [SHARD]),
    "a negative dimension": (headed({"a": entry([-1, -2], 0, 8)}, bytes(8)), [SHARD, "shape"]),
    "a shard above the directory": (pointing("../outside.safetensors"), ["../outside.safetensors"]),
    "a shard of an absolute path": (pointing("/etc/passwd.safetensors"), ["/etc/passwd.safetensors"]),
    "a shard behind another drive": (pointing("C:\\a.safetensors"), ["a.safetensors"]),
    "a shard with a null byte": (pointing("a\0.safetensors"), ["outside"]),
    "a shard that is no safetensors file": (pointing("config.json"), ["config.json"]),
    "an index that is a pipe": (index_replaced_by(os.mkfifo), [INDEX]),
    "a shard that is a pipe": (replaced_by(os.mkfifo), [SHARD]),
    "a shard that is a device": (replaced_by(lambda path: path.symlink_to("/dev/zero")), [SHARD]),
    "a shard that is a link to itself": (replaced_by(lambda path: path.symlink_to(path.name)), [SHARD]),
    "a shard that is a directory": (replaced_by(lambda path: path.mkdir()), [SHARD]),
    "a hole of 8 EiB": (replaced_by(sparse), ["layers.1"]),
    "pickled weights": (only_pickled, ["pytorch_model.bin", "save_pretrained"]),
}


@pytest.fixture(scope="module")
def everything_imported(tmp_path_factory):
    """Import everything first, so that the memory of imports does not count as that of a load."""
    root = tmp_path_factory.mktemp("first")
    write_source(root / "checkpoint")
    for door in doors(root / "checkpoint", Model(), root).values():
        door()


@pytest.fixture
def checkpoint(tmp_path, everything_imported):
    write_source(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def doors(directory, model, tmp_path):
    return {
        "load_model": lambda: amc.load_model(model, directory, rules=rules()),
        "load_state_dict": lambda: amc.load_state_dict(directory, rules=[]),
        "convert_checkpoint": lambda: amc.convert_checkpoint(directory, tmp_path / "out", rules=rules()),
        "verify_checkpoint": lambda: amc.verify_checkpoint(directory, directory, rules=[]),
    }


@pytest.mark.parametrize("door", ["load_model", "load_state_dict", "convert_checkpoint", "verify_checkpoint"])
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_file_is_refused_quickly_in_little_memory(checkpoint, tmp_path, name, door):
    make, words = HOSTILE[name]
    make(checkpoint)
    if (name, door) == ("a hole of 8 EiB", "verify_checkpoint"):
        pytest.skip("would compare all 8 EiB byte by byte")
    model = Model()
    tracemalloc.start()
    start = time.monotonic()
    with pytest.raises(ConversionError) as caught:
        doors(checkpoint, model, tmp_path)[door]()
    seconds, (_, most_bytes) = time.monotonic() - start, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    for word in words:
        assert word in str(caught.value)
    assert len(str(caught.value)) < 20_000
    assert seconds < MOST_SECONDS
    assert most_bytes < MOST_BYTES
    for tensor in model.state_dict().values():
        assert (tensor.view(torch.uint8) == POISON).all()
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_names_that_collide_after_renaming_are_all_named(checkpoint):
    with pytest.raises(amc.NameProblems) as caught:
        amc.load_model(Model(), checkpoint, rules=rules(), key_mapping={r"layers\.1\.norm": "layers.0.norm"})
    assert caught.value.duplicated == (("layers.0.norm", ("layers.0.norm", "layers.1.norm")),)


@pytest.mark.parametrize("piece", ["experts.", "a", ".0", "experts.0.gate_proj.weight.", "layers.1.experts.0."])
def test_names_against_slow_patterns_take_no_longer(checkpoint, piece):
    """Use thousands of names of maximal length that almost match the patterns of the rules many times."""
    names = [f"{number}{piece * 1000}"[:1024] for number in range(2000)]
    headed({**dict.fromkeys(names, entry([0], 0, 0)), "layers.1.norm": entry([6], 0, 24)}, bytes(24))(checkpoint)
    (checkpoint / INDEX).write_text(json.dumps({"weight_map": {"layers.1.norm": SHARD}}))
    start = time.monotonic()
    with pytest.raises(ConversionError) as caught:
        amc.load_model(Model(), checkpoint, rules=rules())
    assert time.monotonic() - start < MOST_SECONDS
    assert len(str(caught.value)) < 50_000


@pytest.mark.parametrize("text", ["\x1b]0;owned\x07", "\x1b[2J", "\u202eabc", "\x9b", "\u2028", "a\rb"])
def test_quoted_text_of_files_cannot_control_a_terminal(checkpoint, text):
    """Put control characters into names, which are refused, and wherever else an error quotes a file."""
    settings = {"quantization_config": {"quant_method": text}}
    (checkpoint / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ConversionError) as of_a_setting:
        amc.load_state_dict(checkpoint, rules=[])
    headed({text: entry([1], 0, 4)}, bytes(4))(checkpoint)
    with pytest.raises(ConversionError, match="an invalid tensor name") as of_a_name:
        amc.load_state_dict(checkpoint, rules=[])
    for message in (str(of_a_setting.value), str(of_a_name.value)):
        assert all(character.isprintable() or character == "\n" for character in message)


def test_pipe_next_to_the_weights_does_not_block(checkpoint, tmp_path):
    """Check that a conversion copies only regular files next to the weights."""
    os.mkfifo(checkpoint / "config.json")
    os.mkfifo(checkpoint / "tokenizer.json")
    amc.convert_checkpoint(checkpoint, tmp_path / "out", rules=rules())
    assert os.listdir(tmp_path / "out") == ["model.safetensors"]


def test_pipe_as_path_does_not_block(tmp_path):
    for name in ("model.safetensors", "model.safetensors.index.json"):
        os.mkfifo(tmp_path / name)
        with pytest.raises(ConversionError, match=name):
            amc.load_state_dict(tmp_path / name, rules=[])
