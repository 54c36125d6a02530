"""The rounds of a refit: messages between ranks that are under way together; pure.

A receiver cuts what it receives into units. All ranks have the sizes of all units, and merge units of the same number
to rounds in the same way, so that no rank needs more memory for a round than a bucket has.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from typing import NamedTuple

ALIGNMENT = 16
"""Bytes to which messages in a bucket are aligned, so that kernels can use their widest loads."""

Sizes = Mapping[tuple[int, int], int]
"""Bytes by the ranks that send and receive them."""


class Units:
    """The bytes of each unit by the rank that sends them, in arrays: large meshes have millions of these numbers."""

    def __init__(self) -> None:
        self._ends, self._ranks, self._nbytes = array("q"), array("q"), array("q")

    def append(self, unit: Mapping[int, int]) -> None:
        """Add a unit."""
        self._ranks.extend(unit.keys())
        self._nbytes.extend(unit.values())
        self._ends.append(len(self._ranks))

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, number: int) -> dict[int, int]:
        own = slice(self._ends[number - 1] if number else 0, self._ends[number])
        return dict(zip(self._ranks[own], self._nbytes[own], strict=True))

    def to_bytes(self) -> bytes:
        """Return the units as bytes, from which ``from_bytes`` builds equal ones."""
        count = array("q", [len(self._ends)])
        return b"".join(column.tobytes() for column in (count, self._ends, self._ranks, self._nbytes))

    @classmethod
    def from_bytes(cls, data: bytes) -> Units:
        """Return the units that ``to_bytes`` wrote."""
        numbers = array("q")
        numbers.frombytes(data)
        count = numbers[0]
        entries = (len(numbers) - 1 - count) // 2
        units = cls()
        units._ends = numbers[1 : 1 + count]
        units._ranks = numbers[1 + count : 1 + count + entries]
        units._nbytes = numbers[1 + count + entries :]
        return units


class Bucket(NamedTuple):
    """Capacity of the buckets, and of the units that always fit into them."""

    round_bytes: int
    """Most bytes that a rank sends, or receives, in a round."""
    unit_bytes: int
    """Most bytes of a unit."""

    @property
    def least_bytes(self) -> int:
        """Bytes of a part of a unit for which a message of its own is worthwhile."""
        return max(1, self.unit_bytes // 64)


def bucket_of(bucket_bytes: int, senders: int, receivers: int, both: bool) -> Bucket | None:
    """Return the capacity of buckets of ``bucket_bytes``; None if they are too small.

    Args:
        bucket_bytes: bytes of the memory for a round.
        senders: number of ranks that send.
        receivers: number of ranks that receive.
        both: whether a rank does both, and so needs memory for both.
    """
    peers = max(senders, receivers)
    round_bytes = (bucket_bytes // 2 if both else bucket_bytes) - ALIGNMENT * peers
    unit_bytes = round_bytes // max(receivers, 1) // ALIGNMENT * ALIGNMENT
    return Bucket(round_bytes, unit_bytes) if unit_bytes >= ALIGNMENT else None


def rounds_of(units: Sequence[Units], receivers: Sequence[int], most_bytes: int) -> list[range]:
    """Return the numbers of the units in each round: as many as fit into ``most_bytes`` on every rank.

    Args:
        units: for each receiver, the bytes of each of its units by the rank that sends them.
        receivers: the rank of each receiver.
        most_bytes: most bytes that a rank sends, and most that it receives, in a round.
    """
    count = max(map(len, units), default=0)
    rounds: list[range] = []
    start = 0
    sent: dict[int, int] = {}
    received: dict[int, int] = {}
    for number in range(count):
        more_sent: dict[int, int] = {}
        more_received: dict[int, int] = {}
        for rank, own in zip(receivers, units, strict=True):
            for sender, nbytes in own[number].items() if number < len(own) else ():
                more_sent[sender] = more_sent.get(sender, 0) + nbytes
                more_received[rank] = more_received.get(rank, 0) + nbytes
        fits = all(
            loads.get(rank, 0) + nbytes <= most_bytes
            for loads, more in ((sent, more_sent), (received, more_received))
            for rank, nbytes in more.items()
        )
        if number > start and not fits:
            rounds.append(range(start, number))
            start, sent, received = number, {}, {}
        for loads, more in ((sent, more_sent), (received, more_received)):
            for rank, nbytes in more.items():
                loads[rank] = loads.get(rank, 0) + nbytes
    return [*rounds, range(start, count)] if count else []


def sizes_by_round(units: Sequence[Units], receivers: Sequence[int], rounds: Sequence[range]) -> list[Sizes]:
    """Return the size of each message of each round; see ``rounds_of``."""
    sizes: list[Sizes] = []
    for numbers in rounds:
        messages: dict[tuple[int, int], int] = {}
        for rank, own in zip(receivers, units, strict=True):
            for number in numbers[: max(0, len(own) - numbers.start)]:
                for sender, nbytes in own[number].items():
                    messages[sender, rank] = messages.get((sender, rank), 0) + nbytes
        sizes.append(messages)
    return sizes


def offsets_in_bucket(sizes: Mapping[int, int]) -> tuple[dict[int, int], int]:
    """Return the offset of the message with each rank in a bucket, and the bytes that all of them need."""
    offsets, offset = {}, 0
    for rank in sorted(sizes):
        offsets[rank] = offset
        offset += -(-sizes[rank] // ALIGNMENT) * ALIGNMENT
    return offsets, offset
