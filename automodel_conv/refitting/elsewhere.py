"""Forecasts of refits between ranks that are not here, from the parts that they would hold; pure.

Only sizes are computed. Layers of equal geometry share them, so models of any depth and meshes of hundreds of ranks
take seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from math import prod
from typing import NamedTuple

from automodel_conv.dtypes import itemsize
from automodel_conv.planning.copies import SourceTable
from automodel_conv.planning.parts_of_sources import SourcePart, plan_from_parts
from automodel_conv.planning.plan import CopyPlan
from automodel_conv.planning.regions import Region
from automodel_conv.refitting.agreement import Published, Roles
from automodel_conv.refitting.costs import RefitForecast, forecast_of
from automodel_conv.refitting.owners import owned_parts
from automodel_conv.refitting.planned import bucket_for
from automodel_conv.schedule.rounds import Units, rounds_of, sizes_by_round
from automodel_conv.schedule.transfers import transfers_of, units_of

Regions = Mapping[str, Region]
"""The region of each tensor that a rank holds, by name."""


def published_by(plan: CopyPlan, ranks: Sequence[Sequence[Region]], layout: str | None, least_bytes: int) -> Published:
    """Return what ranks of a trainer hold that all have the same tensors.

    Args:
        plan: the plan from the whole tensors to those of the checkpoint.
        ranks: for each rank, the region of each source of the plan. Regions of a source are equal, or share no element.
        layout: layout of the experts that the checkpoint keeps grouped.
        least_bytes: see ``owned_parts``.
    """
    holders: list[dict[Region, list[int]]] = []
    for source in range(len(plan.sources.names)):
        held: dict[Region, list[int]] = {}
        for rank, regions in enumerate(ranks):
            if prod(regions[source].local_shape):
                held.setdefault(regions[source], []).append(rank)
        holders.append(held)
    return Published(plan, tuple(owned_parts(holders, list(map(itemsize, plan.sources.dtypes)), least_bytes)), layout)


def forecast_elsewhere(
    published: Published,
    engine: CopyPlan,
    receivers: Sequence[Regions],
    senders: int,
    bucket_bytes: int,
    begin_step: Callable[[str], None] = lambda step: None,
) -> RefitForecast:
    """Return what ``Refit.forecast`` would return on these ranks.

    Ranks of the trainer come first, those of the engine follow. No rank is both.

    Args:
        published: what the trainer's ranks hold.
        engine: the plan from the checkpoint's tensors to the whole tensors of the engine.
        receivers: what each rank of the engine holds. Tensors without a region are whole.
        senders: number of the trainer's ranks.
        bucket_bytes: most bytes of a bucket.
        begin_step: function that is called with the name of each step before it begins.

    Raises:
        UnsupportedError: strided copies cannot fill a tensor, or ``bucket_bytes`` is too small.
        CoverageError: an element would not be written exactly once.
    """
    roles = Roles(tuple(range(senders)), tuple(range(senders, senders + len(receivers))))
    bucket = bucket_for(bucket_bytes, roles)
    sizes = _Sizes(published, published.plan.then(engine), bucket.unit_bytes)
    owners = [each.owner for each in published.parts]
    units = [Units() for _ in receivers]
    for number, regions in enumerate(receivers):
        begin_step(f"rank {number + 1} of {len(receivers)} of the engine")
        for unit in _by_rank(sizes.of(regions), owners, bucket.unit_bytes):
            units[number].append(unit)
    begin_step("rounds")
    rounds = rounds_of(units, roles.receivers, bucket.round_bytes)
    return forecast_of(sizes_by_round(units, roles.receivers, rounds), *roles, engine.left_out)


class _Moves(NamedTuple):
    """The sizes of moves in columns."""

    parts: list[int]
    """Row of each part; in what layers share, its number among the parts of their group."""
    nbytes: list[int]


class _Group(NamedTuple):
    """Targets that read a common source, so that what fills one may be a repeat of what fills another."""

    targets: tuple[int, ...]
    """Rows of the targets of the plan."""
    sources: tuple[int, ...]
    """Rows of their sources."""
    reads: tuple[tuple[int, ...], ...]
    """For each target, its sources as numbers in ``sources``."""
    parts: tuple[int, ...]
    """Rows of all parts of the sources, in their order."""


class _Sizes:
    """The sizes of the moves that fill the targets of a plan; targets of equal geometry share them."""

    def __init__(self, published: Published, plan: CopyPlan, unit_bytes: int):
        self._plan = plan
        self._unit_bytes = unit_bytes
        rows_of: dict[int, list[int]] = {}
        for row, (part, *_) in enumerate(published.parts):
            rows_of.setdefault(part.source, []).append(row)
        divisions = {
            source: tuple(published.parts[row].part.region for row in rows) for source, rows in rows_of.items()
        }
        numbers: dict[tuple[Region, ...], int] = {}
        self._divisions = {source: numbers.setdefault(regions, len(numbers)) for source, regions in divisions.items()}
        self._regions = list(numbers)
        self._groups = [_group_of(plan, rows, rows_of) for rows in _sharing_sources(plan)]
        self._seen: dict[tuple[object, ...], list[_Moves]] = {}

    def of(self, regions: Regions) -> _Moves:
        """Return the moves to a rank, cut as units need them and in their order."""
        by_target: dict[int, tuple[_Group, _Moves]] = {}
        for group in self._groups:
            for row, moves in zip(group.targets, self._of_group(group, regions), strict=True):
                by_target[row] = group, moves
        all_moves = _Moves([], [])
        for row in range(len(self._plan.targets)):
            group, moves = by_target[row]
            all_moves.parts.extend(map(group.parts.__getitem__, moves.parts))
            all_moves.nbytes.extend(moves.nbytes)
        return all_moves

    def _of_group(self, group: _Group, regions: Regions) -> list[_Moves]:
        targets = [self._plan.targets[row] for row in group.targets]
        key = (
            tuple((id(t.copies), t.fills, t.dtype, t.shape, regions.get(t.name)) for t in targets),
            group.reads,
            tuple(self._divisions.get(source) for source in group.sources),
        )
        if key not in self._seen:
            self._seen[key] = self._computed(group, regions)
        return self._seen[key]

    def _computed(self, group: _Group, regions: Regions) -> list[_Moves]:
        """Return the moves to each target as a refit computes them, from a plan of these targets only."""
        targets = [
            self._plan.targets[row]._replace(sources=reads, rule=-1)
            for row, reads in zip(group.targets, group.reads, strict=True)
        ]
        of = self._plan.sources
        rows = group.sources
        table = SourceTable([of.names[r] for r in rows], [of.dtypes[r] for r in rows], [of.shapes[r] for r in rows])
        own = {t.name: regions[t.name] for t in targets if t.name in regions and not regions[t.name].is_whole}
        plan = CopyPlan(table, tuple(targets)).shard(own)
        parts = [
            SourcePart(number, region)
            for number, source in enumerate(group.sources)
            for region in (self._regions[self._divisions[source]] if source in self._divisions else ())
        ]
        moves = [_Moves([], []) for _ in targets]
        for unit in units_of(transfers_of(plan_from_parts(plan, parts)).moves, self._unit_bytes):
            for move in unit:
                moves[move.target].parts.append(move.part)
                moves[move.target].nbytes.append(move.nbytes)
        return moves


def _group_of(plan: CopyPlan, rows: Sequence[int], rows_of: Mapping[int, Sequence[int]]) -> _Group:
    numbers: dict[int, int] = {}
    reads = tuple(
        tuple(numbers.setdefault(source, len(numbers)) for source in plan.targets[row].sources) for row in rows
    )
    parts = tuple(row for source in numbers for row in rows_of.get(source, ()))
    return _Group(tuple(rows), tuple(numbers), reads, parts)


def _sharing_sources(plan: CopyPlan) -> list[list[int]]:
    """Return the rows of all targets, those that read a common source together."""
    groups: dict[int, list[int]] = {}
    group_of: dict[int, int] = {}
    for row, target in enumerate(plan.targets):
        joined = {group_of[source] for source in target.sources if source in group_of}
        groups[row] = sorted([row, *(other for group in joined for other in groups.pop(group))])
        group_of |= {source: row for member in groups[row] for source in plan.targets[member].sources}
    return list(groups.values())


def _by_rank(moves: _Moves, owners: Sequence[int], most_bytes: int) -> Iterator[dict[int, int]]:
    """Yield the bytes of each unit by the rank that sends them."""
    for start, end in pairwise((0, *_ends_of_units(moves.nbytes, most_bytes))):
        sizes: dict[int, int] = {}
        for part, nbytes in zip(moves.parts[start:end], moves.nbytes[start:end], strict=True):
            rank = owners[part]
            sizes[rank] = sizes.get(rank, 0) + nbytes
        yield sizes


def _ends_of_units(sizes: Sequence[int], most_bytes: int) -> list[int]:
    """Return the number of moves up to the end of each unit, as ``units_of`` divides moves that are cut already."""
    ends = []
    room = most_bytes
    for number, nbytes in enumerate(sizes):
        if number and nbytes > room:
            ends.append(number)
            room = most_bytes
        room -= nbytes
    return [*ends, len(sizes)] if sizes else []
