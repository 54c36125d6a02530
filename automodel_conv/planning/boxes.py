"""Strided copies between flat, contiguous tensors, and the algebra that chains them.

A ``Box`` is the geometry of a copy: both sides walk a common index space, in elements of a *contiguous* tensor. A
``Piece`` is a box with the element where each side starts. The algebra is closed: chaining two sets of pieces gives
pieces again, static integers only, no masks and no views of views. What does not fit (strides that do not divide each
other) raises ``NotAffine``, and the caller falls back.

How chaining works: all strides that walk the tensor in the middle are put into one chain of divisors (a mixed radix).
In that radix every piece is a box of digits, cut where it carries into the next digit, so two pieces meet where their
boxes intersect.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from math import prod
from typing import NamedTuple

# Of a dimension whose steps become boxes of their own.
_MOST_STEPS = 4096


class NotAffine(Exception):
    """The copies have no common mixed radix, so they cannot be chained as boxes."""


class Box(NamedTuple):
    """The geometry of a copy: ``target[i . target_strides] = source[i . source_strides]`` for all i < shape.

    Strides are in elements; where the copy starts on either side is said beside it.
    """

    shape: tuple[int, ...]
    source_strides: tuple[int, ...]
    target_strides: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Elements that are copied."""
        return prod(self.shape)

    @property
    def is_run(self) -> bool:
        """True if both sides are one run of adjacent elements, so that bytes can be moved without a look at them."""
        return self.source_strides == self.target_strides and self.source_strides in ((), (1,))

    def inverse(self) -> Box:
        """The geometry of the copy back."""
        return Box(self.shape, self.target_strides, self.source_strides)

    def canonical(self) -> Box:
        """The same copy with dimensions ordered by target stride, sizes of 1 dropped and adjacent dimensions merged.

        The result visits the same pairs of elements; it is unchanged when called twice; equal copies become equal
        values.
        """
        dims = zip(self.target_strides, self.source_strides, self.shape, strict=True)
        dims = sorted((dim for dim in dims if dim[2] != 1), reverse=True)
        merged: list[tuple[int, int, int]] = []
        for target, source, size in dims:
            if merged:
                outer_target, outer_source, outer_size = merged[-1]
                if outer_target == target * size and outer_source == source * size:
                    merged[-1] = (target, source, outer_size * size)
                    continue
            merged.append((target, source, size))
        target_strides, source_strides, shape = tuple(zip(*merged, strict=True)) or ((), (), ())
        return Box(shape, source_strides, target_strides)


def run_of(numel: int) -> Box:
    """A run of ``numel`` adjacent elements on both sides."""
    return Box((numel,), (1,), (1,)) if numel != 1 else Box((), (), ())


def reach(shape: Sequence[int], strides: Sequence[int]) -> int:
    """Elements from the first to the last of a view."""
    return sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))


class Piece(NamedTuple):
    """A box in its place: ``target[target_offset + i . target_strides] = source[source_offset + i . source_strides]``.

    All offsets are in elements.
    """

    source: int
    """Which of several sources."""
    box: Box
    source_offset: int
    target_offset: int

    def inverse(self) -> Piece:
        """The copy back."""
        return Piece(self.source, self.box.inverse(), self.target_offset, self.source_offset)

    def canonical(self) -> Piece:
        """The same copy with a canonical box."""
        return self._replace(box=self.box.canonical())


def contiguous_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Row-major strides in elements; sizes 0 and 1 count as 1."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


class _Digits(NamedTuple):
    """A box in a mixed radix: digit k runs from low[k] below high[k] while the other side moves by strides[k]."""

    low: tuple[int, ...]
    high: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int  # of the other side, where every digit is at its low


