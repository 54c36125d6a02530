"""Cut the copies out of a source into ranges of the source that fit into memory; pure.

``slabs`` accepts copies as named tuples with a ``box`` and offsets. It yields ranges of elements, each with the parts
of the copies that read it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, Protocol, TypeVar

from automodel_conv.planning.boxes import Box, reach


class Cuttable(Protocol):
    """A copy out of a source, as a named tuple; offsets in elements."""

    @property
    def box(self) -> Box: ...
    @property
    def source_offset(self) -> int: ...
    @property
    def target_offset(self) -> int: ...
    def _replace(self, **fields: Any) -> Any: ...


Cut = TypeVar("Cut", bound=Cuttable)


def slabs(moves: Sequence[Cut], capacity: int, section: int | None = None) -> Iterator[tuple[int, int, list[Cut]]]:
    """Cut a source into ranges of at most ``capacity`` elements, each with the parts of the moves that read it.

    No part reads outside its range, and an element that is read twice is in one range only. Moves are cut along the
    dimension that walks the source in the largest steps. A move is first split into its steps if they are wider than
    ``capacity``, or if it shares no cut with the other moves.

    Args:
        moves: the copies out of the source.
        capacity: maximum elements of a range.
        section: elements of a section of the source; if given, no range reaches into two sections.

    Yields:
        The first element of a range, the element after its last, and the parts of the moves.
    """
    start, stop = read_range(moves)
    section = section or max(1, stop)
    if stop - start <= capacity and start // section == (stop - 1) // section:
        yield start, stop, list(moves)
        return
    todo = list(moves)
    while todo:
        start = min(move.source_offset for move in todo)
        end = min(start + capacity, start - start % section + section)
        cut = _common_cut(todo, start, end)
        if cut <= start:
            near = [n for n, move in enumerate(todo) if move.source_offset < end]
            widest = max(near, key=lambda n: _walk(todo[n].box).width)
            todo[widest : widest + 1] = _split_into_steps(todo[widest])
            continue
        head: list[Cut] = []
        tail: list[Cut] = []
        for move in todo:
            _divide(move, cut, head, tail)
        yield *read_range(head), head
        todo = tail


class _Walk(NamedTuple):
    """The steps in which a move walks its source: ``size`` steps along dimension ``dim``, ``width`` elements each."""

    dim: int
    size: int
    stride: int
    """Elements from one step to the next."""
    width: int
    span: int
    """Elements from the first that is read to the last, both included."""


@lru_cache(maxsize=1024)
def _walk(box: Box) -> _Walk:
    """Return the walk along the dimension with the largest source stride; cached, because moves share boxes."""
    shape, strides = box.shape, box.source_strides
    dims = [d for d, size in enumerate(shape) if size > 1 and strides[d]]
    if not dims:
        return _Walk(-1, 1, 1, 1, 1)
    dim = max(dims, key=lambda d: strides[d])
    size, stride = shape[dim], strides[dim]
    span = reach(shape, strides) + 1
    return _Walk(dim, size, stride, span - (size - 1) * stride, span)


def read_range(moves: Sequence[Cuttable]) -> tuple[int, int]:
    """Return the first element that any of the moves reads, and the element after the last."""
    start, stop = moves[0].source_offset, 0
    for move in moves:
        start = min(start, move.source_offset)
        stop = max(stop, move.source_offset + _walk(move.box).span)
    return start, stop


def _common_cut(moves: Sequence[Cuttable], start: int, cut: int) -> int:
    """Return the last element <= ``cut`` at which a cut splits no step of any move.

    The result is at most ``start`` if every cut above ``start`` splits a step.
    """
    while cut > start:
        lower = min(_cut_before(move, cut) for move in moves)
        if lower == cut:
            break
        cut = lower
    return cut


def _cut_before(move: Cuttable, cut: int) -> int:
    """Return the last element <= ``cut`` at which a cut splits no step of a move."""
    _, _, stride, width, span = _walk(move.box)
    first = move.source_offset
    if cut <= first or cut >= first + span:
        return cut
    if width > stride:  # steps overlap, so every cut splits one
        return first
    step = first + (cut - first) // stride * stride
    return step if cut < step + width else cut


def _split_into_steps(move: Cut) -> list[Cut]:
    """Return a move for each step of a move along its largest source stride."""
    dim, size, stride, _, _ = _walk(move.box)
    box, step = Box(*((*column[:dim], *column[dim + 1 :]) for column in move.box)), move.box.target_strides[dim]
    return [
        move._replace(
            box=box,
            source_offset=move.source_offset + i * stride,
            target_offset=move.target_offset + i * step,
        )
        for i in range(size)
    ]


def _divide(move: Cut, cut: int, head: list[Cut], tail: list[Cut]) -> None:
    """Append the steps of a move that start below ``cut`` to ``head``, and the others to ``tail``."""
    dim, size, stride, _, _ = _walk(move.box)
    below = min(size, max(0, -((move.source_offset - cut) // stride)))
    if below == size:
        head.append(move)
    elif below == 0:
        tail.append(move)
    else:
        first = _narrow(move, dim, 0, below)
        head.append(first._replace(box=first.box.canonical()))
        tail.append(_narrow(move, dim, below, size - below))


def _narrow(move: Cut, dim: int, first: int, size: int) -> Cut:
    """Return indices ``first`` to ``first + size`` of one dimension of a move."""
    shape, source_strides, target_strides = move.box
    return move._replace(
        box=move.box._replace(shape=(*shape[:dim], size, *shape[dim + 1 :])),
        source_offset=move.source_offset + first * source_strides[dim],
        target_offset=move.target_offset + first * target_strides[dim],
    )


def read_ranges(moves: Sequence[Cuttable], gap: int) -> list[tuple[int, int]]:
    """Return the ranges of elements that moves read, in order, merged across gaps of at most ``gap`` elements."""
    spans: list[tuple[int, int]] = []
    for move in moves:
        _, size, stride, width, span = _walk(move.box)
        first = move.source_offset
        if stride - width > gap:
            spans += [(at, at + width) for at in range(first, first + size * stride, stride)]
        else:
            spans.append((first, first + span))
    spans.sort()
    merged = spans[:1]
    for start, stop in spans[1:]:
        if start - merged[-1][1] > gap:
            merged.append((start, stop))
        else:
            merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
    return merged
