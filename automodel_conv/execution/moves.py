"""Choose the verb (``transpose``, ``interleave`` ...) that carries out equal strided copies; pure, integers only."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from automodel_conv.kernels.verb import Matrix, Verb
from automodel_conv.planning.boxes import Box

# If a copy needs more matrices than this, they are too small for tiles to pay off, and their table is too large.
_MOST_MATRICES = 1 << 16


class CopyGeometry(NamedTuple):
    """The geometry that equal copies share: their box, and the bytes of an element on both sides."""

    box: Box
    source_itemsize: int
    target_itemsize: int


class Addresses(NamedTuple):
    """Places where matrices start, and the copies that they are parts of, in int64 columns ``[n]``."""

    copies: np.ndarray
    """Index of the copy, among those that were passed in."""
    sources: np.ndarray
    """Address in the source, in bytes."""
    targets: np.ndarray
    """Address in the target, in bytes."""


class VerbCall(NamedTuple):
    """A call of a verb that carries out equal copies, and the matrices that it cannot carry out.

    A verb that interleaves needs groups of neighbouring matrices. A matrix without neighbours is unpaired, and is left
    to torch as a copy of ``unpaired_geometry``.
    """

    verb: Verb
    matrix: Matrix
    """Sides and strides of all matrices."""
    sources: tuple[np.ndarray, ...]
    """Addresses in bytes for each source operand of the verb, int64 ``[n]``."""
    targets: tuple[np.ndarray, ...]
    """Addresses in bytes for each destination operand of the verb, int64 ``[n]``."""
    unpaired: Addresses
    unpaired_geometry: CopyGeometry


class _Dim(NamedTuple):
    """A dimension of a box: its size, and its strides in elements."""

    size: int
    source: int
    target: int


def choose_verb(
    geometry: CopyGeometry, sources: np.ndarray, targets: np.ndarray, verbs: Sequence[Verb]
) -> VerbCall | None:
    """Return the call of a verb that carries out equal copies, or None if no verb moves elements in this way.

    The verb depends on the fastest dimension of each side: whether it is the same one, and the stride along it. A verb
    that interleaves several operands needs copies that fill each other's gaps; those without neighbours are unpaired.
    Further dimensions become separate matrices.

    Args:
        geometry: the geometry of the copies.
        sources, targets: the address of the first element that each copy reads and writes, in bytes, int64 ``[n]``.
        verbs: the verbs to choose from, in order of preference.
    """
    dims = [_Dim(*dim) for dim in zip(*geometry.box, strict=True) if dim[0] != 1]
    places = Addresses(np.arange(len(sources)), sources, targets)
    lanes = _lanes(dims, {max(verb.sources, verb.destinations) for verb in verbs} - {1})
    if lanes is not None:
        # The lanes become separate matrices, not matrices two elements wide, for which torch is faster.
        places = _spread(places, lanes, geometry)
        dims.remove(lanes)
    dims = dims or [_Dim(1, 1, 1)]
    # A stride of 0 repeats an element, so such a dimension is the last choice.
    by_source = min(dims, key=lambda dim: (dim.source == 0, dim.source))
    by_target = min(dims, key=lambda dim: dim.target)
    transposes = by_source is not by_target
    rows = by_target
    if not transposes:
        rows = max((dim for dim in dims if dim is not by_source), key=lambda dim: dim.size, default=_Dim(1, 0, 0))
    steps = by_source.source, by_target.target
    verb = next((verb for verb in verbs if (verb.transposes, verb.steps) == (transposes, steps)), None)
    if verb is None:
        return None
    for dim in dims:
        if dim is not by_source and dim is not rows:
            if len(places.copies) * dim.size > _MOST_MATRICES * len(sources):
                return None
            places = _spread(places, dim, geometry)
    box = Box((rows.size, by_source.size), (rows.source, by_source.source), (rows.target, by_source.target))
    matrix = Matrix(rows.size, by_source.size, rows.source, (by_source if transposes else rows).target)
    if verb.sources > 1:
        operands, unpaired = _pair_neighbours(places, places.targets, geometry.target_itemsize, verb.sources)
    else:
        operands, unpaired = _pair_neighbours(places, places.sources, geometry.source_itemsize, verb.destinations)
    return VerbCall(
        verb,
        matrix,
        tuple(operand.sources for operand in operands[: verb.sources]),
        tuple(operand.targets for operand in operands[: verb.destinations]),
        unpaired,
        geometry._replace(box=box),
    )


def _lanes(dims: Sequence[_Dim], counts: Iterable[int]) -> _Dim | None:
    """Return a dimension that has a size in ``counts`` and alternates with another one on one side, or None."""
    for dim in dims:
        for side in (1, 2):
            if dim.size in counts and dim[side] == 1 and any(other[side] == dim.size for other in dims):
                return dim
    return None


def _spread(places: Addresses, dim: _Dim, geometry: CopyGeometry) -> Addresses:
    """Repeat each place for each index of a dimension."""
    steps = np.array([[0], [dim.source * geometry.source_itemsize], [dim.target * geometry.target_itemsize]])
    return Addresses(*(np.stack(places)[:, :, None] + steps[:, None] * np.arange(dim.size)).reshape(3, -1))


def _pair_neighbours(
    places: Addresses, addresses: np.ndarray, itemsize: int, count: int
) -> tuple[list[Addresses], Addresses]:
    """Group places into sets of ``count`` neighbours, with addresses one element apart.

    Returns:
        The first places of all sets, the second ones and so on; and the places that are in no set.

    Example:
        >>> places = Addresses(*np.array([[0, 1, 2], [0, 0, 0], [32, 4, 6]]))
        >>> (first, second), unpaired = _pair_neighbours(places, places.targets, 2, 2)
        >>> first.copies.tolist(), second.copies.tolist(), unpaired.copies.tolist()
        ([1], [2], [0])
    """
    if count == 1:
        return [places], Addresses(*(column[:0] for column in places))
    order = np.argsort(addresses, kind="stable")
    index = np.arange(len(order))
    follows = np.diff(addresses[order], prepend=-1 - itemsize) == itemsize
    run_start = np.maximum.accumulate(np.where(follows, 0, index))
    # Each run of neighbours is cut into sets from its start; a set ends at every ``count``-th place of the run.
    ends = index[(index - run_start) % count == count - 1]
    chosen = [ends - before for before in reversed(range(count))]
    unpaired = np.setdiff1d(index, np.concatenate(chosen))
    *operands, unpaired = (Addresses(*(column[order[which]] for column in places)) for which in (*chosen, unpaired))
    return operands, unpaired
