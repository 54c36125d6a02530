"""The result of ``plan``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import msgspec

from automodel_conv.cli.results.result import Result, filled

if TYPE_CHECKING:
    from automodel_conv.cli.forecast import Forecast
    from automodel_conv.planning.plan import CopyPlan


class Rule(msgspec.Struct, frozen=True):
    """The targets that one rule fills in the same way."""

    rule: str | None
    """Text of the rule; null if the sources are only looked up by name."""
    execution: str
    """How the targets are filled, as `CopyPlan.execution_of` returns it."""
    targets: int
    """Number of targets."""
    sources: int
    """Number of source tensors that they read."""
    nbytes: int
    """Bytes of the targets."""


class Copy(msgspec.Struct, frozen=True):
    """A strided copy.

    ``target[target_offset + i . target_strides] = source[source_offset + i . source_strides]`` for all i < shape.
    """

    source: str
    """Name of the source."""
    source_dtype: str
    """Its dtype, such as `BF16`, or the format of its codes, such as `e4m3`."""
    source_shape: tuple[int, ...]
    """Its shape."""
    shape: tuple[int, ...]
    """Number of elements in each dimension of the copy."""
    source_offset: int
    """First element in the flat source; offsets and strides are in elements."""
    source_strides: tuple[int, ...]
    """Distances in the flat source."""
    target_offset: int
    """First element in the flat target."""
    target_strides: tuple[int, ...]
    """Distances in the flat target."""


class Constant(msgspec.Struct, frozen=True):
    """Elements of a target with one value that is in no source."""

    value: float | bool | str
    """The value; infinities and NaN are the texts "inf", "-inf" and "nan"."""
    shape: tuple[int, ...]
    """Number of elements in each dimension."""
    strides: tuple[int, ...]
    """Distances in the flat target."""
    offset: int
    """First element in the flat target."""


class Explained(msgspec.Struct, frozen=True):
    """A target and what fills each of its elements (`--explain`)."""

    name: str
    """Name of the target."""
    dtype: str
    """Its dtype, such as `BF16`."""
    shape: tuple[int, ...]
    """Its shape."""
    nbytes: int
    """Its bytes."""
    execution: str
    """How it is filled, as `CopyPlan.execution_of` returns it."""
    rule: str | None
    """Text of the rule; null if the source is only looked up by name."""
    fallback: str | None
    """Why transformers' own code fills it; null if copies do."""
    sources: tuple[str, ...]
    """Names of its sources."""
    copies: tuple[Copy, ...]
    """The copies that fill it, in the order of their first elements."""
    fills: tuple[Constant, ...]
    """Elements that no copy fills."""


class Rank(msgspec.Struct, frozen=True):
    """The cost of a load on one rank."""

    coordinate: Mapping[str, int]
    """Position of the rank in each dimension of the mesh."""
    owned_bytes: int
    """Bytes of its part of all targets."""
    read_bytes: int
    """Bytes that it reads from files, with small gaps between the bytes that it needs."""
    calls: int
    """Number of reads."""
    files: int
    """Number of files that it reads."""


class MeshCosts(msgspec.Struct, frozen=True):
    """The cost of a load on the ranks of a mesh (`--mesh`)."""

    sizes: Mapping[str, int]
    """Size of each dimension of the mesh."""
    world_size: int
    """Number of ranks of the mesh."""
    ranks: tuple[Rank, ...]
    """The ranks; of a mesh with more than 64 ranks a sample, with the first and the last."""


class PlanResult(Result, frozen=True):
    """The result of ``plan``."""

    layout: str | None
    """Layout of the experts in the targets; null: the model's own."""
    source_layout: str | None
    """Layout of the experts in the files, if the files or the option state one."""
    targets: int
    """Number of targets."""
    sources: int
    """Number of source tensors that they read."""
    bytes_read: int
    """Source bytes that the targets need, each counted once."""
    bytes_written: int
    """Bytes of all targets."""
    rules: tuple[Rule, ...]
    """What each rule fills, most bytes first."""
    fallbacks: tuple[str, ...]
    """Names of targets that transformers' own code fills."""
    left_out: tuple[str, ...]
    """Names of source tensors that no target needs."""
    explained: tuple[Explained, ...]
    """The targets of `--explain`."""
    mesh: MeshCosts | None
    """Costs of the ranks of `--mesh`; null without it."""


def plan_result(plan: CopyPlan, explained: Iterable[str], mesh: MeshCosts | None) -> PlanResult:
    """Return the result of ``plan``.

    Raises:
        UnknownTarget: (a KeyError) the plan has no target of a name in ``explained``.
    """
    return filled(
        PlanResult,
        plan,
        targets=len(plan.targets),
        sources=len(plan.used_sources),
        rules=rules_of_plan(plan),
        explained=tuple(_explained(plan, name) for name in explained),
        mesh=mesh,
    )


def rules_of_plan(plan: CopyPlan) -> tuple[Rule, ...]:
    """Return what each rule of a plan fills."""
    from automodel_conv.planning.plan_rows import rows_by_rule

    return tuple(filled(Rule, row) for row in rows_by_rule(plan.targets, plan.rules, plan.execution_of))


def mesh_costs(costs: Forecast, sizes: Mapping[str, int]) -> MeshCosts:
    """Return the costs of the ranks of a mesh with these sizes."""
    ranks = (filled(Rank, rank, coordinate=dict(zip(sizes, rank.coordinate, strict=True))) for rank in costs.ranks)
    return MeshCosts(sizes, costs.world_size, tuple(ranks))


def _explained(plan: CopyPlan, name: str) -> Explained:
    target, table = plan.target(name), plan.sources
    copies = []
    pieces = [piece for copy in target.copies for piece in copy.pieces()]
    for piece in sorted(pieces, key=lambda piece: piece.target_offset):
        row = target.sources[piece.source]
        copies.append(
            Copy(
                source=table.names[row],
                source_dtype=table.decodes[row].format if row in table.decodes else table.dtypes[row],
                source_shape=tuple(table.shapes[row]),
                shape=piece.box.shape,
                source_offset=piece.source_offset,
                source_strides=piece.box.source_strides,
                target_offset=piece.target_offset,
                target_strides=piece.box.target_strides,
            )
        )
    return filled(
        Explained,
        target,
        execution=plan.execution_of(target),
        rule=plan.rules[target.rule] if target.rule >= 0 else None,
        fallback=None if target.fallback is None else target.fallback.reason,
        sources=tuple(table.names[row] for row in target.sources),
        copies=tuple(copies),
        fills=tuple(filled(Constant, fill, value=fill.json_value) for fill in target.fills),
    )
