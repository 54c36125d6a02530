"""The rank that sends each part of a tensor: one owner among the ranks that hold the part; pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from math import prod
from typing import NamedTuple

from automodel_conv.planning.parts_of_sources import SourcePart
from automodel_conv.planning.regions import Region


class OwnedPart(NamedTuple):
    """A part of a tensor, and the rank that sends it to all that need it."""

    part: SourcePart
    holders: tuple[int, ...]
    """The ranks that hold it."""
    owner: int
    start: int
    """First element of the part in the tensors of its holders, in which its elements are adjacent."""


def owned_parts(
    held: Sequence[Mapping[Region, Sequence[int]]], itemsizes: Sequence[int], least_bytes: int
) -> list[OwnedPart]:
    """Return all parts of tensors, each with one owner; ranks that hold the same share it evenly.

    A part that several ranks hold is cut into as many, unless these are smaller than ``least_bytes``. Each rank owns as
    many bytes of such parts as possible without owning more than others.

    Args:
        held: for each tensor, the ranks that hold each region of it.
        itemsizes: bytes of an element of each tensor.
        least_bytes: bytes for which a message of its own is worthwhile.
    """
    loads: dict[int, int] = {}
    owned = []
    for source, (regions, itemsize) in enumerate(zip(held, itemsizes, strict=True)):
        for region, ranks in regions.items():
            nbytes = prod(region.local_shape) * itemsize
            count = min(len(ranks), max(1, nbytes // least_bytes))
            for piece, start in _cut(region, count):
                owner = min(ranks, key=lambda rank: loads.get(rank, 0))
                loads[owner] = loads.get(owner, 0) + prod(piece.local_shape) * itemsize
                owned.append(OwnedPart(SourcePart(source, piece), tuple(ranks), owner, start))
    return owned


def _cut(region: Region, count: int) -> list[tuple[Region, int]]:
    """Return a region in at most ``count`` parts that follow each other in memory, each with its first element."""
    shape = region.local_shape
    dim = next((dim for dim, size in enumerate(shape) if size > 1), None)
    if count == 1 or dim is None:
        return [(region, 0)]
    count, rest = min(count, shape[dim]), prod(shape[dim + 1 :])
    bounds = [number * shape[dim] // count for number in range(count + 1)]
    parts = []
    for first, last in pairwise(bounds):
        runs = (*region.runs[:dim], _between(region.runs[dim], first, last), *region.runs[dim + 1 :])
        parts.append((region._replace(runs=runs), first * rest))
    return parts


def _between(runs: Sequence[tuple[int, int]], first: int, last: int) -> tuple[tuple[int, int], ...]:
    """Return the indices at the places ``first`` to ``last`` of the indices that runs name."""
    cut, place = [], 0
    for start, length in runs:
        low, high = max(first - place, 0), min(last - place, length)
        if low < high:
            cut.append((start + low, high - low))
        place += length
    return tuple(cut)
