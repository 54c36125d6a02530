"""The messages of one rank in the rounds of a refit, and the orders by which senders learn theirs."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from math import prod
from typing import Any, NamedTuple

from automodel_conv.dtypes import itemsize
from automodel_conv.planning.plan import CopyPlan
from automodel_conv.schedule.rounds import offsets_in_bucket
from automodel_conv.schedule.transfers import Move, message_of


class Run(NamedTuple):
    """Elements that lie next to each other in a message, and where they lie in a contiguous tensor."""

    tensor: str
    """Name of the tensor of this rank."""
    dtype: str
    """Dtype code of the elements in the message; a sender casts to it."""
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int
    """First element in the tensor."""

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * itemsize(self.dtype)


class Message(NamedTuple):
    """A message between this rank and another one."""

    rank: int
    """The other rank."""
    start: int
    """Offset in the bucket, in bytes."""
    nbytes: int
    runs: tuple[Run, ...]
    """The content, without gaps."""


Rounds = Sequence[Sequence[Message]]
"""The messages of each round."""


def messages_of(runs: Mapping[int, Sequence[Run]]) -> list[Message]:
    """Return the messages of a round, each at its place in the bucket.

    Args:
        runs: runs of the message with each rank, in order.
    """
    sizes = {rank: sum(run.nbytes for run in own) for rank, own in runs.items()}
    offsets, _ = offsets_in_bucket(sizes)
    return [Message(rank, offsets[rank], sizes[rank], tuple(runs[rank])) for rank in sorted(runs)]


def bucket_bytes(rounds: Rounds) -> int:
    """Return the bytes of the bucket that the messages of any round need."""
    return max((offsets_in_bucket({m.rank: m.nbytes for m in messages})[1] for messages in rounds), default=0)


def received(plan: CopyPlan, rounds: Iterable[Mapping[int, Sequence[Move]]]) -> list[list[Message]]:
    """Return the messages that a receiver gets in each round.

    Args:
        plan: the plan whose targets it fills.
        rounds: for each round, the moves by the rank that sends them.
    """
    return [
        messages_of(
            {rank: [_written(plan, placed.move) for placed in message_of(moves)[0]] for rank, moves in r.items()}
        )
        for r in rounds
    ]


def _written(plan: CopyPlan, move: Move) -> Run:
    target = plan.targets[move.target]
    box = move.piece.box
    return Run(target.name, target.dtype, box.shape, box.target_strides, move.piece.target_offset)


def orders(plan: CopyPlan, rounds: Sequence[Mapping[int, Sequence[Move]]], starts: Sequence[int]) -> dict[int, bytes]:
    """Return what a receiver orders of each rank: the content of the messages of all rounds, as JSON.

    Args:
        plan: the plan from parts of the trainer's tensors.
        rounds: for each round, the moves by the rank that sends them.
        starts: first element of each part in the tensor of the rank that sends it.
    """
    by_rank: dict[int, list[list[Any]]] = {}
    for number, messages in enumerate(rounds):
        for rank, moves in messages.items():
            runs = [_read(plan, placed.move, starts) for placed in message_of(moves)[0]]
            by_rank.setdefault(rank, []).append([number, runs])
    return {rank: json.dumps(rows).encode() for rank, rows in by_rank.items()}


def _read(plan: CopyPlan, move: Move, starts: Sequence[int]) -> Run:
    box, offset = move.piece.box, move.piece.source_offset + starts[move.part]
    return Run(plan.sources.names[move.part], plan.targets[move.target].dtype, box.shape, box.source_strides, offset)


def sent(orders: Mapping[int, bytes], count: int) -> list[list[Message]]:
    """Return the messages that a sender sends in each of ``count`` rounds.

    Args:
        orders: what each receiver ordered.
        count: number of rounds.
    """
    runs: list[dict[int, list[Run]]] = [{} for _ in range(count)]
    for rank, data in orders.items():
        for number, rows in json.loads(data):
            runs[number][rank] = [
                Run(name, dtype, tuple(shape), tuple(strides), offset) for name, dtype, shape, strides, offset in rows
            ]
    return [messages_of(own) for own in runs]
