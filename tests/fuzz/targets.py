"""Targets of fuzzing: code that reads bytes of strangers, and checks of the results.

A check returns, or raises ``Finding`` or an error that the package must not raise. It may refuse its input with the
error types in its docstring, and with no others.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Mapping
from random import Random
from typing import Any, NamedTuple

from safetensors import SafetensorError, deserialize

import automodel_conv as amc
from automodel_conv.compiling.decoded import decoded_table
from automodel_conv.dtypes import torch_dtype
from automodel_conv.errors import CheckpointError, ConversionError, UnsupportedError, VerificationError
from automodel_conv.execution import checksums
from automodel_conv.execution import host as cpu
from automodel_conv.files import header
from automodel_conv.files.checkpoint import Checkpoint, open_checkpoint
from automodel_conv.files.journal import read_journal
from automodel_conv.files.resuming import resume_or_discard
from automodel_conv.files.shards import CHECKSUMS_NAME
from automodel_conv.files.source import LocalFile
from automodel_conv.files.staging import STAGING_NAME
from automodel_conv.testing import guarded
from tests.fuzz import mutate
from tests.fuzz.memory import Memory, memory_of

_MOST_LOADED_BYTES = 1 << 14
_MOST_LOADED_TENSORS = 64


class Finding(AssertionError):
    """An outcome that must not happen."""


class Target(NamedTuple):
    """One function that reads files of strangers."""

    check: Callable[[bytes], None]
    mutate: Callable[[bytes, Random], bytes]
    seeds: Callable[[], list[bytes]]


def packed(entries: Mapping[str, Any], data: bytes) -> bytes:
    """Return the bytes of a safetensors file."""
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype: str, shape: list[int], start: int, stop: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def check_header(data: bytes) -> None:
    """Check that safetensors accepts every header that ``read_header`` accepts, with the same content."""
    with memory_of(**{"x.safetensors": data}) as memory:
        try:
            columns = header.read_header(LocalFile("/c/x.safetensors"))
        except CheckpointError:
            return
    for _, start, stop in memory.reads:
        _require(0 <= start <= stop <= len(data), f"bytes {start} to {stop} of {len(data)} were read")
    wanted = _by_safetensors(data)
    _require(sorted(columns.names) == sorted(wanted), f"{columns.names} instead of {list(wanted)}")
    for name, dtype, shape, offset, nbytes in zip(*columns[:5], strict=True):
        theirs = wanted[name]
        last = [*theirs["shape"][:-1], theirs["shape"][-1] // 2] if dtype == "F4" else theirs["shape"]
        _require((dtype, list(shape)) == (theirs["dtype"], last), f"{name}: {dtype} {shape} instead of {theirs}")
        _require(data[offset : offset + nbytes] == bytes(theirs["data"]), f"{name}: other bytes")


def _by_safetensors(data: bytes) -> dict[str, Any]:
    try:
        return dict(deserialize(data))
    except SafetensorError as error:
        raise Finding(f"accepted, but safetensors says: {error}") from error


def header_seeds() -> list[bytes]:
    two = {"a": entry("BF16", [2, 2], 0, 8), "b": entry("U8", [3], 8, 11), "__metadata__": {"format": "pt"}}
    odd = {"b": entry("F4", [2, 4], 8, 12), "a": entry("F32", [2], 0, 8), "none": entry("I64", [0, 4], 12, 12)}
    scalar = {"s": entry("F64", [], 0, 8), "t": entry("BOOL", [1], 8, 9), "u": entry("F8_E4M3", [1, 1], 9, 10)}
    files = [packed(two, bytes(range(11))), packed(odd, bytes(range(12))), packed(scalar, bytes(range(10)))]
    empty = packed({"none": entry("U8", [0], 0, 0)}, b"")
    return [*files, empty, packed({}, b""), packed({"__metadata__": {}}, b"")]


def check_load(data: bytes) -> None:
    """Check that a small accepted checkpoint loads its own data into guarded buffers, with safetensors' values."""
    with memory_of(**{"model.safetensors": data}) as memory:
        try:
            checkpoint = open_checkpoint("/c")
            if len(checkpoint.names) > _MOST_LOADED_TENSORS or sum(checkpoint.nbytes) > _MOST_LOADED_BYTES:
                return
            plan = amc.compile_plan(checkpoint, rules=[])
            buffers = {target.name: guarded(target.shape, torch_dtype(target.dtype)) for target in plan.targets}
        except (CheckpointError, UnsupportedError, ConversionError):
            return
        memory.reads.clear()
        cpu.load_to_host(plan, checkpoint, {name: buffer.tensor for name, buffer in buffers.items()}, threads=1)
    allowed = len(data) - sum(checkpoint.nbytes)
    for _, start, stop in memory.reads:
        _require(allowed <= start <= stop <= len(data), f"bytes {start} to {stop} of a file of {len(data)} were read")
    wanted = _by_safetensors(data)
    for name, buffer in buffers.items():
        buffer.check()
        loaded = bytes(buffer.tensor.contiguous().view(-1).view(_BYTES).numpy())
        _require(loaded == bytes(wanted[name]["data"]), f"{name}: other bytes")


