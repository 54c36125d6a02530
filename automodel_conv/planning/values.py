"""Values are tensors that are only described; six functions of them make up all operations and layouts; pure.

All sources of a rule lie in one long row, ``SPAN`` elements apart. So thousands of experts are one piece, and what an
operation does to them is computed once.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

from automodel_conv.planning.boxes import Box, Piece, chain, contiguous_strides, run_of
from automodel_conv.planning.copies import SPAN


class LoweringError(Exception):
    """These sources cannot go through this operation (wrong number, ranks or sizes)."""


class Value(NamedTuple):
    """A tensor that is still only a description: its shape, and the pieces that would fill it.

    Their ``source`` is 0: they read the row of all sources, with element n of source k at ``k * SPAN + n``.
    """

    shape: tuple[int, ...]
    pieces: list[Piece]
    source: int = 0
    """Added to the sources that the pieces read, so that values of equal pieces can share them."""


def leaf(source: int, shape: tuple[int, ...]) -> Value:
    """A whole source tensor."""
    numel = prod(shape)
    return Value(shape, [Piece(0, run_of(numel), 0, 0)] if numel else [], source)


def leaves(first: int, shapes: Sequence[tuple[int, ...]]) -> list[Value]:
    """Whole source tensors, numbered from ``first``."""
    pieces = {shape: leaf(0, shape).pieces for shape in dict.fromkeys(shapes)}
    return [Value(shape, pieces[shape], source) for source, shape in enumerate(shapes, first)]


def _mapped(value: Value, shape: tuple[int, ...], sizes: Sequence[int], read: Sequence[int], start: int) -> Value:
    """Elements ``start + i . read`` of ``value``, for all i < sizes in order, laid out contiguously as ``shape``."""
    if not prod(sizes):
        return Value(shape, [])
    walk = Piece(0, Box(tuple(sizes), tuple(read), contiguous_strides(sizes)), start, 0)
    return Value(shape, chain(value.pieces, [walk], prod(value.shape)), value.source)


def reshape(value: Value, shape: Sequence[int]) -> Value:
    if prod(shape) != prod(value.shape):
        raise LoweringError(f"cannot reshape {value.shape} to {tuple(shape)}")
    return value._replace(shape=tuple(shape))


def transpose(value: Value, dim0: int, dim1: int) -> Value:
    order = list(range(len(value.shape)))
    dim0, dim1 = _dim(value, dim0), _dim(value, dim1)
    order[dim0], order[dim1] = dim1, dim0
    return permute(value, order)


def permute(value: Value, order: Sequence[int]) -> Value:
    strides = contiguous_strides(value.shape)
    shape = tuple(value.shape[dim] for dim in order)
    return _mapped(value, shape, shape, [strides[dim] for dim in order], 0)


def narrow(value: Value, dim: int, start: int, length: int) -> Value:
    dim = _dim(value, dim)
    strides = contiguous_strides(value.shape)
    shape = (*value.shape[:dim], length, *value.shape[dim + 1 :])
    return _mapped(value, shape, shape, strides, start * strides[dim])


def concatenate(values: Sequence[Value], dim: int) -> Value:
    return _joined(_series(values), dim)


def stack(values: Sequence[Value], dim: int) -> Value:
    rank = len(values[0].shape) + 1
    if not -rank <= dim < rank:
        raise LoweringError(f"cannot stack tensors of shape {values[0].shape} along dimension {dim}")
    dim %= rank
    opened = [
        series._replace(first=reshape(series.first, (*series.first.shape[:dim], 1, *series.first.shape[dim:])))
        for series in _series(values)
    ]
    return _joined(opened, dim)


class _Series(NamedTuple):
    """Values that are equal but for their sources, of which each starts ``step`` after the one before."""

    first: Value
    count: int
    step: int


def _series(values: Sequence[Value]) -> list[_Series]:
    """The values in as few series as follow each other."""
    made: list[_Series] = []
    first, count, step = values[0], 0, 0
    for value in values:
        apart = value.source - first.source
        goes_on = apart == count * step if count > 1 else apart > 0
        if count == 0 or (goes_on and value.shape == first.shape and value.pieces == first.pieces):
            step = apart if count == 1 else step
            count += 1
            continue
        made.append(_Series(first, count, step))
        first, count, step = value, 1, 0
    return [*made, _Series(first, count, step)]


def _joined(all_series: Sequence[_Series], dim: int) -> Value:
    first = all_series[0].first
    dim = _dim(first, dim)
    rest = (*first.shape[:dim], *first.shape[dim + 1 :])
    for value, _, _ in all_series:
        if (*value.shape[:dim], *value.shape[dim + 1 :]) != rest or len(value.shape) != len(first.shape):
            raise LoweringError(f"cannot join shapes {first.shape} and {value.shape} along dimension {dim}")
    size = sum(series.count * series.first.shape[dim] for series in all_series)
    shape = (*first.shape[:dim], size, *first.shape[dim + 1 :])
    strides = contiguous_strides(shape)
    pieces: list[Piece] = []
    start = 0
    for series in all_series:
        value, length = series.first, series.first.shape[dim]
        whole, apart = (series.count, *value.shape), (length * strides[dim], *strides)
        if prod(whole):
            walk = Piece(0, Box(whole, contiguous_strides(whole), apart), 0, start * strides[dim])
            pieces += chain(_one_after_the_other(series), [walk], prod(whole))
        start += series.count * length
    return Value(shape, pieces)


def _one_after_the_other(series: _Series) -> list[Piece]:
    """The pieces of all values of a series, laid end to end."""
    (shape, pieces, source), count, step = series
    pieces = [piece._replace(source_offset=piece.source_offset + source * SPAN) for piece in pieces]
    if count == 1:
        return pieces
    return [
        piece._replace(
            box=Box(
                (count, *piece.box.shape),
                (step * SPAN, *piece.box.source_strides),
                (prod(shape), *piece.box.target_strides),
            )
        )
        for piece in pieces
    ]


def _dim(value: Value, dim: int) -> int:
    rank = len(value.shape)
    if not -rank <= dim < rank:
        raise LoweringError(f"a tensor of shape {value.shape} has no dimension {dim}")
    return dim % rank