class _Radix:
    """Weights 1 = w0 < w1 < ... with each dividing the next; digit k has size w(k+1) / w(k).

    Args:
        walks: the dimensions of all pieces, ``(steps, stride)``. Of two strides that do not divide each other, as in
            part of an interleaved dimension, the one with fewer steps is no weight: its steps become boxes themselves.
    """

    def __init__(self, walks: Iterable[tuple[int, int]], numel: int):
        steps: dict[int, int] = {}
        for count, stride in walks:
            if count != 1:
                steps[stride] = max(count, steps.get(stride, 0))
        if min(steps, default=1) < 1:
            raise NotAffine(f"a dimension repeats or runs backwards, with stride {min(steps)}")
        weights = [1]
        for stride in sorted(steps.keys() - {1}):
            while stride % weights[-1] and steps[weights[-1]] < steps[stride]:
                weights.pop()
            if stride % weights[-1] == 0 and numel % stride == 0:
                weights.append(stride)
        if any(count > _MOST_STEPS for stride, count in steps.items() if stride not in weights):
            raise NotAffine(f"strides {sorted(steps)} of a tensor of {numel} elements do not divide each other")
        bounds = [*weights, numel]
        self.numel = numel
        self.weights = tuple(weights)
        self.sizes = tuple(outer // inner for inner, outer in pairwise(bounds))
        self.digit_of = {weight: k for k, weight in enumerate(weights)}

    def boxes(
        self,
        shape: Sequence[int],
        key_strides: Sequence[int],
        key_offset: int,
        strides: Sequence[int],
        offset: int,
    ) -> list[_Digits]:
        """The boxes of a view (key) together with the other side's strides and offset; cut where a digit carries."""
        if 0 in shape:
            return []
        dims = [dim for dim in zip(shape, key_strides, strides, strict=True) if dim[0] != 1]
        todo, done = [(dims, key_offset, offset)], []
        while todo:
            dims, key, other = todo.pop()
            if not 0 <= key < self.numel:
                raise NotAffine(f"a view starts at element {key} of a tensor of {self.numel}")
            low = [key // weight % size for weight, size in zip(self.weights, self.sizes, strict=True)]
            counts, steps = [1] * len(low), [0] * len(low)
            for i, (count, weight, step) in enumerate(dims):
                if weight not in self.digit_of:
                    others = [*dims[:i], *dims[i + 1 :]]
                    todo += [(others, key + n * weight, other + n * step) for n in range(count)]
                    break
                k = self.digit_of[weight]
                if counts[k] != 1:
                    raise NotAffine(f"two dimensions walk the same stride {weight}")
                size = self.sizes[k]
                if low[k] + count <= size:
                    counts[k], steps[k] = count, step
                    continue
                if k + 1 == len(low):
                    raise NotAffine(f"a view of {count} steps of {weight} leaves the tensor")
                if low[k]:  # cut at the carry: what fits, then the rest from digit 0 of the next row
                    head = size - low[k]
                    todo.append(([*dims[:i], (head, weight, step), *dims[i + 1 :]], key, other))
                    rest = [*dims[:i], (count - head, weight, step), *dims[i + 1 :]]
                    todo.append((rest, key + head * weight, other + head * step))
                else:  # whole rows, then the tail
                    rows, tail = divmod(count, size)
                    whole = [*dims[:i], (size, weight, step), *dims[i + 1 :]]
                    if rows > 1:
                        whole.append((rows, weight * size, step * size))
                    todo.append((whole, key, other))
                    if tail:
                        rest = [*dims[:i], (tail, weight, step), *dims[i + 1 :]]
                        todo.append((rest, key + rows * size * weight, other + rows * size * step))
                break
            else:
                high = tuple(digit + count for digit, count in zip(low, counts, strict=True))
                done.append(_Digits(tuple(low), high, tuple(steps), other))
        return done


def _target_boxes(radix: _Radix, pieces: Sequence[Piece]) -> list[tuple[int, _Digits]]:
    return [
        (source, digits)
        for source, (shape, source_strides, target_strides), source_offset, target_offset in pieces
        for digits in radix.boxes(shape, target_strides, target_offset, source_strides, source_offset)
    ]


def chain(first: Sequence[Piece], second: Sequence[Piece], numel: int) -> list[Piece]:
    """The pieces that go straight from the sources of ``first`` to the target of ``second``.

    ``first`` writes a middle tensor of ``numel`` elements, ``second`` (all with the same source) reads it. Elements of
    the middle that nobody reads, or that nobody wrote, take part in no piece.

    Raises:
        NotAffine: the strides on the middle tensor have no common mixed radix.
    """
    if not numel:
        return []
    if len(first) == 1 and _is_identity(first[0], numel):
        return [piece.canonical()._replace(source=first[0].source) for piece in second]
    if len(second) == 1 and _is_identity(second[0], numel):
        return list(first)
    walks = [walk for p in first for walk in zip(p.box.shape, p.box.target_strides, strict=True)]
    walks += [walk for p in second for walk in zip(p.box.shape, p.box.source_strides, strict=True)]
    radix = _Radix(walks, numel)
    written = _target_boxes(radix, first)
    chained = []
    for _, (shape, source_strides, target_strides), source_offset, target_offset in second:
        for read in radix.boxes(shape, source_strides, source_offset, target_strides, target_offset):
            for source, write in written:
                low = tuple(map(max, write.low, read.low))
                common = tuple(high - at for high, at in zip(map(min, write.high, read.high), low, strict=True))
                if min(common) > 0:
                    box = Box(common, write.strides, read.strides).canonical()
                    starts = write.offset + _advance(low, write), read.offset + _advance(low, read)
                    chained.append(Piece(source, box, *starts))
    return chained


def _is_identity(piece: Piece, numel: int) -> bool:
    box = piece.box
    return (
        box.numel == numel
        and piece.source_offset == piece.target_offset == 0
        and box.source_strides == box.target_strides
        and len(box.shape) <= 1
    )


def _advance(low: tuple[int, ...], box: _Digits) -> int:
    return sum((at - start) * step for at, start, step in zip(low, box.low, box.strides, strict=True))


class Overlap(NamedTuple):
    """Two sources that write the same element of a target; a negative source means an element nobody writes."""

    element: int
    sources: tuple[int, int]


def find_overlap(pieces: Sequence[Piece], numel: int) -> Overlap | None:
    """An element of a target of ``numel`` elements written by two pieces, or None if no two pieces meet.

    Together with a count of the elements written this proves that each is written exactly once.

    Raises:
        NotAffine: the pieces have no common mixed radix, or leave the tensor.
    """
    if not numel:
        return None
    radix = _Radix([walk for p in pieces for walk in zip(p.box.shape, p.box.target_strides, strict=True)], numel)
    boxes = _target_boxes(radix, pieces)
    met = _meeting(boxes, len(radix.weights) - 1)
    if met is None:
        return None
    (a, box_a), (b, box_b) = met
    element = sum(max(x, y) * w for x, y, w in zip(box_a.low, box_b.low, radix.weights, strict=True))
    return Overlap(element, (a, b))


def _meeting(boxes: list[tuple[int, _Digits]], digit: int) -> tuple[tuple[int, _Digits], tuple[int, _Digits]] | None:
    """Two boxes that share a point in digits 0..digit, all given boxes sharing one in the digits above."""
    if len(boxes) < 2:
        return None
    if digit < 0:
        return boxes[0], boxes[1]
    by_low = sorted(boxes, key=lambda item: item[1].low[digit])
    active: list[tuple[int, _Digits]] = []
    at = 0
    while at < len(by_low):
        start = by_low[at][1].low[digit]
        active = [item for item in active if item[1].high[digit] > start]
        while at < len(by_low) and by_low[at][1].low[digit] == start:
            active.append(by_low[at])
            at += 1
        met = _meeting(active, digit - 1)
        if met is not None:
            return met
    return None