_SHARDS = {
    "/c/a.safetensors": packed({"x": entry("U8", [2], 0, 2), "y": entry("U8", [1], 2, 3)}, b"abc"),
    "/c/b.safetensors": packed({"z": entry("U8", [1], 0, 1), "y": entry("U8", [1], 1, 2)}, b"de"),
    "/c/down/c.safetensors": packed({"w": entry("U8", [1], 0, 1)}, b"f"),
    "/secret.safetensors": packed({"s": entry("U8", [1], 0, 1)}, b"!"),
}


def check_index(data: bytes) -> None:
    """Check that no file outside the directory is opened, and that each tensor comes from its file in the index."""
    with Memory({"/c/model.safetensors.index.json": data, **_SHARDS}) as memory:
        try:
            checkpoint = open_checkpoint("/c")
        except (CheckpointError, UnsupportedError):
            checkpoint = None
    outside = [path for path in memory.opened if not path.startswith("/c/")]
    _require(not outside, f"{outside} were opened")
    if checkpoint is not None:
        for name, file in json.loads(data)["weight_map"].items():
            actual = checkpoint.files[checkpoint.file_ids[checkpoint.position[name]]]
            _require(
                os.path.normpath(actual) == os.path.normpath(f"/c/{file}"),
                f"{name} from {actual} instead of {file}",
            )


def index_seeds() -> list[bytes]:
    maps = (
        {"x": "a.safetensors", "y": "a.safetensors"},
        {"x": "a.safetensors", "y": "b.safetensors", "z": "b.safetensors"},
        {"w": "down/c.safetensors"},
        {"s": "../secret.safetensors"},
        {"s": "/secret.safetensors"},
    )
    return [json.dumps({"metadata": {"total_size": 5}, "weight_map": weight_map}).encode() for weight_map in maps]


_CODED = packed(
    {
        "a.weight": entry("F8_E4M3", [4, 8], 0, 32),
        "a.weight_scale_inv": entry("F32", [2, 2], 32, 48),
        "b.weight_packed": entry("I32", [4, 4], 48, 112),
        "b.weight_scale": entry("BF16", [4, 1], 112, 120),
        "b.weight_shape": entry("I64", [2], 120, 136),
        "c_blocks": entry("U8", [2, 4, 1, 16], 136, 264),
        "c_scales": entry("U8", [2, 4, 1], 264, 272),
        "d.weight": entry("BF16", [2], 272, 276),
    },
    struct.pack("<34f", *[1.0] * 30, 0, 0, 0, 0)[:120] + struct.pack("<qq", 4, 32) + bytes(140),
)


def check_config(data: bytes) -> None:
    """Check that quantization settings decode the tensors or raise one of the package's own errors."""
    with memory_of(**{"model.safetensors": _CODED, "config.json": data}):
        try:
            checkpoint = open_checkpoint("/c")
            table = decoded_table(checkpoint, needs_values=True)
        except ConversionError:
            return
    for row, decode in table.decodes.items():
        for part in decode.parts:
            _require(0 <= part < len(checkpoint.names), f"{checkpoint.names[row]} has a part {part}")


