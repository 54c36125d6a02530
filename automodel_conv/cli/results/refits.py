"""The result of ``refit-plan``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

import msgspec

from automodel_conv.cli.results.result import Result, filled

if TYPE_CHECKING:
    from automodel_conv.cli.refit_plan import RefitPlan


class Link(msgspec.Struct, frozen=True):
    """The bytes that one rank sends to another."""

    sender: int
    """Rank that sends."""
    receiver: int
    """Rank that receives."""
    nbytes: int
    """Bytes of one refit."""


class Divided(msgspec.Struct, frozen=True):
    """Tensors of the engine that are divided in the same way."""

    division: Literal["experts", "intermediate", "rows", "heads", "columns", "vocabulary", "whole", "unknown"]
    """What is divided among the ranks."""
    modules: tuple[str, ...]
    """Last part of the names of their modules."""
    nbytes: int
    """Bytes of the whole tensors."""
    most_bytes: int
    """Most bytes that a rank holds of them."""


class RefitPlanned(Result, frozen=True):
    """The result of ``refit-plan``: the fields of a ``RefitForecast``."""

    senders: tuple[int, ...]
    """Ranks of the trainer."""
    receivers: tuple[int, ...]
    """Ranks of the engine."""
    bytes_sent: Mapping[int, int]
    """Bytes that each sender sends, by rank."""
    bytes_received: Mapping[int, int]
    """Bytes that each receiver receives, by rank."""
    imbalance: float
    """Bytes of the sender that sends most, as a multiple of the mean."""
    messages: int
    """Number of all messages."""
    rounds: int
    """Number of buckets that follow each other."""
    peak_extra_bytes: int
    """Bytes of the buckets of the rank that needs most."""
    links: tuple[Link, ...]
    """Bytes by sender and receiver, without empty links."""
    busiest_link: Link | None
    """The link with most bytes; null if nothing is sent."""
    left_out: tuple[str, ...]
    """Names of tensors that no rank of the engine needs."""
    divided: tuple[Divided, ...]
    """How the engine divides its tensors."""


def refit_planned(plan: RefitPlan) -> RefitPlanned:
    """Return the result of a forecast of a refit."""
    links = plan.forecast.links
    busiest = plan.busiest_link
    return filled(
        RefitPlanned,
        plan.forecast,
        links=tuple(Link(*link, nbytes) for link, nbytes in sorted(links.items())),
        busiest_link=None if busiest is None else Link(*busiest, links[busiest]),
        divided=tuple(filled(Divided, part, division=part.division.name.lower()) for part in plan.divided),
    )
