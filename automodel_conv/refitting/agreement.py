"""Exchange between the ranks of a refit: their roles, and the parts of tensors that the trainer's ranks hold."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Any, NamedTuple

from automodel_conv.distributed.collectives import all_gather_bytes, all_or_raise
from automodel_conv.dtypes import itemsize
from automodel_conv.errors import CoverageError, NameProblems, RankError, UnsupportedError, listing, message
from automodel_conv.planning.boxes import find_overlap
from automodel_conv.planning.copies import SourceTable, Target
from automodel_conv.planning.plan import CopyPlan
from automodel_conv.planning.regions import Region
from automodel_conv.refitting.held import Trained
from automodel_conv.refitting.owners import OwnedPart, owned_parts


class Roles(NamedTuple):
    """The ranks of a group that send and that receive, in order."""

    senders: tuple[int, ...]
    receivers: tuple[int, ...]

    @property
    def has_both(self) -> bool:
        """Whether a rank sends and receives."""
        return not set(self.senders).isdisjoint(self.receivers)


class Own(NamedTuple):
    """Statement of a rank before anything is planned."""

    rank: int
    sends: bool
    receives: bool
    bucket_bytes: int
    device: str
    """Type of the device of its tensors."""
    num_experts: int
    """One more than the largest number of an expert that its plain tensors hold; 0 without such."""


class Agreed(NamedTuple):
    """Facts that all ranks know of each other before anything is planned."""

    roles: Roles
    num_experts: int


def agree(groups: Sequence[Any], own: Own) -> Agreed:
    """Exchange the roles of all ranks.

    Raises:
        UnsupportedError: no rank sends, or none receives; or the ranks differ in an argument or in the kind of device.
        RankError: a rank no longer responds.
    """
    ranks = sorted(Own(*json.loads(data)) for data in all_gather_bytes(groups, json.dumps(own).encode(), "a refit"))
    for field, what, do in (
        ("bucket_bytes", "the ranks of a refit have different buckets", "pass the same bucket_bytes= on all ranks"),
        ("device", "the ranks of a refit have tensors on different kinds of devices", "move the modules to one kind"),
    ):
        values = {getattr(rank, field) for rank in ranks}
        if len(values) > 1:
            found = "\n" + listing(f"rank {rank.rank}: {getattr(rank, field)}" for rank in ranks)
            raise UnsupportedError(message(what, found=found, do=do))
    senders = tuple(rank.rank for rank in ranks if rank.sends)
    receivers = tuple(rank.rank for rank in ranks if rank.receives)
    for found, word in ((senders, "sends=True"), (receivers, "sends=False")):
        if not found:
            raise UnsupportedError(
                message(
                    f"no rank of the refit has {word}",
                    expected="ranks of the trainer with sends=True, and ranks of the engine with sends=False",
                    found=f"{len(ranks)} ranks",
                    do="pass the group= that has both",
                )
            )
    return Agreed(Roles(senders, receivers), max(rank.num_experts for rank in ranks))


@dataclass(frozen=True)
class Published:
    """The whole tensors of a trainer, the parts that its ranks hold, and the plan to the checkpoint's names."""

    plan: CopyPlan
    """From the trainer's whole tensors to the tensors of the checkpoint."""
    parts: tuple[OwnedPart, ...]
    """All parts of these tensors, each with its owner."""
    layout: str | None
    """Layout of the experts that the checkpoint keeps grouped; None if there are none, or if it is unknown."""


def publish(groups: Sequence[Any], rank: int, own: Trained | None, least_bytes: int) -> Published:
    """Exchange what the trainer's ranks hold; the result is the same on all ranks.

    Ranks may hold different tensors, as the stages of a pipeline do.

    Args:
        groups: see ``all_or_raise``.
        rank: number of this rank in its group.
        own: what this rank holds; None if it does not send.
        least_bytes: see ``owned_parts``.

    Raises:
        NameProblems: ranks have a tensor of different dtypes or shapes, or publish a name in different ways.
        CoverageError: the ranks do not hold all of a tensor.
        RankError: a rank no longer responds.
    """
    text = "" if own is None else own.plan.to_json()
    digest = "" if own is None else hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
    what = "exchanging what the trainer holds"
    described = all_gather_bytes(groups, _described(rank, digest, own), what)
    ranks = sorted((_Described(*json.loads(data)) for data in described), key=lambda each: each.rank)
    first = {each.plan: each.rank for each in reversed(ranks) if each.plan}
    # Ranks with equal plans are the rule, so only the first of them sends its plan.
    own_text = text if first.get(digest) == rank else ""
    texts = all_gather_bytes(groups, json.dumps([digest, own_text]).encode(), what)
    plans = {digest: CopyPlan.from_json(text) for digest, text in map(json.loads, texts) if text}
    with all_or_raise(groups, "planning a refit"):
        return _merged(
            [
                _Sender(each.rank, plans[each.plan], _regions(each), each.layout, each.samples)
                for each in ranks
                if each.plan
            ],
            least_bytes,
        )


class _Described(NamedTuple):
    """Description of the tensors that a rank holds, as JSON."""

    rank: int
    plan: str
    """Digest of its plan; empty if the rank does not send."""
    regions: list[Any]
    """The distinct regions of its tensors."""
    column: list[int]
    """Number of the region of each source of its plan."""
    layout: str | None
    samples: dict[str, str]
    """See ``Held.samples``."""


