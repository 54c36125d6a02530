"""Costs of a refit: its report, and the forecast before it runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from automodel_conv.errors import size_text
from automodel_conv.execution.report_text import Report, Row, cost_rows, count_row, memory_row
from automodel_conv.schedule.rounds import Sizes, offsets_in_bucket


@dataclass(frozen=True, repr=False)
class RefitReport(Report):
    """The outcome of a refit on one rank; ``print`` shows it.

    Attributes:
        bytes_sent: bytes that this rank sent to other processes.
        bytes_received: bytes that it received.
        messages: number of messages that it sent and received.
        seconds: duration of the refit on this rank.
        peak_extra_bytes: bytes of its buckets, which stay allocated for the next refit.
        left_out: names of tensors of the checkpoint that no rank of the engine needs.
        unchanged: names of buffers of the engine's module that a ``loader`` writes nothing to; they keep their values.

    Example:
        >>> report = RefitReport(bytes_sent=6000, bytes_received=0, messages=2, seconds=0.5, peak_extra_bytes=4096)
        >>> print(report)
        sent and received           6.0 kB
        speed                       12.00 kB/s
        messages                    2
        seconds                     0.500
        peak extra memory, at most  4.1 kB
        left out                    0
        unchanged                   0
    """

    bytes_sent: int
    bytes_received: int
    messages: int
    seconds: float
    peak_extra_bytes: int
    left_out: tuple[str, ...] = ()
    unchanged: tuple[str, ...] = ()

    @property
    def gb_per_s(self) -> float:
        """10^9 bytes sent and received per second."""
        return (self.bytes_sent + self.bytes_received) / self.seconds / 1e9 if self.seconds else 0.0

    def _rows(self) -> list[Row]:
        moved = self.bytes_sent + self.bytes_received
        return [
            *cost_rows("sent and received", moved, self.gb_per_s),
            Row("messages", str(self.messages)),
            Row("seconds", f"{self.seconds:.3f}"),
            memory_row(self.peak_extra_bytes),
            count_row("left out", self.left_out),
            count_row("unchanged", self.unchanged),
        ]


@dataclass(frozen=True, repr=False)
class RefitForecast(Report):
    """The cost of each call of a refit, known before the first; ``print`` shows it.

    It is the same on all ranks.

    Attributes:
        links: bytes of a refit by the rank that sends them and the rank that receives them, without empty links.
        messages: number of all messages.
        rounds: number of buckets that follow each other.
        peak_extra_bytes: bytes of the buckets of the rank that needs most.
        senders: ranks that send.
        receivers: ranks that receive.
        left_out: names of tensors of the checkpoint that no rank of the engine needs.

    Example:
        Two ranks send, and one receives:

        >>> forecast = RefitForecast(
        ...     {(0, 2): 4000, (1, 2): 2000}, messages=2, rounds=1, peak_extra_bytes=64, senders=(0, 1), receivers=(2,)
        ... )
        >>> forecast.bytes_sent, forecast.bytes_received, round(forecast.imbalance, 2)
        ({0: 4000, 1: 2000}, {2: 6000}, 1.33)
    """

    links: Mapping[tuple[int, int], int]
    messages: int
    rounds: int
    peak_extra_bytes: int
    senders: tuple[int, ...]
    receivers: tuple[int, ...]
    left_out: tuple[str, ...] = ()

    @property
    def bytes_sent(self) -> dict[int, int]:
        """Bytes that each sender sends to other processes."""
        return self._totals(0, self.senders)

    @property
    def bytes_received(self) -> dict[int, int]:
        """Bytes that each receiver receives from other processes."""
        return self._totals(1, self.receivers)

    @property
    def imbalance(self) -> float:
        """Bytes of the sender that sends most, as a multiple of the mean; 1 if all send the same."""
        sent = self.bytes_sent.values()
        return max(sent) * len(sent) / sum(sent) if sum(sent) else 1.0

    def _totals(self, end: int, ranks: Sequence[int]) -> dict[int, int]:
        totals = dict.fromkeys(ranks, 0)
        for link, nbytes in self.links.items():
            totals[link[end]] += nbytes
        return totals

    def _rows(self) -> list[Row]:
        sent, got = self.bytes_sent, self.bytes_received
        return [
            Row("senders", str(len(sent))),
            Row("receivers", str(len(got))),
            Row("sent in all", size_text(sum(sent.values()))),
            Row("sent by the busiest rank", size_text(max(sent.values(), default=0))),
            Row("received by the busiest rank", size_text(max(got.values(), default=0))),
            Row("sent on the busiest link", size_text(max(self.links.values(), default=0))),
            Row("imbalance of senders", f"{self.imbalance:.2f}"),
            Row("links", str(len(self.links))),
            Row("messages", str(self.messages)),
            Row("rounds", str(self.rounds)),
            memory_row(self.peak_extra_bytes),
            count_row("left out", self.left_out),
        ]


def forecast_of(
    rounds: Sequence[Sizes], senders: Sequence[int], receivers: Sequence[int], left_out: Sequence[str] = ()
) -> RefitForecast:
    """Return the forecast of a refit from the size of each message of each round."""
    links: dict[tuple[int, int], int] = {}
    buckets: dict[tuple[int, int], int] = {}
    for messages in rounds:
        by_rank: dict[tuple[int, int], dict[int, int]] = {}
        for (sender, receiver), nbytes in messages.items():
            links[sender, receiver] = links.get((sender, receiver), 0) + nbytes
            by_rank.setdefault((0, sender), {})[receiver] = nbytes
            by_rank.setdefault((1, receiver), {})[sender] = nbytes
        for key, sizes in by_rank.items():
            buckets[key] = max(buckets.get(key, 0), offsets_in_bucket(sizes)[1])
    extra: dict[int, int] = {}
    for (_, rank), nbytes in buckets.items():
        extra[rank] = extra.get(rank, 0) + nbytes * min(len(rounds), 2)
    return RefitForecast(
        links,
        sum(map(len, rounds)),
        len(rounds),
        max(extra.values(), default=0),
        tuple(senders),
        tuple(receivers),
        tuple(left_out),
    )
