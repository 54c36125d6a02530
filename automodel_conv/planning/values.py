"""Symbolic tensors (``Value``), and the seven functions on them that build all operations and layouts; pure.

Six functions do what torch's functions of the same names do: ``reshape``, ``transpose``, ``permute``, ``narrow``,
``concatenate`` and ``stack``. ``append_zeros`` must be the last of a chain.

All sources of a rule share one address space, in which they start ``SPAN`` elements apart. Therefore one piece can read
thousands of experts, and the effect of an operation on them is computed once.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

from automodel_conv.planning.boxes import SPAN, Box, NotAffine, Piece, chain, contiguous_strides, run_of


class LoweringError(Exception):
    """The sources do not fit an operation: their number, ranks or sizes are wrong."""


class Value(NamedTuple):
    """A symbolic tensor: its shape, and the pieces that would fill it.

    The ``source`` of each piece is 0. Pieces read the address space of all sources, in which element n of source k is
    at ``k * SPAN + n``.
    """

    shape: tuple[int, ...]
    pieces: list[Piece]
    source: int = 0
    """Number that is added to each source that the pieces read, so that values can share equal pieces."""
    zero_rows: int = 0
    """Number of the last rows (indices of the first dimension) that no piece fills, because they are zero."""


def leaf(source: int, shape: tuple[int, ...]) -> Value:
    """Return a whole source tensor as a symbolic tensor."""
    numel = prod(shape)
    return Value(shape, [Piece(0, run_of(numel), 0, 0)] if numel else [], source)


def leaves(first: int, shapes: Sequence[tuple[int, ...]]) -> list[Value]:
    """Return whole source tensors as symbolic tensors; their sources are numbered from ``first``."""
    pieces = {shape: leaf(0, shape).pieces for shape in dict.fromkeys(shapes)}
    return [Value(shape, pieces[shape], source) for source, shape in enumerate(shapes, first)]


def _view(value: Value, shape: tuple[int, ...], sizes: Sequence[int], strides: Sequence[int], start: int) -> Value:
    """Return the elements ``start + i . strides`` of ``value``, for all i < sizes in order, contiguous as ``shape``."""
    _refuse_zeros(value)
    if not prod(sizes):
        return Value(shape, [])
    walk = Piece(0, Box(tuple(sizes), tuple(strides), contiguous_strides(sizes)), start, 0)
    return Value(shape, chain(value.pieces, [walk], prod(value.shape)), value.source)


def reshape(value: Value, shape: Sequence[int]) -> Value:
    if prod(shape) != prod(value.shape):
        raise LoweringError(f"cannot reshape {value.shape} to {tuple(shape)}")
    _refuse_zeros(value)
    return value._replace(shape=tuple(shape))


def transpose(value: Value, dim0: int, dim1: int) -> Value:
    order = list(range(len(value.shape)))
    dim0, dim1 = axis_of(value, dim0), axis_of(value, dim1)
    order[dim0], order[dim1] = dim1, dim0
    return permute(value, order)


def permute(value: Value, order: Sequence[int]) -> Value:
    strides = contiguous_strides(value.shape)
    shape = tuple(value.shape[dim] for dim in order)
    return _view(value, shape, shape, [strides[dim] for dim in order], 0)


def narrow(value: Value, dim: int, start: int, length: int) -> Value:
    dim = axis_of(value, dim)
    strides = contiguous_strides(value.shape)
    shape = (*value.shape[:dim], length, *value.shape[dim + 1 :])
    return _view(value, shape, shape, strides, start * strides[dim])


def concatenate(values: Sequence[Value], dim: int) -> Value:
    return _join(_group(values), dim)


def stack(values: Sequence[Value], dim: int) -> Value:
    rank = len(values[0].shape) + 1
    if not -rank <= dim < rank:
        raise LoweringError(f"cannot stack tensors of shape {values[0].shape} along dimension {dim}")
    dim %= rank
    unsqueezed = [
        series._replace(first=reshape(series.first, (*series.first.shape[:dim], 1, *series.first.shape[dim:])))
        for series in _group(values)
    ]
    return _join(unsqueezed, dim)


class _Series(NamedTuple):
    """Symbolic tensors that are equal except for their sources, which have numbers ``step`` apart."""

    first: Value
    count: int
    step: int


def append_zeros(value: Value, rows: int) -> Value:
    """Append rows of zeros to the first dimension."""
    if not value.shape or rows < 0:
        raise LoweringError(f"cannot append {rows} rows to {value.shape}")
    _refuse_zeros(value)
    return value._replace(shape=(value.shape[0] + rows, *value.shape[1:]), zero_rows=rows)


def _refuse_zeros(value: Value) -> None:
    if value.zero_rows:
        raise NotAffine("an operation follows one that appends zeros")


def _group(values: Sequence[Value]) -> list[_Series]:
    """Group consecutive symbolic tensors into as few series as possible."""
    grouped: list[_Series] = []
    first, count, step = values[0], 0, 0
    for value in values:
        _refuse_zeros(value)
        distance = value.source - first.source
        continues = distance == count * step if count > 1 else distance > 0
        if count == 0 or (continues and value.shape == first.shape and value.pieces == first.pieces):
            step = distance if count == 1 else step
            count += 1
            continue
        grouped.append(_Series(first, count, step))
        first, count, step = value, 1, 0
    return [*grouped, _Series(first, count, step)]


def _join(all_series: Sequence[_Series], dim: int) -> Value:
    first = all_series[0].first
    dim = axis_of(first, dim)
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
        stacked, target_strides = (series.count, *value.shape), (length * strides[dim], *strides)
        if prod(stacked):
            walk = Piece(0, Box(stacked, contiguous_strides(stacked), target_strides), 0, start * strides[dim])
            pieces += chain(_end_to_end(series), [walk], prod(stacked))
        start += series.count * length
    return Value(shape, pieces)


def _end_to_end(series: _Series) -> list[Piece]:
    """Return the pieces that write all symbolic tensors of a series one after the other."""
    (shape, pieces, source, _), count, step = series
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


def axis_of(value: Value, dim: int) -> int:
    """Return a dimension as a number from 0.

    Raises:
        LoweringError: the value has no such dimension.
    """
    rank = len(value.shape)
    if not -rank <= dim < rank:
        raise LoweringError(f"a tensor of shape {value.shape} has no dimension {dim}")
    return dim % rank
