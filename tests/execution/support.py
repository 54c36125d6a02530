"""Checkpoints, plans and a simple oracle for the tests of the executors."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from automodel_conv.dtypes import dtype_code, torch_dtype
from automodel_conv.files.checkpoint import Checkpoint, open_checkpoint
from automodel_conv.planning.copies import SourceTable, Target, zero_rows
from automodel_conv.planning.lowering import copies_of, lower
from automodel_conv.planning.operations import Context, Operation
from automodel_conv.planning.plan import CopyPlan
from automodel_conv.planning.values import Value, leaf
from automodel_conv.testing import address_valued

MERGE = Operation("MergeModulelist", (("dim", 0),))
CONCATENATE = Operation("Concatenate", (("dim", 1),))
TRANSPOSE = Operation("Transpose", (("dim0", 1), ("dim1", 2)))
PAD = Operation("Inkling2UnpadVocab", (("inverse", True), ("rows", 5)))
INTERLEAVE = Operation("Interleave", (("dim", 1), ("inverse", True)))


def write_checkpoint(directory: Path, files: Mapping[str, Mapping[str, Tensor]], pad: int = 0) -> Checkpoint:
    """Write files with an index. ``pad`` spaces after each header shift the data to any alignment."""
    directory.mkdir(parents=True, exist_ok=True)
    weight_map = {}
    for file, tensors in files.items():
        header, data = {}, b""
        for name, tensor in tensors.items():
            raw = bytes(tensor.contiguous().reshape(-1).view(torch.uint8).tolist())
            code, shape = dtype_code(tensor.dtype), list(tensor.shape)
            if code == "F4":  # torch holds two per element
                shape[-1] *= 2
            header[name] = {
                "dtype": code,
                "shape": shape,
                "data_offsets": [len(data), len(data) + len(raw)],
            }
            data += raw
            weight_map[name] = file
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8 + pad)
        (directory / file).write_bytes(len(text).to_bytes(8, "little") + text + data)
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return open_checkpoint(directory)


def table(tensors: Mapping[str, Tensor]) -> SourceTable:
    return SourceTable(
        list(tensors),
        [dtype_code(t.dtype) or "" for t in tensors.values()],
        [tuple(t.shape) for t in tensors.values()],
    )


def columns(checkpoint: Checkpoint) -> SourceTable:
    return SourceTable(checkpoint.names, checkpoint.dtypes, checkpoint.shapes)


def target(
    sources: SourceTable,
    name: str,
    dtype: str,
    groups: Sequence[Sequence[str]],
    operations: Sequence[Operation] = (),
    outputs: Sequence[str] = (),
) -> Target:
    """Build one output of a chain of operations on groups of sources, one group per pattern."""
    names = [n for group in groups for n in group]
    rows = [sources.names.index(n) for n in names]
    ordinals = itertools.count()
    inputs = {
        f"p{i}": [leaf(next(ordinals), sources.shapes[sources.names.index(n)]) for n in group]
        for i, group in enumerate(groups)
    }
    context = Context(tuple(inputs), tuple(outputs) or (name,), ())
    value = lower(operations, inputs, context)[name] if operations else inputs["p0"][0]
    return target_from(name, dtype, value, rows)


def target_from(name: str, dtype: str, value: Value, rows: Iterable[int]) -> Target:
    return Target(
        name, dtype, value.shape, -1, tuple(rows), copies_of(value), fills=zero_rows(value.shape, value.zero_rows)
    )


def plan_of(sources: SourceTable, *targets: Target) -> CopyPlan:
    plan = CopyPlan(sources, targets)
    plan.validate()
    return plan


def naive(plan: CopyPlan, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Execute the plan one element at a time."""
    results = {}
    for t in plan.targets:
        out: list[Tensor | None] = [None] * prod(t.shape)
        for copy in t.copies:
            for piece in copy.pieces():
                flat = tensors[plan.sources.names[t.sources[piece.source]]].contiguous().reshape(-1)
                for index in itertools.product(*map(range, piece.box.shape)):
                    read = piece.source_offset + _dot(index, piece.box.source_strides)
                    write = piece.target_offset + _dot(index, piece.box.target_strides)
                    assert out[write] is None
                    out[write] = flat[read].to(torch_dtype(t.dtype))
        for fill in t.fills:
            for index in itertools.product(*map(range, fill.shape)):
                write = fill.offset + _dot(index, fill.strides)
                assert out[write] is None
                out[write] = torch.tensor(fill.value, dtype=torch_dtype(t.dtype))
        empty = torch.empty(t.shape, dtype=torch_dtype(t.dtype))
        results[t.name] = torch.stack(out).reshape(t.shape) if out else empty
    return results


def _dot(index: Sequence[int], strides: Sequence[int]) -> int:
    return sum(i * s for i, s in zip(index, strides, strict=True))


def experts(count: int, rows: int, columns: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return gate, up and down of each expert, in the order of a checkpoint, with all elements different."""
    tensors = {}
    start = 0
    for e in range(count):
        for name, shape in (
            ("down", (columns, rows)),
            ("gate", (rows, columns)),
            ("up", (rows, columns)),
        ):
            tensors[f"experts.{e}.{name}"] = address_valued(shape, dtype, start)
            start += rows * columns
    return tensors


def expert_names(count: int, projection: str) -> list[str]:
    return [f"experts.{e}.{projection}" for e in range(count)]


def moe(tmp_path: Path, *operations: Operation, pad: int = 0, dtype=torch.bfloat16, shape=(6, 9, 20)):
    """Return a checkpoint of experts in two files, and a plan for its three parameters."""
    count = shape[0]
    tensors = experts(*shape, dtype)
    tensors["norm.weight"] = address_valued((7,), dtype, 5)
    names = list(tensors)
    files = {"a.safetensors": names[: len(names) // 2], "b.safetensors": names[len(names) // 2 :]}
    checkpoint = write_checkpoint(tmp_path, {file: {n: tensors[n] for n in part} for file, part in files.items()}, pad)
    sources, code = columns(checkpoint), dtype_code(dtype)
    gate, up, down = (expert_names(count, p) for p in ("gate", "up", "down"))
    plan = plan_of(
        sources,
        target(sources, "gate_up", code, [gate, up], [MERGE, CONCATENATE, *operations]),
        target(sources, "down", code, [down], [MERGE, *operations]),
        target(sources, "norm", code, [["norm.weight"]]),
    )
    return tensors, checkpoint, plan


LAYOUTS = {"rows": (), "transposed": (TRANSPOSE,), "interleaved": (INTERLEAVE, TRANSPOSE)}
