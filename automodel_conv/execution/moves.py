"""Which kernel carries out which strided copy: integers in, integers out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from automodel_conv.planning.copies import StridedCopy

Verb = Literal["strided_copy", "transpose", "interleave", "deinterleave"]

# Beyond this many matrices for one copy, they are too small for tiles to be worth it, and their table too large.
_MOST_MATRICES = 1 << 16


class Places(NamedTuple):
    """Where one operand of each matrix starts, in elements; ``ordinals`` say of which source."""

    ordinals: np.ndarray
    offsets: np.ndarray


class Moves(NamedTuple):
    """Equal matrices for one verb.

    ``shape`` is that of a source as the verb takes it, for ``deinterleave`` ``[R, 2C]``. Strides are a row's, in
    elements. ``ordinals`` of targets mean nothing.
    """

    verb: Verb
    shape: tuple[int, int]
    source_stride: int
    target_stride: int
    sources: tuple[Places, ...]
    targets: tuple[Places, ...]


class _Dim(NamedTuple):
    size: int
    source: int
    target: int


def moves_of(copy: StridedCopy) -> Moves | None:
    """The kernel moves that carry out a copy; None where no kernel fits its strides.

    Where both sides walk fastest along one dimension with stride 1, that is ``strided_copy``; where they walk along
    two, ``transpose``. Two of the latter that fill each other's gaps in steps of 2, on either side, are ``interleave``
    or ``deinterleave``. Further dimensions become matrices of their own.
    """
    dims = [_Dim(*dim) for dim in zip(copy.shape, copy.source_strides, copy.target_strides, strict=True) if dim[0] != 1]
    places = np.array([copy.ordinals, copy.source_offsets, copy.target_offsets], np.int64).reshape(3, -1)
    lanes = _lanes(dims)
    if lanes is None:
        return _moves(dims, places)
    # Never as matrices two elements wide: torch is faster then.
    return _moves([dim for dim in dims if dim is not lanes], _spread(places, lanes))


def _moves(dims: Sequence[_Dim], places: np.ndarray) -> Moves | None:
    dims = dims or [_Dim(1, 1, 1)]
    # A stride of 0 repeats an element, which is not walking.
    by_source = min(dims, key=lambda dim: (dim.source == 0, dim.source))
    by_target = min(dims, key=lambda dim: dim.target)
    steps = by_source.source, by_target.target
    if by_source is by_target:
        rows = max((dim for dim in dims if dim is not by_source), key=lambda dim: dim.size, default=_Dim(1, 0, 0))
        verb = "strided_copy" if steps == (1, 1) else None
    else:
        rows = by_target
        verb = _TRANSPOSING.get(steps)
    if verb is None:
        return None
    for dim in dims:
        if dim is not by_source and dim is not rows:
            if places.shape[1] * dim.size > _MOST_MATRICES:
                return None
            places = _spread(places, dim)
    shape = (rows.size, by_source.size)
    if verb == "strided_copy":
        return Moves(verb, shape, rows.source, rows.target, *_single(places))
    if verb == "transpose":
        return Moves(verb, shape, rows.source, by_source.target, *_single(places))
    return _paired(verb, rows, by_source, places)


# By the steps, in elements, in which the source walks its fastest dimension, and the target its own.
_TRANSPOSING: dict[tuple[int, int], Verb] = {(1, 1): "transpose", (1, 2): "interleave", (2, 1): "deinterleave"}


def _lanes(dims: Sequence[_Dim]) -> _Dim | None:
    """The dimension of two lanes that alternate on one side, if there is one."""
    for dim in dims:
        for side in (1, 2):
            if dim.size == 2 and dim[side] == 1 and any(other[side] == 2 for other in dims):
                return dim
    return None


def _spread(places: np.ndarray, dim: _Dim) -> np.ndarray:
    """Each place once for each index of a dimension."""
    steps = np.array([[0], [dim.source], [dim.target]])[:, None] * np.arange(dim.size)
    return (places[:, :, None] + steps).reshape(3, -1)


def _single(places: np.ndarray) -> tuple[tuple[Places], tuple[Places]]:
    return (Places(places[0], places[1]),), (Places(places[0], places[2]),)


def _paired(verb: Verb, rows: _Dim, columns: _Dim, places: np.ndarray) -> Moves | None:
    """Places as pairs of which the second starts one element after the first, on the side that alternates."""
    if verb == "interleave":
        places = places[:, np.argsort(places[2], kind="stable")]
    else:
        places = places[:, np.lexsort((places[1], places[0]))]
    first, second = places[:, 0::2], places[:, 1::2]
    if first.shape != second.shape:
        return None
    if verb == "interleave":
        if (second[2] != first[2] + 1).any():
            return None
        sources, targets = (Places(*first[:2]), Places(*second[:2])), (Places(first[0], first[2]),)
        return Moves(verb, (rows.size, columns.size), rows.source, columns.target, sources, targets)
    if (second[0] != first[0]).any() or (second[1] != first[1] + 1).any():
        return None
    sources = (Places(*first[:2]),)
    targets = (Places(first[0], first[2]), Places(second[0], second[2]))
    return Moves(verb, (rows.size, 2 * columns.size), rows.source, columns.target, sources, targets)
