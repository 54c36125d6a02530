"""Random meshes, placements and boxes, and a plan of experts that tests take parts of."""

from __future__ import annotations

import itertools
from math import prod

import torch
from hypothesis import strategies as st
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from automodel_conv.planning.copies import SourceTable, Target
from automodel_conv.planning.lowering import copies_of, lower
from automodel_conv.planning.operations import Context, Operation
from automodel_conv.planning.plan import CopyPlan
from automodel_conv.planning.values import leaf
from tests.planning import oracles

SEEDS = st.integers(0, 2**32)


def random_mesh(rng, most=4):
    return tuple(rng.randint(1, most) for _ in range(rng.randint(1, 3)))


def random_placements(rng, shape, mesh):
    """Draw any placements, including several of one dimension."""
    dims = range(len(shape))
    kinds = [
        Replicate,
        lambda: Shard(rng.choice(dims)),
        lambda: Shard(rng.choice(dims)),
        lambda: _StridedShard(rng.choice(dims), split_factor=rng.randint(1, 4)),
    ]
    return [rng.choice(kinds)() if shape else Replicate() for _ in mesh]


def coordinates(mesh):
    return itertools.product(*map(range, mesh))


def torch_part(tensor, mesh, coordinate, placements):
    """Return the part that torch gives a rank: each mesh dimension splits the rest of the one before, FSDP2 last."""
    splits = [split for split in zip(placements, mesh, coordinate, strict=True) if not split[0].is_replicate()]
    data_parallel = []
    while splits:
        placement, size, at = splits.pop(0)
        others = prod(other for later, other, _ in splits if later.dim == placement.dim)
        if 1 < getattr(placement, "split_factor", 1) == others:
            data_parallel.append((placement.dim, size, at))
        else:
            tensor = placement._split_tensor(tensor, size, with_padding=False, contiguous=True)[0][at]
    for dim, size, at in reversed(data_parallel):
        parts = tensor.chunk(size, dim)
        tensor = parts[at] if at < len(parts) else tensor.narrow(dim, 0, 0)
    return tensor


def held(region, tensor):
    """Return the part of a tensor that a region describes, element by element."""
    elements = tensor.reshape(-1).tolist()
    elements_written = oracles.written(region.pieces())
    assert sorted(elements_written) == list(range(prod(region.local_shape)))
    return [elements[element] for _, (_, element) in sorted(elements_written.items())]


def numbered(shape):
    return torch.arange(prod(shape)).reshape(shape)


def moe_plan(count=4, rows=6, columns=4, *more, dtype="BF16", source="BF16"):
    """Return a plan for one grouped tensor ``[E, 2 * rows, columns]`` of gates and ups."""
    names = [f"{e}.{projection}" for projection in ("gate", "up") for e in range(count)]
    sources = SourceTable(names, [source] * len(names), [(rows, columns)] * len(names))
    ordinals = itertools.count()
    leaves = {p: [leaf(next(ordinals), (rows, columns)) for _ in range(count)] for p in ("gate", "up")}
    operations = [Operation("MergeModulelist", (("dim", 0),)), Operation("Concatenate", (("dim", 1),)), *more]
    value = lower(operations, leaves, Context(("gate", "up"), ("grouped",), ()))["grouped"]
    target = Target("grouped", dtype, tuple(value.shape), -1, tuple(range(len(names))), copies_of(value))
    return CopyPlan(sources, (target,))
