"""The plan of loading code, from what a trace says that it writes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from automodel_conv.dtypes import dtype_code
from automodel_conv.planning.copies import Fill, SourceTable, StridedCopy, Target, group_pieces
from automodel_conv.planning.loader_writes import View
from automodel_conv.planning.origins import Unknown
from automodel_conv.planning.plan import CopyPlan
from automodel_conv.planning.traced_copies import Filled


@dataclass(frozen=True)
class TracedPlan:
    """The plan of loading code, and the targets that it computes."""

    plan: CopyPlan
    """The copies that it makes, and constants."""
    computed: Mapping[str, Unknown]
    """Targets that only the code itself can fill, by name."""


def traced_plan(targets: Mapping[str, tuple[View, Filled]], sources: SourceTable) -> TracedPlan:
    """Return the plan that fills targets as loading code does.

    Args:
        targets: each target as a view and what fills it, by name.
        sources: tensors of the checkpoint, as stored.
    """
    computed: dict[str, Unknown] = {}
    read_as: dict[int, torch.dtype] = {}
    shared: dict[tuple[StridedCopy, ...], tuple[StridedCopy, ...]] = {}
    planned, missing, tied = [], [], {}
    for name, (view, filled) in targets.items():
        unknown = filled.unknown or _otherwise_read(filled, sources, read_as)
        if unknown is not None:
            computed[name] = unknown
        elif not filled.is_written:
            missing.append(name)
        else:
            read_as |= {read.row: read.stored for read, _ in filled.reads}
            planned.append(_target(name, view, filled, shared))
            tied.setdefault(view, []).append(name)
    plan = CopyPlan(
        sources.read_as({row: _code(dtype) for row, dtype in read_as.items()}),
        tuple(planned),
        missing=tuple(missing),
        tied=tuple(tuple(names) for names in tied.values() if len(names) > 1),
    )
    plan.validate()
    return TracedPlan(plan, computed)


def _otherwise_read(filled: Filled, sources: SourceTable, read_as: Mapping[int, torch.dtype]) -> Unknown | None:
    """Return why a target cannot be filled although copies do, if it is so: for the dtypes that it reads sources as."""
    reads = {read.row: read.stored for read, _ in filled.reads}
    if any(read_as.get(row, dtype) != dtype for row, dtype in reads.items()):
        return Unknown("reads one tensor as two dtypes", frozenset(reads))
    if any(sources.nbytes(row) % dtype.itemsize for row, dtype in reads.items()):
        return Unknown("reads part of a tensor as a dtype that does not fit into the whole", frozenset(reads))
    return None


def _target(
    name: str, view: View, filled: Filled, shared: dict[tuple[StridedCopy, ...], tuple[StridedCopy, ...]]
) -> Target:
    rows = tuple(sorted({read.row for read, _ in filled.reads}))
    ordinals = {row: ordinal for ordinal, row in enumerate(rows)}
    copies = group_pieces(piece._replace(source=ordinals[read.row]) for read, piece in filled.reads)
    fills = tuple(Fill.of_piece(piece, number) for number, piece in filled.numbers)
    return Target(name, _code(view.dtype), view.shape, -1, rows, shared.setdefault(copies, copies), fills=fills)


def _code(dtype: torch.dtype) -> str:
    return dtype_code(dtype) or str(dtype)
