"""The plan of a refit on one rank: what it sends and receives in each round."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from automodel_conv.distributed.collectives import all_gather_bytes, all_or_raise
from automodel_conv.distributed.point_to_point import exchange_bytes
from automodel_conv.errors import UnsupportedError, message
from automodel_conv.planning.parts_of_sources import plan_from_parts
from automodel_conv.planning.plan import CopyPlan
from automodel_conv.refitting.agreement import Published, Roles
from automodel_conv.refitting.costs import RefitForecast, forecast_of
from automodel_conv.refitting.engine import Engine
from automodel_conv.refitting.messages import orders, received, sent
from automodel_conv.refitting.running import OwnCopy, Work
from automodel_conv.schedule.rounds import Bucket, Units, bucket_of, rounds_of, sizes_by_round
from automodel_conv.schedule.transfers import Move, Repeat, by_owner, transfers_of, units_of


class Incoming(NamedTuple):
    """Elements that one rank of the engine takes, and where they come from."""

    plan: CopyPlan
    """From the parts that ranks of the trainer hold to the tensors of this rank."""
    units: list[dict[int, list[Move]]]
    """Moves of each unit by the rank that sends them."""
    starts: list[int]
    """First element of each part in the tensors of its holders."""
    own: list[Move]
    """Moves from parts that this rank holds itself."""
    repeats: list[Repeat]
    unused: tuple[str, ...]
    """Names of the tensors of the checkpoint that this rank needs nothing of."""

    def sizes(self) -> Units:
        """Return the bytes of each unit by the rank that sends them."""
        sizes = Units()
        for unit in self.units:
            sizes.append({rank: sum(move.nbytes for move in moves) for rank, moves in unit.items()})
        return sizes


def incoming(published: Published, engine: Engine, rank: int, unit_bytes: int) -> Incoming:
    """Return what a rank of the engine takes; proves that each element is written exactly once.

    Args:
        published: what the trainer's ranks hold.
        engine: what this rank has to fill.
        rank: number of this rank.
        unit_bytes: most bytes of a unit.

    Raises:
        UnsupportedError: strided copies cannot fill a parameter from the parts of the trainer.
        CoverageError: an element would not be written exactly once.
    """
    regions = {name: region for name, region in engine.held.regions.items() if not region.is_whole}
    whole = published.plan.then(engine.plan).shard(regions)
    parts = published.parts
    plan = plan_from_parts(whole, [each.part for each in parts])
    moves, repeats = transfers_of(plan)
    own = [move for move in moves if rank in parts[move.part].holders]
    others = [move for move in moves if rank not in parts[move.part].holders]
    owners = [each.owner for each in parts]
    units = [by_owner(unit, owners) for unit in units_of(others, unit_bytes)]
    return Incoming(plan, units, [each.start for each in parts], own, repeats, engine.plan.left_out)


def bucket_for(bucket_bytes: int, roles: Roles) -> Bucket:
    """Return the capacity of the buckets of all ranks.

    Raises:
        UnsupportedError: ``bucket_bytes`` is too small for a message with each rank.
    """
    senders, receivers = map(len, roles)
    bucket = bucket_of(bucket_bytes, senders, receivers, roles.has_both)
    if bucket is None:
        raise UnsupportedError(
            message(
                "bucket_bytes= is too small",
                expected="room for a message with each rank",
                found=f"{bucket_bytes} bytes for {senders} ranks that send and {receivers} that receive",
                do="pass some megabytes as {bucket_bytes=}; the default is 256 MiB",
            )
        )
    return bucket


class Planned(NamedTuple):
    """A refit on one rank."""

    work: Work
    forecast: RefitForecast


def planned(group: Any, rank: int, roles: Roles, bucket: Bucket, own: Incoming | None, device: torch.device) -> Planned:
    """Divide a refit into rounds, and tell the senders what to send; the same rounds on all ranks.

    Args:
        group: the process group; all of its ranks call this.
        rank: number of this rank.
        roles: what all ranks do.
        bucket: capacity of the buckets.
        own: what this rank takes; None if it does not receive.
        device: device that the group sends from.

    Raises:
        RankError: a rank no longer responds.
    """
    what = "planning a refit"
    stated = all_gather_bytes([group], _stated(rank, own), what)
    by_rank = {number: (units, unused) for number, units, unused in map(_parsed, stated)}
    units = [by_rank[receiver][0] for receiver in roles.receivers]
    used_by_none = set.intersection(*(set(by_rank[receiver][1]) for receiver in roles.receivers))
    rounds = rounds_of(units, roles.receivers, bucket.round_bytes)
    by_round = [] if own is None else [_joined(own.units[numbers.start : numbers.stop]) for numbers in rounds]
    ordered = exchange_bytes(group, {} if own is None else orders(own.plan, by_round, own.starts), device, what)
    with all_or_raise([group], what):
        sends = sent(ordered, len(rounds))
        if own is None:
            work = Work(sends, [[] for _ in rounds])
        else:
            names = [target.name for target in own.plan.targets]
            work = Work(
                sends,
                received(own.plan, by_round),
                tuple(_own_copy(own, move) for move in own.own),
                tuple(OwnCopy(names[r.first], names[r.target], r.piece) for r in own.repeats),
                tuple(target for target in own.plan.targets if target.fills),
            )
    left_out = tuple(name for name in by_rank[roles.receivers[0]][1] if name in used_by_none)
    return Planned(work, forecast_of(sizes_by_round(units, roles.receivers, rounds), *roles, left_out))


def _own_copy(own: Incoming, move: Move) -> OwnCopy:
    piece = move.piece._replace(source_offset=move.piece.source_offset + own.starts[move.part])
    return OwnCopy(own.plan.sources.names[move.part], own.plan.targets[move.target].name, piece)


def _stated(rank: int, own: Incoming | None) -> bytes:
    unused, units = ((), Units()) if own is None else (own.unused, own.sizes())
    return json.dumps([rank, unused]).encode() + b"\n" + units.to_bytes()


def _parsed(stated: bytes) -> tuple[int, Units, list[str]]:
    text, _, units = stated.partition(b"\n")
    rank, unused = json.loads(text)
    return rank, Units.from_bytes(units), unused


def _joined(units: Sequence[dict[int, list[Move]]]) -> dict[int, list[Move]]:
    """Return the moves of several units by the rank that sends them."""
    joined: dict[int, list[Move]] = {}
    for unit in units:
        for rank, moves in unit.items():
            joined.setdefault(rank, []).extend(moves)
    return joined
