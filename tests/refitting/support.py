"""Ranks of a trainer as data: what they hold, published without communication."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

import torch
from torch import Tensor, nn

from automodel_conv.dtypes import itemsize
from automodel_conv.planning.boxes import run_of
from automodel_conv.planning.copies import SourceTable, StridedCopy, Target
from automodel_conv.planning.plan import CopyPlan
from automodel_conv.planning.regions import Region, whole
from automodel_conv.refitting.agreement import Published
from automodel_conv.refitting.owners import owned_parts


def identity(table: SourceTable) -> CopyPlan:
    """Return the plan that publishes each tensor under its own name."""
    targets = []
    for row, (name, dtype, shape) in enumerate(zip(table.names, table.dtypes, table.shapes, strict=True)):
        copies = (StridedCopy(run_of(prod(shape)), (0,), (0,), (0,)),) if prod(shape) else ()
        targets.append(Target(name, dtype, tuple(shape), -1, (row,), copies))
    return CopyPlan(table, tuple(targets))


def published(
    shapes: Mapping[str, tuple[int, ...]],
    parts: Sequence[tuple[str, Region, tuple[int, ...]]] = (),
    dtype: str = "F32",
    least_bytes: int = 1 << 20,
) -> Published:
    """Return tensors that rank 0 holds, except those of which ``parts`` have the regions and their ranks."""
    table = SourceTable([*shapes], [dtype] * len(shapes), [*shapes.values()])
    held: list[dict[Region, list[int]]] = [{} for _ in shapes]
    for name, region, ranks in parts:
        held[table.names.index(name)][region] = [*ranks]
    for row, shape in enumerate(table.shapes):
        held[row] = held[row] or {whole(shape): [0]}
    owned = owned_parts(held, [itemsize(dtype)] * len(shapes), least_bytes)
    return Published(identity(table), tuple(owned), None)


def module(tensors: Mapping[str, Tensor]) -> nn.Module:
    """Return a module with these tensors: floats are parameters, others persistent buffers."""
    made = nn.Module()
    for name, tensor in tensors.items():
        *path, leaf = name.split(".")
        owner = made
        for part in path:
            if part not in owner._modules:
                owner.add_module(part, nn.Module())
            owner = owner._modules[part]
        if tensor.is_floating_point():
            owner.register_parameter(leaf, nn.Parameter(tensor, requires_grad=False))
        else:
            owner.register_buffer(leaf, tensor)
    return made


def zeros(shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype = torch.float32) -> nn.Module:
    return module({name: torch.zeros(shape, dtype=dtype) for name, shape in shapes.items()})
