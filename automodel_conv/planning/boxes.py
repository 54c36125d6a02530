"""Strided copies between flat, contiguous tensors, and the algebra that chains them.

A ``Box`` is the geometry of a copy: both sides walk a common index space, in elements of a *contiguous* tensor. A
``Piece`` is a box with the element at which each side starts. The algebra is closed: chaining two sets of pieces yields
pieces again. They consist of static integers only; there are no masks and no views of views. Strides that do not divide
each other raise ``NotAffine``, and the caller falls back.

Chaining works in a mixed radix. All strides over the middle tensor form one chain of divisors. In that radix every
piece is a box of digits, cut where it carries into the next digit, so two pieces meet where their boxes intersect.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from math import prod
from typing import NamedTuple

SPAN = 1 << 64
"""Distance in elements between the first elements of consecutive sources in the address space that they share.

Every source is shorter. In this address space a walk over sources is a dimension like any other, so that one piece can
read thousands of sources.
"""

# Most steps of one dimension that become boxes of their own.
_MOST_STEPS = 4096


class NotAffine(Exception):
    """The copies have no common mixed radix, so they cannot be chained as boxes."""


class Box(NamedTuple):
    """The geometry of a copy: ``target[i . target_strides] = source[i . source_strides]`` for all i < shape.

    Strides are in elements. A box does not record where the copy starts on either side; a ``Piece`` does.
    """

    shape: tuple[int, ...]
    source_strides: tuple[int, ...]
    target_strides: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of elements that are copied."""
        return prod(self.shape)

    @property
    def is_run(self) -> bool:
        """Whether both sides are one run of adjacent elements, so that the bytes can be moved as they are."""
        return self.source_strides == self.target_strides and self.source_strides in ((), (1,))

    def inverse(self) -> Box:
        """Return the geometry of the copy back."""
        return Box(self.shape, self.target_strides, self.source_strides)

    def canonical(self) -> Box:
        """Return the same copy with ordered and merged dimensions.

        Dimensions are ordered by target stride, sizes of 1 are dropped, and adjacent dimensions are merged. The result
        visits the same pairs of elements, and a second call changes nothing. Equal copies become equal values.
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
    """Return a run of ``numel`` adjacent elements on both sides."""
    return Box((numel,), (1,), (1,)) if numel != 1 else Box((), (), ())


def reach(shape: Sequence[int], strides: Sequence[int]) -> int:
    """Return the distance in elements from the first element of a view to its last."""
    return sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))


class Piece(NamedTuple):
    """A box with offsets: ``target[target_offset + i . target_strides] = source[source_offset + i . source_strides]``.

    Offsets are in elements.
    """

    source: int
    """Index of the source among several."""
    box: Box
    source_offset: int
    target_offset: int

    def inverse(self) -> Piece:
        """Return the copy back."""
        return Piece(self.source, self.box.inverse(), self.target_offset, self.source_offset)

    def canonical(self) -> Piece:
        """Return the same copy with a canonical box."""
        return self._replace(box=self.box.canonical())


def contiguous_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Return row-major strides in elements; a size of 0 counts as 1."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


class _Digits(NamedTuple):
    """A box in a mixed radix: digit k runs from ``low[k]`` to below ``high[k]``.

    With each step of digit k, the other side moves by ``strides[k]`` elements.
    """

    low: tuple[int, ...]
    high: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int
    """Element of the other side at which every digit is at its low."""


class _Radix:
    """A mixed radix: weights 1 = w0 < w1 < ..., each of which divides the next; digit k has size w(k+1) / w(k).

    Two strides may not divide each other, as in part of an interleaved dimension. Then only the stride with more steps
    becomes a weight. Each step of the other becomes a box of its own.

    Args:
        walks: dimensions of all pieces, as ``(steps, stride)``.
        numel: number of elements of the tensor that they walk.
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
        """Return the boxes of a view, cut where a digit carries, with the strides and the offset of the other side.

        Args:
            shape: shape of the view.
            key_strides, key_offset: strides and first element of the view in the tensor of this radix.
            strides, offset: strides and first element of the view on the other side.
        """
        if 0 in shape:
            return []
        dims = [dim for dim in zip(shape, key_strides, strides, strict=True) if dim[0] != 1]
        pending, boxes = [(dims, key_offset, offset)], []
        while pending:
            dims, key, other = pending.pop()
            if not 0 <= key < self.numel:
                raise NotAffine(f"a view starts at element {key} of a tensor of {self.numel}")
            low = [key // weight % size for weight, size in zip(self.weights, self.sizes, strict=True)]
            counts, steps = [1] * len(low), [0] * len(low)
            for i, (count, weight, step) in enumerate(dims):
                if weight not in self.digit_of:
                    others = [*dims[:i], *dims[i + 1 :]]
                    pending += [(others, key + n * weight, other + n * step) for n in range(count)]
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
                if low[k]:  # cut at the carry: first the steps that fit, then the rest from digit 0 of the next row
                    head = size - low[k]
                    pending.append(([*dims[:i], (head, weight, step), *dims[i + 1 :]], key, other))
                    rest = [*dims[:i], (count - head, weight, step), *dims[i + 1 :]]
                    pending.append((rest, key + head * weight, other + head * step))
                else:  # whole rows, then the tail
                    rows, tail = divmod(count, size)
                    whole = [*dims[:i], (size, weight, step), *dims[i + 1 :]]
                    if rows > 1:
                        whole.append((rows, weight * size, step * size))
                    pending.append((whole, key, other))
                    if tail:
                        rest = [*dims[:i], (tail, weight, step), *dims[i + 1 :]]
                        pending.append((rest, key + rows * size * weight, other + rows * size * step))
                break
            else:
                high = tuple(digit + count for digit, count in zip(low, counts, strict=True))
                boxes.append(_Digits(tuple(low), high, tuple(steps), other))
        return boxes


def _target_boxes(radix: _Radix, pieces: Sequence[Piece]) -> list[tuple[int, _Digits]]:
    return [
        (source, digits)
        for source, (shape, source_strides, target_strides), source_offset, target_offset in pieces
        for digits in radix.boxes(shape, target_strides, target_offset, source_strides, source_offset)
    ]


def chain(first: Sequence[Piece], second: Sequence[Piece], numel: int) -> list[Piece]:
    """Return the pieces that copy straight from the sources of ``first`` to the target of ``second``.

    ``first`` writes a middle tensor of ``numel`` elements, and ``second`` reads it; all of ``second`` have the same
    source. Elements of the middle tensor that are not written or not read are in no piece.

    Raises:
        NotAffine: the strides on the middle tensor have no common mixed radix.
    """
    if not numel:
        return []
    if len(first) == 1 and first[0].target_offset == 0 and _is_run_of(first[0].box, numel):
        source, _, start, _ = first[0]
        return [Piece(source, box.canonical(), start + at, to) for _, box, at, to in second]
    if len(second) == 1 and second[0].source_offset == 0 and _is_run_of(second[0].box, numel):
        start = second[0].target_offset
        return [Piece(source, box, at, start + to) for source, box, at, to in first]
    walks = [walk for p in first for walk in zip(p.box.shape, p.box.target_strides, strict=True)]
    walks += [walk for p in second for walk in zip(p.box.shape, p.box.source_strides, strict=True)]
    radix = _Radix(walks, numel)
    written = _target_boxes(radix, first)
    chained = []
    for _, (shape, source_strides, target_strides), source_offset, target_offset in second:
        for read in radix.boxes(shape, source_strides, source_offset, target_strides, target_offset):
            for source, write in written:
                low = tuple(map(max, write.low, read.low))
                common = tuple(high - start for high, start in zip(map(min, write.high, read.high), low, strict=True))
                if min(common) > 0:
                    box = Box(common, write.strides, read.strides).canonical()
                    starts = write.offset + _advance(low, write), read.offset + _advance(low, read)
                    chained.append(Piece(source, box, *starts))
    return chained


def _is_run_of(box: Box, numel: int) -> bool:
    return box.numel == numel and box.source_strides == box.target_strides and len(box.shape) <= 1


def _advance(low: tuple[int, ...], box: _Digits) -> int:
    return sum((digit - start) * step for digit, start, step in zip(low, box.low, box.strides, strict=True))


def outside(pieces: Sequence[Piece], view: Piece, numel: int) -> list[Piece]:
    """Return the parts of pieces that do not write what ``view`` writes, in a target of ``numel`` elements.

    Raises:
        NotAffine: the pieces and the view have no common mixed radix, or leave the tensor.
    """
    walks = [walk for p in (*pieces, view) for walk in zip(p.box.shape, p.box.target_strides, strict=True)]
    radix = _Radix(walks, numel)
    holes = [digits for _, digits in _target_boxes(radix, [view])]
    left = []
    for source, digits in _target_boxes(radix, pieces):
        parts = [digits]
        for hole in holes:
            parts = [rest for part in parts for rest in _cut(part, hole)]
        for part in parts:
            shape = tuple(high - low for low, high in zip(part.low, part.high, strict=True))
            start = sum(low * weight for low, weight in zip(part.low, radix.weights, strict=True))
            left.append(Piece(source, Box(shape, part.strides, radix.weights).canonical(), part.offset, start))
    return left


def _cut(box: _Digits, hole: _Digits) -> list[_Digits]:
    """Return the parts of a box outside another one."""
    if any(min(high, b) <= max(low, a) for low, high, a, b in zip(*box[:2], *hole[:2], strict=True)):
        return [box]
    parts = []
    for digit, (low, high) in enumerate(zip(hole.low, hole.high, strict=True)):
        if box.low[digit] < low:
            parts.append(_between(box, digit, box.low[digit], low))
        if high < box.high[digit]:
            parts.append(_between(box, digit, high, box.high[digit]))
        box = _between(box, digit, max(low, box.low[digit]), min(high, box.high[digit]))
    return parts


def _between(box: _Digits, digit: int, low: int, high: int) -> _Digits:
    """Return the part of a box in which a digit runs from ``low`` to below ``high``."""
    return _Digits(
        (*box.low[:digit], low, *box.low[digit + 1 :]),
        (*box.high[:digit], high, *box.high[digit + 1 :]),
        box.strides,
        box.offset + (low - box.low[digit]) * box.strides[digit],
    )


class Overlap(NamedTuple):
    """An element of a target that two sources write."""

    element: int
    sources: tuple[int, int]


def find_overlap(pieces: Sequence[Piece], numel: int) -> Overlap | None:
    """Return an element of a target of ``numel`` elements that two pieces write, or None if no two pieces meet.

    If the pieces also write ``numel`` elements in total, None proves that each element is written exactly once.

    Raises:
        NotAffine: the pieces have no common mixed radix, or leave the tensor.
    """
    if not numel:
        return None
    radix = _Radix([walk for p in pieces for walk in zip(p.box.shape, p.box.target_strides, strict=True)], numel)
    boxes = _target_boxes(radix, pieces)
    pair = _find_pair(boxes, len(radix.weights) - 1)
    if pair is None:
        return None
    (a, box_a), (b, box_b) = pair
    element = sum(max(x, y) * w for x, y, w in zip(box_a.low, box_b.low, radix.weights, strict=True))
    return Overlap(element, (a, b))


def _find_pair(boxes: list[tuple[int, _Digits]], digit: int) -> tuple[tuple[int, _Digits], tuple[int, _Digits]] | None:
    """Return two boxes that share a point in digits 0 to ``digit``, or None.

    All boxes share a point in the digits above.
    """
    if len(boxes) < 2:
        return None
    if digit < 0:
        return boxes[0], boxes[1]
    by_low = sorted(boxes, key=lambda item: item[1].low[digit])
    active: list[tuple[int, _Digits]] = []
    index = 0
    while index < len(by_low):
        start = by_low[index][1].low[digit]
        active = [item for item in active if item[1].high[digit] > start]
        while index < len(by_low) and by_low[index][1].low[digit] == start:
            active.append(by_low[index])
            index += 1
        pair = _find_pair(active, digit - 1)
        if pair is not None:
            return pair
    return None
