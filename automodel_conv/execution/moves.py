"""Which verb carries out equal strided copies: integers in, integers out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from automodel_conv.kernels.verb import Matrix, Verb
from automodel_conv.planning.boxes import Box

# Beyond this many matrices for one copy, they are too small for tiles to be worth it, and their table too large.
_MOST_MATRICES = 1 << 16


class CopyGeometry(NamedTuple):
    """What equal copies have in common."""

    box: Box
    source_itemsize: int
    target_itemsize: int


class Addresses(NamedTuple):
    """Where copies start, in bytes, and which of the copies given each belongs to."""

    copies: np.ndarray  # int64 [n]
    sources: np.ndarray  # likewise
    targets: np.ndarray


class VerbCall(NamedTuple):
    """Equal matrices for one verb, as columns of addresses of its operands, and the places without partners.

    A lone place has no partners to interleave with; it is a copy of ``unpaired_geometry``.
    """

    verb: Verb
    matrix: Matrix
    sources: tuple[np.ndarray, ...]
    targets: tuple[np.ndarray, ...]
    unpaired: Addresses
    unpaired_geometry: CopyGeometry


class _Dim(NamedTuple):
    size: int
    source: int
    target: int


def choose_verb(form: CopyGeometry, sources: np.ndarray, targets: np.ndarray, verbs: Sequence[Verb]) -> VerbCall | None:
    """The kernel moves that carry out equal copies; None where no verb walks as they do.

    A verb is found by how both sides walk along the dimension that is fastest there: whether that is the same one, and
    by which steps. For a verb that weaves several operands together, copies that fill each other's gaps go together;
    those that find no partners are lone. Further dimensions become matrices of their own.

    Args:
        sources, targets: int64 ``[n]``, the address of the first element that each copy reads and writes, in bytes.
    """
    dims = [_Dim(*dim) for dim in zip(*form.box, strict=True) if dim[0] != 1]
    places = Addresses(np.arange(len(sources)), sources, targets)
    lanes = _lanes(dims, {max(verb.sources, verb.destinations) for verb in verbs} - {1})
    if lanes is not None:
        # Never as matrices two elements wide: torch is faster then.
        places = _spread(places, lanes, form)
        dims.remove(lanes)
    dims = dims or [_Dim(1, 1, 1)]
    # A stride of 0 repeats an element, which is not walking.
    by_source = min(dims, key=lambda dim: (dim.source == 0, dim.source))
    by_target = min(dims, key=lambda dim: dim.target)
    transposes = by_source is not by_target
    rows = by_target
    if not transposes:
        rows = max((dim for dim in dims if dim is not by_source), key=lambda dim: dim.size, default=_Dim(1, 0, 0))
    walk = transposes, (by_source.source, by_target.target)
    verb = next((verb for verb in verbs if (verb.transposes, verb.steps) == walk), None)
    if verb is None:
        return None
    for dim in dims:
        if dim is not by_source and dim is not rows:
            if len(places.copies) * dim.size > _MOST_MATRICES * len(sources):
                return None
            places = _spread(places, dim, form)
    box = Box((rows.size, by_source.size), (rows.source, by_source.source), (rows.target, by_source.target))
    matrix = Matrix(rows.size, by_source.size, rows.source, (by_source if transposes else rows).target)
    if verb.sources > 1:
        lots, unpaired = _runs_of_neighbours(places, places.targets, form.target_itemsize, verb.sources)
    else:
        lots, unpaired = _runs_of_neighbours(places, places.sources, form.source_itemsize, verb.destinations)
    return VerbCall(
        verb,
        matrix,
        tuple(lot.sources for lot in lots[: verb.sources]),
        tuple(lot.targets for lot in lots[: verb.destinations]),
        unpaired,
        form._replace(box=box),
    )


def _lanes(dims: Sequence[_Dim], counts: Iterable[int]) -> _Dim | None:
    """A dimension whose size is one of ``counts`` and whose elements alternate on one side; None if there is none."""
    for dim in dims:
        for side in (1, 2):
            if dim.size in counts and dim[side] == 1 and any(other[side] == dim.size for other in dims):
                return dim
    return None


def _spread(places: Addresses, dim: _Dim, form: CopyGeometry) -> Addresses:
    """Each place once for each index of a dimension."""
    steps = np.array([[0], [dim.source * form.source_itemsize], [dim.target * form.target_itemsize]])
    return Addresses(*(np.stack(places)[:, :, None] + steps[:, None] * np.arange(dim.size)).reshape(3, -1))


def _runs_of_neighbours(
    places: Addresses, addresses: np.ndarray, itemsize: int, count: int
) -> tuple[list[Addresses], Addresses]:
    """Group places into lots of ``count`` neighbours, each one element after the last; returns lots and leftovers.

    >>> places = Addresses(*np.array([[0, 1, 2], [0, 0, 0], [32, 4, 6]]))
    >>> (first, second), unpaired = _runs_of_neighbours(places, places.targets, 2, 2)
    >>> first.copies.tolist(), second.copies.tolist(), unpaired.copies.tolist()
    ([1], [2], [0])
    """
    if count == 1:
        return [places], Addresses(*(column[:0] for column in places))
    order = np.argsort(addresses, kind="stable")
    index = np.arange(len(order))
    follows = np.diff(addresses[order], prepend=-1 - itemsize) == itemsize
    run_start = np.maximum.accumulate(np.where(follows, 0, index))
    # In a run of neighbours each one that has as many before it as it takes ends a lot.
    ends = index[(index - run_start) % count == count - 1]
    chosen = [ends - before for before in reversed(range(count))]
    unpaired = np.setdiff1d(index, np.concatenate(chosen))
    *lots, unpaired = (Addresses(*(column[order[which]] for column in places)) for which in (*chosen, unpaired))
    return lots, unpaired
