"""Writes of slabs to a file, from host tensors, a device and files."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch

from automodel_conv.dtypes import dtype_code
from automodel_conv.execution.memory import with_source_strides
from automodel_conv.execution.reading import OpenFiles
from automodel_conv.execution.writing import (
    DeviceTensorProducer,
    HostTensorProducer,
    SlabGroup,
    SourceFileProducer,
    create_shard_file,
    jobs_by_slab,
    write_slabs,
)
from automodel_conv.files.checkpoint import Checkpoint
from automodel_conv.files.destination import open_destination
from automodel_conv.files.shards import Spec, shard_of
from automodel_conv.planning.plan import CopyPlan
from automodel_conv.publishing.saved import places_in
from automodel_conv.schedule.writes import slab_schedule
from tests.execution.simulated import SimulatedDevice
from tests.execution.support import LAYOUTS, PAD, columns, moe, naive, plan_of, target, write_checkpoint

MAKERS = ("host", "device", "files")
SLAB, INPUT = 1024, 512


class TensorPlaces(NamedTuple):
    """Places of tensors, with the attributes of ``slabs.Places``."""

    dtypes: list[str]
    file_ids: list[int]
    offsets: list[int]


class Case(NamedTuple):
    tensors: dict[str, torch.Tensor]
    checkpoint: Checkpoint
    plan: CopyPlan
    expected: dict[str, torch.Tensor]


def case_of(directory, *operations, wanted="BF16", dtype=torch.bfloat16, shape=(3, 9, 14), pad=0):
    """Return experts that become grouped, some with a cast, and the expected result by a loop over elements."""
    tensors, checkpoint, plan = moe(directory, *operations, pad=pad, dtype=dtype, shape=shape)
    plan = plan_of(plan.sources, *(t._replace(dtype=wanted) if t.name != "norm" else t for t in plan.targets))
    return Case(tensors, checkpoint, plan, naive(plan, tensors))


@contextmanager
def producer_of(kind, case, slab_bytes=SLAB, input_bytes=INPUT, tensors=None, device=None, backend="torch"):
    """Yield the schedule of a case, and a function that starts a maker of the kind for it, with guarded scratch."""
    targets = list(case.plan.targets)
    shard = shard_of("model.safetensors", [Spec(t.name, t.dtype, t.shape) for t in targets])
    places = places_in([shard], targets)
    if kind == "files":
        slabs = slab_schedule(targets, [t.copies for t in targets], case.checkpoint, places, most_bytes=slab_bytes)
        jobs = jobs_by_slab(slabs.slabs, case.checkpoint, {}, input_bytes)
        files = OpenFiles(case.checkpoint, [job for group in jobs.values() for job in group])

        def start():
            return SourceFileProducer(case.checkpoint, files, jobs, slabs.dtypes, slab_bytes, input_bytes)

        try:
            yield shard, slabs, start
        finally:
            files.close()
        return
    tensors = case.tensors if tensors is None else tensors
    rows = [tensors[name] for name in case.plan.sources.names]
    copies, operands = [], []
    for number, t in enumerate(targets):
        copies_of_target, read = with_source_strides(t.copies, [rows[row] for row in t.sources])
        copies.append(copies_of_target)
        targets[number] = t._replace(sources=tuple(range(len(operands), len(operands) + len(read))))
        operands += read
    tensor_places = TensorPlaces(
        [dtype_code(t.dtype) for t in operands], list(range(len(operands))), [0] * len(operands)
    )
    slabs = slab_schedule(targets, copies, tensor_places, places, most_bytes=slab_bytes)
    if kind == "host":
        yield shard, slabs, lambda: HostTensorProducer(operands, slabs.dtypes, slab_bytes)
    else:
        device = device or SimulatedDevice()
        yield shard, slabs, lambda: DeviceTensorProducer(operands, slabs.dtypes, slab_bytes, device, backend)


def write(kind, case, directory, threads=2, **options):
    """Write a case as one file. Return its path once it is complete."""
    with producer_of(kind, case, **options) as (shard, slabs, start):
        seen = []
        with open_destination(str(directory), [shard], None) as destination:
            path = destination.path(shard.name)
            create_shard_file(shard, path)
            write_slabs([SlabGroup(slabs.slabs, start)], path, threads, seen.append)
            destination.finish(shard)
            destination.commit(None)
    assert sum(seen) == shard.nbytes - len(shard.header)
    return Path(directory) / shard.name


def every_case(tmp_path_factory):
    """Return each layout, with and without a cast, there and back, with headers that give the data any alignment."""
    every = []
    for layout in LAYOUTS:
        for wanted in ("BF16", "F32"):
            forward = case_of(tmp_path_factory.mktemp("there"), *LAYOUTS[layout], wanted=wanted, pad=len(every) % 3)
            grouped = write_checkpoint(tmp_path_factory.mktemp("back"), {"a.safetensors": forward.expected}, pad=1)
            backward = forward.plan.inverse()
            every += [forward, Case(forward.expected, grouped, backward, naive(backward, forward.expected))]
    return [*every, *(padded_case(tmp_path_factory.mktemp("padded"), rows) for rows in (2, 5))]


def padded_case(directory, rows):
    """Return a small case of targets that end in rows of zeros, between others, and one that needs none."""
    tensors = {"a": torch.arange(1.0, 1 + rows * 3).reshape(rows, 3), "b": torch.arange(1.0, 6)}
    checkpoint = write_checkpoint(directory, {"a.safetensors": tensors})
    sources = columns(checkpoint)
    plan = plan_of(
        sources,
        target(sources, "whole", "F32", [["a"]]),
        target(sources, "padded", "F32", [["a"]], [PAD]),
        target(sources, "cast", "F64", [["a"]], [PAD]),
        target(sources, "b", "F32", [["b"]], [PAD]),
    )
    return Case(tensors, checkpoint, plan, naive(plan, tensors))
