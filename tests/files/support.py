"""Checkpoints written by hand, byte for byte, and a check that opening one is refused."""

import json
import struct

import pytest

from automodel_conv.errors import CheckpointError
from automodel_conv.files.checkpoint import open_checkpoint

A = {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}


def packed(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(start, stop, dtype="U8", shape=None):
    shape = [stop - start] if shape is None else shape
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def write_sharded(directory, shards, weight_map=None, index="model.safetensors.index.json"):
    """Write files of U8 tensors, ``{file: {name: bytes}}``, and an index over them."""
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


CONTENT = bytes(range(256)) * 20
TWO = {"b.safetensors": {"z": b"zz", "y": b"y"}, "a.safetensors": {"x": b"xxx"}}


def content(checkpoint, name):
    """Return the bytes of a tensor according to the columns."""
    row = checkpoint.position[name]
    with open(checkpoint.files[checkpoint.file_ids[row]], "rb") as file:
        file.seek(checkpoint.offsets[row])
        return file.read(checkpoint.nbytes[row])


def refused(path, *words, error=CheckpointError):
    """Check that ``open_checkpoint`` refuses ``path`` with a text that contains all the words."""
    with pytest.raises(error) as caught:
        open_checkpoint(path)
    for word in words:
        assert word in str(caught.value)
    return str(caught.value)
