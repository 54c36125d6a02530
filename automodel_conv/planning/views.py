"""Targets that are strided views of one source, and the part of a target that a region of its source determines; pure.

All offsets and strides are in elements.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from typing import NamedTuple

from automodel_conv.planning.boxes import NotAffine, Piece, chain, contiguous_strides, reach
from automodel_conv.planning.copies import StridedCopy, group_pieces
from automodel_conv.planning.regions import Region, box


class View(NamedTuple):
    """A tensor whose elements are those of a source: ``view[i] = source[offset + i . strides]`` for all i < shape."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int
    """Element of the source that is the first of the view."""


class HeldPart(NamedTuple):
    """The box of a target that a region of its source determines."""

    start: tuple[int, ...]
    """First index in each dimension of the target."""
    shape: tuple[int, ...]
    copies: tuple[StridedCopy, ...]
    """Copies from the region, as a contiguous tensor, to the box, as a contiguous tensor."""


def view_of(shape: Sequence[int], copies: Sequence[StridedCopy]) -> View | None:
    """Return the view of one source that copies would copy to a target; None if the target must be copied.

    Each dimension of a view has one stride. Gate rows between up rows have one; halves of heads that are interleaved
    do not. Targets without elements, or of several sources, are no views.

    Args:
        shape: shape of the target.
        copies: the copies that fill it, all of it.
    """
    if len(copies) != 1 or len(copies[0].ordinals) != 1 or copies[0].box.numel != prod(shape):
        return None
    [piece] = copies[0].pieces()
    walks = {walk.dim: walk for walk in _walks(shape, piece) or ()}
    if any(size != (walks[dim].count if dim in walks else 1) for dim, size in enumerate(shape)):
        return None
    strides, step = [], 1
    for dim in reversed(range(len(shape))):
        if dim in walks:
            step = walks[dim].source_stride
        strides.append(step)
        step *= shape[dim]
    return View(tuple(shape), tuple(reversed(strides)), piece.source_offset)


def held_part(shape: Sequence[int], copies: Sequence[StridedCopy], region: Region) -> HeldPart | None:
    """Return the part of a target of one source that a region of the source determines; None if it is no box.

    Args:
        shape: shape of the target.
        copies: the copies that fill it from the whole source.
        region: the region of the source.
    """
    if region.is_whole or not prod(shape):
        return HeldPart((0,) * len(shape), tuple(shape), tuple(copies))
    try:
        pieces = _from_region(region, copies)
        start, lengths = _bounds(shape, pieces)
        if sum(piece.box.numel for piece in pieces) != prod(lengths):
            return None
        to_box = box(shape, start, lengths).pieces() if pieces else []
        return HeldPart(start, lengths, group_pieces(chain(pieces, to_box, prod(shape))))
    except NotAffine:
        return None


def _from_region(region: Region, copies: Sequence[StridedCopy]) -> list[Piece]:
    """Return the pieces that copy only elements in a region, which is a contiguous tensor."""
    reads = [piece for copy in copies for piece in copy.pieces() if prod(region.shape)]
    reads = [piece for piece in reads if _reads_rows_of(region, piece)]
    to_whole = [piece.inverse() for piece in region.pieces()] if reads else []
    return [piece.canonical() for read in reads for piece in chain(to_whole, [read], prod(region.shape))]


def _reads_rows_of(region: Region, piece: Piece) -> bool:
    """Return whether a piece reads near indices that a region has of the first dimension; most experts do not."""
    row = prod(region.shape[1:])
    first = piece.source_offset // row
    last = (piece.source_offset + reach(piece.box.shape, piece.box.source_strides)) // row
    runs = region.runs[0] if region.shape else ((0, 1),)
    return any(start <= last and first < start + length for start, length in runs)


def _bounds(shape: Sequence[int], pieces: Sequence[Piece]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the start and the shape of the smallest box that contains all that pieces write.

    Raises:
        NotAffine: a piece leaves the dimension that it walks.
    """
    if not pieces:
        return (0,) * len(shape), (0,) * len(shape)
    lows, highs = [], []
    for piece in pieces:
        walks = _walks(shape, piece)
        if walks is None:
            raise NotAffine(f"a piece leaves a dimension of {list(shape)}")
        low = _digits(shape, piece.target_offset)
        high = [digit + 1 for digit in low]
        for walk in walks:
            high[walk.dim] += (walk.count - 1) * walk.step
        if any(stop > size for stop, size in zip(high, shape, strict=True)):
            raise NotAffine(f"a piece leaves a dimension of {list(shape)}")
        lows.append(low)
        highs.append(high)
    start = tuple(map(min, zip(*lows, strict=True)))
    return start, tuple(max(stops) - low for stops, low in zip(zip(*highs, strict=True), start, strict=True))


class _Walk(NamedTuple):
    """Steps of a piece along one dimension of its target."""

    dim: int
    count: int
    step: int
    """Indices of the dimension from one step to the next."""
    source_stride: int


def _walks(shape: Sequence[int], piece: Piece) -> list[_Walk] | None:
    """Return a piece as steps along dimensions of its target; None if it leaves a dimension that it walks."""
    digits = _digits(shape, piece.target_offset)
    walks: list[_Walk] = []
    for dim in zip(*piece.box, strict=True):
        of_dim = list(_walks_of(shape, digits, *dim))
        walks += of_dim
        if dim[0] > 1 and prod(walk.count for walk in of_dim) != dim[0]:
            return None
    return walks


def _walks_of(
    shape: Sequence[int], digits: Sequence[int], count: int, source_stride: int, target_stride: int
) -> Iterator[_Walk]:
    """Yield the steps of one dimension of a box, from the innermost dimension of the target outwards."""
    inner = contiguous_strides(shape)
    for dim in reversed(range(len(shape))):
        step, rest = divmod(target_stride, inner[dim])
        if count == 1 or rest or not 0 < step < shape[dim]:
            continue
        if digits[dim] + (count - 1) * step < shape[dim]:
            yield _Walk(dim, count, step, source_stride)
            return
        if step != 1 or digits[dim] or count % shape[dim]:
            return
        yield _Walk(dim, shape[dim], 1, source_stride)
        count //= shape[dim]
        source_stride, target_stride = source_stride * shape[dim], target_stride * shape[dim]


def _digits(shape: Sequence[int], element: int) -> list[int]:
    """Return the indices of an element of a contiguous tensor."""
    strides = contiguous_strides(shape)
    return [element // stride % max(size, 1) for size, stride in zip(shape, strides, strict=True)]
