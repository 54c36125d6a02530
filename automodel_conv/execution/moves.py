"""Which kernel carries out equal strided copies: integers in, integers out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from automodel_conv.planning.boxes import Box

Verb = Literal["strided_copy", "transpose", "interleave", "deinterleave"]

# Beyond this many matrices for one copy, they are too small for tiles to be worth it, and their table too large.
_MOST_MATRICES = 1 << 16


class Form(NamedTuple):
    """What equal copies have in common."""

    box: Box
    source_itemsize: int
    target_itemsize: int


class Places(NamedTuple):
    """Where copies start, in bytes, and which of the copies given each belongs to."""

    copies: np.ndarray  # int64 [n]
    sources: np.ndarray  # likewise
    targets: np.ndarray


class Matrix(NamedTuple):
    """What a verb moves at each place: a shape and a row's stride on either side, in elements.

    ``shape`` is that of a source as the verb takes it, for ``deinterleave`` ``[R, 2C]``.
    """

    verb: Verb
    shape: tuple[int, int]
    source_stride: int
    target_stride: int


class Moves(NamedTuple):
    """Equal matrices for one verb: columns of addresses for its operands; and what no partner was found for.

    A lone place is a copy of ``lone_form``.
    """

    matrix: Matrix
    sources: tuple[np.ndarray, ...]
    targets: tuple[np.ndarray, ...]
    lone: Places
    lone_form: Form


class _Dim(NamedTuple):
    size: int
    source: int
    target: int


def moves_of(form: Form, sources: np.ndarray, targets: np.ndarray) -> Moves | None:
    """The kernel moves that carry out equal copies; None where no kernel fits their strides.

    Where both sides walk fastest along one dimension with stride 1, that is ``strided_copy``; where they walk along
    two, ``transpose``. Two of the latter that fill each other's gaps in steps of 2, on either side, are ``interleave``
    or ``deinterleave``, and those that find no partner are lone. Further dimensions become matrices of their own.

    Args:
        sources, targets: int64 ``[n]``, the address of the first element that each copy reads and writes, in bytes.
    """
    dims = [_Dim(*dim) for dim in zip(*form.box, strict=True) if dim[0] != 1]
    places = Places(np.arange(len(sources)), sources, targets)
    lanes = _lanes(dims)
    if lanes is not None:
        # Never as matrices two elements wide: torch is faster then.
        places = _spread(places, lanes, form)
        dims.remove(lanes)
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
            if len(places.copies) * dim.size > _MOST_MATRICES * len(sources):
                return None
            places = _spread(places, dim, form)
    shape = (rows.size, by_source.size)
    lone_form = form._replace(box=Box(shape, (rows.source, by_source.source), (rows.target, by_source.target)))
    none = Places(*(column[:0] for column in places))
    if verb == "strided_copy":
        matrix = Matrix(verb, shape, rows.source, rows.target)
        return Moves(matrix, (places.sources,), (places.targets,), none, lone_form)
    if verb == "transpose":
        matrix = Matrix(verb, shape, rows.source, by_source.target)
        return Moves(matrix, (places.sources,), (places.targets,), none, lone_form)
    if verb == "interleave":
        first, second, lone = _pairs(places, places.targets, form.target_itemsize)
        matrix = Matrix(verb, shape, rows.source, by_source.target)
        return Moves(matrix, (first.sources, second.sources), (first.targets,), lone, lone_form)
    first, second, lone = _pairs(places, places.sources, form.source_itemsize)
    matrix = Matrix(verb, (rows.size, 2 * by_source.size), rows.source, by_source.target)
    return Moves(matrix, (first.sources,), (first.targets, second.targets), lone, lone_form)


# By the steps, in elements, in which the source walks its fastest dimension, and the target its own.
_TRANSPOSING: dict[tuple[int, int], Verb] = {(1, 1): "transpose", (1, 2): "interleave", (2, 1): "deinterleave"}


def _lanes(dims: Sequence[_Dim]) -> _Dim | None:
    """The dimension of two lanes that alternate on one side, if there is one."""
    for dim in dims:
        for side in (1, 2):
            if dim.size == 2 and dim[side] == 1 and any(other[side] == 2 for other in dims):
                return dim
    return None


def _spread(places: Places, dim: _Dim, form: Form) -> Places:
    """Each place once for each index of a dimension."""
    steps = np.array([[0], [dim.source * form.source_itemsize], [dim.target * form.target_itemsize]])
    return Places(*(np.stack(places)[:, :, None] + steps[:, None] * np.arange(dim.size)).reshape(3, -1))


def _pairs(places: Places, addresses: np.ndarray, itemsize: int) -> tuple[Places, Places, Places]:
    """Places as pairs of which the second starts one element after the first; and those left over.

    >>> first, second, lone = _pairs(Places(*np.array([[0, 1, 2], [0, 0, 0], [32, 4, 6]])), np.array([32, 4, 6]), 2)
    >>> first.copies.tolist(), second.copies.tolist(), lone.copies.tolist()
    ([1], [2], [0])
    """
    order = np.argsort(addresses, kind="stable")
    index = np.arange(len(order))
    follows = np.diff(addresses[order], prepend=-1 - itemsize) == itemsize
    # In a run of neighbours the second, the fourth, ... end a pair.
    run_start = np.maximum.accumulate(np.where(follows, 0, index))
    ends = follows & ((index - run_start) % 2 == 1)
    begins = np.append(ends[1:], False)
    chosen = (begins, ends, ~(begins | ends))
    first, second, lone = (Places(*(column[order[which]] for column in places)) for which in chosen)
    return first, second, lone