def _described(rank: int, digest: str, own: Trained | None) -> bytes:
    if own is None:
        return json.dumps(_Described(rank, "", [], [], None, {})).encode()
    numbers: dict[Region, int] = {}
    column = [numbers.setdefault(region, len(numbers)) for region in own.held.regions.values()]
    return json.dumps(_Described(rank, digest, list(numbers), column, own.layout, own.held.samples())).encode()


def _regions(each: _Described) -> list[Region]:
    distinct = [
        Region(tuple(shape), tuple(tuple((start, length) for start, length in dim) for dim in runs))
        for shape, runs in each.regions
    ]
    return [distinct[number] for number in each.column]


class _Sender(NamedTuple):
    """A rank that sends."""

    rank: int
    plan: CopyPlan
    regions: Sequence[Region]
    """Region of each source of the plan that it holds."""
    layout: str | None
    samples: Mapping[str, str]


def _merged(ranks: Sequence[_Sender], least_bytes: int) -> Published:
    """Return the union of what ranks hold.

    Raises:
        NameProblems, CoverageError: see ``publish``.
    """
    rows: dict[str, int] = {}
    specs: list[tuple[str, tuple[int, ...]]] = []
    holders: list[dict[Region, list[int]]] = []
    targets: dict[str, Target] = {}
    rules: list[str] = []
    seen: set[int] = set()
    layouts = {each.layout for each in ranks if each.layout is not None}
    for number, plan, regions, _, _ in ranks:
        sources = plan.sources
        for name, dtype, shape, region in zip(sources.names, sources.dtypes, sources.shapes, regions, strict=True):
            row = rows.setdefault(name, len(rows))
            if row == len(specs):
                specs.append((dtype, shape))
                holders.append({})
            _refuse_other(name, number, specs[row], (dtype, shape))
            if prod(region.local_shape):
                holders[row].setdefault(region, []).append(number)
        if id(plan) in seen:
            continue
        seen.add(id(plan))
        for target in plan.targets:
            new = target._replace(
                sources=tuple(rows[sources.names[row]] for row in target.sources),
                rule=target.rule + len(rules) if target.rule >= 0 else -1,
            )
            old = targets.setdefault(target.name, new)
            if old._replace(rule=-1) != new._replace(rule=-1):
                raise NameProblems(
                    message(
                        f"ranks of the trainer make {target.name} in different ways",
                        found=f"rank {number} differs from an earlier one",
                        do="give the same tensors the same names on all ranks",
                    ),
                    duplicated=[(target.name, tuple(sources.names[row] for row in target.sources))],
                )
        rules += plan.rules
    names = list(rows)
    for name, (_, shape), held in zip(names, specs, holders, strict=True):
        _refuse_gaps(name, shape, held)
        for numbers in held.values():
            _refuse_other_values(
                name, {each.rank: each.samples[name] for each in ranks if each.rank in numbers and name in each.samples}
            )
    table = SourceTable(names, [dtype for dtype, _ in specs], [shape for _, shape in specs])
    parts = owned_parts(holders, [itemsize(dtype) for dtype, _ in specs], least_bytes)
    plan = CopyPlan(table, tuple(targets.values()), tuple(rules))
    layout = layouts.pop() if len(layouts) == 1 else None
    return Published(plan, tuple(parts), layout)


def _refuse_other(name: str, number: int, expected: tuple[Any, ...], found: tuple[Any, ...]) -> None:
    if expected != found:
        raise NameProblems(
            message(
                f"ranks of the trainer hold different tensors {name}",
                expected=f"{expected[0]} {list(expected[1])}, as on an earlier rank",
                found=f"{found[0]} {list(found[1])} on rank {number}",
                do="wrap parts as DTensors; name the experts of plain tensors with {experts=}",
            ),
            mismatched=[(name, found[1], expected[1])],
        )


def _refuse_gaps(name: str, shape: Sequence[int], held: Mapping[Region, Sequence[int]]) -> None:
    numel = sum(prod(region.local_shape) for region in held)
    if numel == prod(shape) and _are_disjoint(tuple(held), prod(shape)):
        return
    lines = (f"ranks {list(ranks)}: shape {list(region.local_shape)}" for region, ranks in held.items())
    raise CoverageError(
        message(
            f"the trainer's ranks do not hold all of {name}, or divide it in different ways",
            expected=f"{prod(shape)} elements, shape {list(shape)}, each in one part",
            found="\n" + listing([f"{numel} elements in different parts", *lines]),
            do="pass a group= with all ranks of the trainer; name the experts of plain tensors with {experts=}",
        )
    )


@lru_cache(maxsize=4096)
def _are_disjoint(regions: tuple[Region, ...], numel: int) -> bool:
    return find_overlap([piece.inverse() for region in regions for piece in region.pieces()], numel) is None


def _refuse_other_values(name: str, samples: Mapping[int, str]) -> None:
    """Refuse plain tensors of grouped experts that look like replicas and are not."""
    if len(set(samples.values())) > 1:
        first, *others = samples
        other = next(rank for rank in others if samples[rank] != samples[first])
        raise RankError(
            message(
                f"ranks hold different values of {name}, as if each had experts of its own",
                found=f"rank {first} and rank {other} differ",
                do="name the experts of each rank with {experts=}, or make replicas equal",
            )
        )
