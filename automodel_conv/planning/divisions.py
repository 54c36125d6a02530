"""How ranks divide a target, stated as placements: one mesh, and for each of its dimensions a replica or a shard; pure.

The ranks divide the sources of the target. What each of them holds of the target is computed, and a division is stated
only if it gives each rank exactly that.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import permutations, product
from math import prod
from typing import NamedTuple

from automodel_conv.planning.views import HeldPart

Coordinate = tuple[int, ...]
"""A rank's index in each dimension of a mesh."""


class Division(NamedTuple):
    """A division of a tensor over a mesh, whose dimensions may be in another order than those of the ranks' mesh."""

    order: tuple[int, ...]
    """Dimensions of the ranks' mesh, outermost first."""
    sharded: tuple[int | None, ...]
    """The dimension of the tensor that each dimension of the mesh, in ``order``, splits; None: it holds replicas."""


def division_of(
    shape: Sequence[int],
    mesh_shape: Sequence[int],
    is_split: Sequence[bool],
    parts: Mapping[Coordinate, HeldPart | None],
) -> Division | None:
    """Return the division of a target that gives each rank the part that it holds; None if there is none.

    Shards are those of ``torch.chunk``: ``ceil(size / ranks)`` indices each, and fewer or none for the last ranks. If
    two dimensions of the mesh split one dimension, the outer one splits first.

    Args:
        shape: shape of the target.
        mesh_shape: shape of the mesh of the ranks.
        is_split: for each dimension of the mesh, whether it splits the source of the target.
        parts: the part that each rank of the mesh holds, by its coordinate.
    """
    for division in _candidates(len(shape), mesh_shape, is_split):
        if all(_holds(part, *chunk(shape, mesh_shape, division, at)) for at, part in parts.items()):
            return division
    return None


def chunk(
    shape: Sequence[int], mesh_shape: Sequence[int], division: Division, coordinate: Coordinate
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the first index and the shape of the part of a tensor that a division gives to a rank."""
    start, lengths = [0] * len(shape), list(shape)
    for axis, dim in zip(division.order, division.sharded, strict=True):
        if dim is not None:
            most = -(-lengths[dim] // mesh_shape[axis])
            before = min(most * coordinate[axis], lengths[dim])
            start[dim] += before
            lengths[dim] = min(most, lengths[dim] - before)
    return tuple(start), tuple(lengths)


def whole_holders(shape: Sequence[int], parts: Mapping[Coordinate, HeldPart | None]) -> list[Coordinate]:
    """Return the coordinates of the ranks that hold all of a target, if every other rank holds nothing of it; or []."""
    if not prod(shape):
        return [*parts]
    holders = {at: part for at, part in parts.items() if part is None or prod(part.shape)}
    hold_all = all(part is not None and part.shape == tuple(shape) for part in holders.values())
    return [*holders] if hold_all else []


def _candidates(rank: int, mesh_shape: Sequence[int], is_split: Sequence[bool]) -> Iterator[Division]:
    """Yield all divisions that split a tensor by the same dimensions of the mesh, the mesh's own order first."""
    for order in permutations(range(len(mesh_shape))):
        choices = [range(rank) if is_split[axis] and mesh_shape[axis] > 1 else (None,) for axis in order]
        for sharded in product(*choices):
            yield Division(order, sharded)


def _holds(part: HeldPart | None, start: tuple[int, ...], lengths: tuple[int, ...]) -> bool:
    if part is None:
        return False
    if not prod(lengths):
        return not prod(part.shape)
    return (part.start, part.shape) == (start, lengths)