def config_seeds() -> list[bytes]:
    group = {"weights": {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}}
    eight = {"weights": {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [2, 4]}}
    settings: tuple[dict[str, Any], ...] = (
        {"quant_method": "fp8", "weight_block_size": [2, 4]},
        {"quant_method": "fp8"},
        {"quant_method": "mxfp4", "modules_to_not_convert": ["d"]},
        {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": group}},
        {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {"group_0": eight}},
        {"quant_method": "modelopt", "quant_algo": "FP8", "config_groups": {}},
        {"quant_method": "gptq", "bits": 4},
        {
            "quant_method": "quark",
            "global_quant_config": {"weight": {"dtype": "fp8_e4m3", "qscheme": "per_block", "block_size": [2, 4]}},
            "layer_quant_config": {"*.d": {"weight": [{"dtype": "fp4", "qscheme": "per_group", "group_size": 32}]}},
        },
    )
    return [json.dumps({"model_type": "a", "quantization_config": one}).encode() for one in settings]


_STAGED = "/c/" + STAGING_NAME


def check_journal(data: bytes) -> None:
    """Check that no journal makes the package remove files that it did not write."""
    files = {
        f"{_STAGED}/journal.jsonl": data,
        f"{_STAGED}/lock": b"",
        f"{_STAGED}/model-00001-of-00002.safetensors": b"12345678",
        "/c/model-00002-of-00002.safetensors": b"1234",
        "/c/notes.txt": b"1",
        "/c/folder/notes.txt": b"1",
        f"{_STAGED}/beside/folder/more.txt": b"1",
        "/secret.txt": b"1",
    }
    shards = [_shard("model-00001-of-00002.safetensors", 8), _shard("model-00002-of-00002.safetensors", 4)]
    with Memory(files) as memory:
        journal = memory.open_readonly(f"{_STAGED}/journal.jsonl").fileno()
        try:
            earlier = read_journal(journal)
            resume_or_discard(earlier, journal, "/c", shards, {"kind": "convert"}, True, "model.safetensors.index.json")
        except ConversionError:
            pass
    for path in memory.removed:
        _require(path.startswith("/c/"), f"{path} was removed")


def _shard(name: str, nbytes: int) -> Any:
    """Return a shard with a name and a size to compare with a journal."""

    class Shard(NamedTuple):
        name: str
        nbytes: int

    return Shard(name, nbytes)


def journal_seeds() -> list[bytes]:
    begun = [{"work": {"kind": "convert"}}]
    first = {"finished": "model-00001-of-00002.safetensors", "verified": True}
    second = {"finished": "model-00002-of-00002.safetensors", "verified": False}
    placing = {"placing": {"folder/notes.txt": [1, 7], "notes.txt": [1, 7], "model-00002-of-00002.safetensors": [4, 7]}}
    outside = {"placing": {"notes.txt": [1, 7], "../secret.txt": [1, 7]}}
    above = {"placing": {"notes.txt": [1, 7], "folder/../../secret.txt": [1, 7]}}
    journals = (
        [],
        begun,
        [*begun, first],
        [*begun, first, second, placing],
        [*begun, outside],
        [*begun, above],
        [{"work": None}],
    )
    again = [*begun, first, {"again": "model-00001-of-00002.safetensors"}]
    return [b"".join(json.dumps(line).encode() + b"\n" for line in lines) for lines in (*journals, again)]


def check_checksums(data: bytes) -> None:
    """Check that only a file with the right checksum of every tensor, and no others, is accepted."""
    checkpoint = _summed()
    with Memory({**_SHARDS, f"/c/{CHECKSUMS_NAME}": data}):
        try:
            checksums.verify_checksums(checkpoint, 1)
        except (CheckpointError, VerificationError):
            return
    record = json.loads(data)
    _require(record["algorithm"] == "crc32", "another algorithm")
    _require(record["tensors"] == {"x": "9e83486d", "y": "06b9df6f"}, "other checksums were accepted")


def _summed() -> Checkpoint:
    with Memory(_SHARDS):
        return open_checkpoint("/c/a.safetensors")


def checksums_seeds() -> list[bytes]:
    right = {"x": "9e83486d", "y": "06b9df6f"}
    records = (
        {"algorithm": "crc32", "tensors": right},
        {"algorithm": "sha1", "tensors": {}},
        {"tensors": right | {"z": 1}},
    )
    return [json.dumps(record).encode() for record in records]


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise Finding(otherwise)


_BYTES = torch_dtype("U8")

TARGETS = {
    "header": Target(check_header, mutate.file_bytes, header_seeds),
    "load": Target(check_load, mutate.file_bytes, header_seeds),
    "index": Target(check_index, mutate.json_bytes, index_seeds),
    "config": Target(check_config, mutate.json_bytes, config_seeds),
    "journal": Target(check_journal, mutate.lines, journal_seeds),
    "checksums": Target(check_checksums, mutate.json_bytes, checksums_seeds),
}
