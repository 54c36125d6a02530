"""From copies to jobs: which bytes of which file go where, in portions that run in any order.

Pure: integers in, integers out. Bytes that only move are read straight into their final place.
Bytes that are permuted or cast, or that several targets want, are read into scratch, a slab of a
source at a time, and copied from there. So each byte is read once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

from automodel_conv.dtypes import itemsize
from automodel_conv.execution.buffers import reach
from automodel_conv.files import system
from automodel_conv.files.checkpoint import Checkpoint
from automodel_conv.planning.copies import StridedCopy, Target
from automodel_conv.planning.view import Piece, canonical

GAP_BYTES = 64 << 10
"""Wanted bytes closer than this are read in one call, and what lies between them is thrown away."""

SCRATCH = -1
"""Stands for the thread's scratch where a number of a target stands otherwise."""

# Every safetensors dtype may start here, and so may the vectors of any CPU.
_ALIGN_BYTES = 64
# Larger runs gain nothing once a call moves megabytes; smaller ones would cost calls.
_RUN_BYTES = 32 << 20
_LEAST_RUN_BYTES = 1 << 20
# Slabs that stay in the cache between the read and the copy.
_SLAB_BYTES = 8 << 20


class Part(NamedTuple):
    """Bytes of a file and where they go: into the buffer of a target, or into ``SCRATCH``."""

    file: int
    offset_bytes: int
    nbytes: int
    target: int
    start_bytes: int
    row: int


class Move(NamedTuple):
    """A copy out of a source, or in a job out of the scratch; strides and offsets in elements."""

    target: int
    dtype: str
    shape: tuple[int, ...]
    source_strides: tuple[int, ...]
    source_offset: int
    target_strides: tuple[int, ...]
    target_offset: int


class Job(NamedTuple):
    """Reads from one file, ordered by offset, and then copies out of the scratch they filled."""

    parts: list[Part]
    moves: list[Move]
    scratch_bytes: int

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    @property
    def targets(self) -> set[int]:
        return {part.target for part in self.parts if part.target != SCRATCH} | {move.target for move in self.moves}


def schedule(
    targets: Sequence[Target],
    copies: Sequence[Sequence[StridedCopy]],
    checkpoint: Checkpoint,
    *,
    threads: int,
    slot_bytes: int,
) -> list[Job]:
    """All jobs of a load to the host, in the order of the files.

    Args:
        copies: of each target, aimed at its buffer.
        slot_bytes: what a job may use of scratch, a multiple of 64.
    """
    parts, moves = divide(targets, copies, checkpoint)
    jobs = list(runs(parts, portion(sum(part.nbytes for part in parts), threads)))
    through_scratch = sum(checkpoint.nbytes[row] for row in moves)
    jobs += staged(moves, checkpoint, min(slot_bytes, _SLAB_BYTES, portion(through_scratch, threads)))
    jobs.sort(key=lambda job: job.parts[0])
    return jobs


def divide(
    targets: Sequence[Target], copies: Sequence[Sequence[StridedCopy]], checkpoint: Checkpoint
) -> tuple[list[Part], dict[int, list[Move]]]:
    """What can be read in place, in the order of the files, and by source row what cannot; no byte is in both."""
    parts, moves = _split(targets, copies, checkpoint)
    parts.sort()
    shared = _rows_read_twice(parts) | (moves.keys() & {part.row for part in parts})
    if shared:
        for part in parts:
            if part.row in shared:
                moves.setdefault(part.row, []).append(_as_move(part, checkpoint))
        parts = [part for part in parts if part.row not in shared]
    return parts, moves


def _split(
    targets: Sequence[Target], copies: Sequence[Sequence[StridedCopy]], checkpoint: Checkpoint
) -> tuple[list[Part], dict[int, list[Move]]]:
    """What can be read in place, and by source row what cannot."""
    dtypes, file_ids, offsets = checkpoint.dtypes, checkpoint.file_ids, checkpoint.offsets
    parts: list[Part] = []
    moves: dict[int, list[Move]] = {}
    for number, (target, group) in enumerate(zip(targets, copies, strict=True)):
        size = itemsize(target.dtype)
        for copy in group:
            plain = copy.is_contiguous
            nbytes = size * (copy.shape[0] if copy.shape else 1)
            columns = zip(copy.ordinals, copy.source_offsets, copy.target_offsets, strict=True)
            for ordinal, source, place in columns:
                row = target.sources[ordinal]
                if plain and dtypes[row] == target.dtype:
                    start = offsets[row] + source * size
                    parts.append(Part(file_ids[row], start, nbytes, number, place * size, row))
                else:
                    moves.setdefault(row, []).append(
                        Move(number, dtypes[row], *copy[:2], source, copy.target_strides, place)
                    )
    return parts, moves


def _rows_read_twice(parts: Sequence[Part]) -> set[int]:
    """Rows of which parts, sorted by place, overlap."""
    rows: set[int] = set()
    file = stop = -1
    for part in parts:
        if part.file == file and part.offset_bytes < stop:
            rows.add(part.row)
            stop = max(stop, part.offset_bytes + part.nbytes)
        else:
            file, stop = part.file, part.offset_bytes + part.nbytes
    return rows


def _as_move(part: Part, checkpoint: Checkpoint) -> Move:
    dtype = checkpoint.dtypes[part.row]
    size = itemsize(dtype)
    source = (part.offset_bytes - checkpoint.offsets[part.row]) // size
    return Move(part.target, dtype, (part.nbytes // size,), (1,), source, (1,), part.start_bytes // size)


# --- bytes that only move -------------------------------------------------------------------------


def runs(parts: Sequence[Part], limit: int) -> Iterator[Job]:
    """Neighbours in one job of at most ``limit`` bytes, large tensors over several."""
    run: list[Part] = []
    nbytes = stop = 0
    for whole in parts:
        for part in chopped(whole, limit):
            gap = part.offset_bytes - stop
            # Every part may need a junk buffer before it.
            full = nbytes + part.nbytes > limit or 2 * len(run) + 2 > system.IOV_MAX
            if run and (full or part.file != run[0].file or not 0 <= gap <= GAP_BYTES):
                yield Job(run, [], 0)
                run, nbytes = [], 0
            run.append(part)
            nbytes += part.nbytes
            stop = part.offset_bytes + part.nbytes
    if run:
        yield Job(run, [], 0)


def portion(total_bytes: int, threads: int) -> int:
    """Bytes of a job: enough jobs for all threads to end at about the same time, none tiny."""
    return max(_LEAST_RUN_BYTES, min(_RUN_BYTES, total_bytes // (4 * threads)))


def chopped(part: Part, limit: int) -> Iterator[Part]:
    if part.nbytes <= limit:
        yield part
        return
    for done in range(0, part.nbytes, limit):
        yield part._replace(
            offset_bytes=part.offset_bytes + done,
            nbytes=min(limit, part.nbytes - done),
            start_bytes=part.start_bytes + done,
        )


# --- bytes that go through scratch ----------------------------------------------------------------


def staged(moves: dict[int, list[Move]], checkpoint: Checkpoint, limit: int) -> Iterator[Job]:
    """Slabs of sources, several to a job while they fit into ``limit`` bytes of scratch and lie in one file.

    Each slab starts at a multiple of 64 bytes.
    """
    file_ids, offsets = checkpoint.file_ids, checkpoint.offsets
    job, used = Job([], [], 0), 0
    for row in sorted(moves, key=lambda row: (file_ids[row], offsets[row])):
        file, base = file_ids[row], offsets[row]
        size = itemsize(checkpoint.dtypes[row])
        for start, stop, cut in slabs(moves[row], limit // size):
            place = -(-used // _ALIGN_BYTES) * _ALIGN_BYTES
            end = place + (stop - start) * size
            if job.parts and (end > limit or file != job.parts[0].file):
                yield job._replace(scratch_bytes=used)
                job, place, end = Job([], [], 0), 0, (stop - start) * size
            for first, last in _ranges(cut, GAP_BYTES // size):
                at = place + (first - start) * size
                nbytes = (last - first) * size
                job.parts.append(Part(file, base + first * size, nbytes, SCRATCH, at, row))
            shift = place // size - start
            job.moves.extend(Move(*m[:4], m.source_offset + shift, *m[5:]) for m in cut)
            used = end
    if job.parts:
        yield job._replace(scratch_bytes=used)


def slabs(moves: Sequence[Move], capacity: int) -> Iterator[tuple[int, int, list[Move]]]:
    """Cut a source into ranges of at most ``capacity`` elements, each with what moves read there.

    No part reads outside its range and no element that is read twice lies in two ranges. Moves are
    cut along the dimension that walks the source in the largest steps; one whose steps are wider
    than ``capacity``, or that shares no cut with the others, is first taken apart into its steps.
    """
    start, stop = reads(moves)
    if stop - start <= capacity:
        yield start, stop, list(moves)
        return
    todo = list(moves)
    while todo:
        start = min(move.source_offset for move in todo)
        cut = _common_cut(todo, start, start + capacity)
        if cut <= start:
            near = [n for n, move in enumerate(todo) if move.source_offset < start + capacity]
            widest = max(near, key=lambda n: _walk(*todo[n][2:4]).width)
            todo[widest : widest + 1] = _taken_apart(todo[widest])
            continue
        head: list[Move] = []
        tail: list[Move] = []
        for move in todo:
            _divide(move, cut, head, tail)
        yield *reads(head), head
        todo = tail


class _Walk(NamedTuple):
    """How a move walks its source: ``size`` steps along ``dim``, each ``width`` elements wide."""

    dim: int
    size: int
    stride: int
    width: int
    span: int
    """Elements from the first to the last that is read."""


@lru_cache(maxsize=1024)
def _walk(shape: tuple[int, ...], strides: tuple[int, ...]) -> _Walk:
    """The walk along the dimension with the largest stride; moves share shapes, so few are computed."""
    dims = [d for d, size in enumerate(shape) if size > 1 and strides[d]]
    if not dims:
        return _Walk(-1, 1, 1, 1, 1)
    dim = max(dims, key=lambda d: strides[d])
    size, stride = shape[dim], strides[dim]
    span = reach(shape, strides) + 1
    return _Walk(dim, size, stride, span - (size - 1) * stride, span)


def reads(moves: Sequence[Move]) -> tuple[int, int]:
    """The range of elements between the first and the last that any move reads."""
    start, stop = moves[0].source_offset, 0
    for _, _, shape, strides, offset, _, _ in moves:
        start = min(start, offset)
        stop = max(stop, offset + _walk(shape, strides).span)
    return start, stop


def _common_cut(moves: Sequence[Move], start: int, cut: int) -> int:
    """The last element <= ``cut`` that cuts no step of any move in two, if above ``start``."""
    while cut > start:
        lower = min(_own_cut(move, cut) for move in moves)
        if lower == cut:
            break
        cut = lower
    return cut


def _own_cut(move: Move, cut: int) -> int:
    _, _, stride, width, span = _walk(move.shape, move.source_strides)
    first = move.source_offset
    if cut <= first or cut >= first + span:
        return cut
    if width > stride:  # steps overlap: nowhere
        return first
    step = first + (cut - first) // stride * stride
    return step if cut < step + width else cut


def _taken_apart(move: Move) -> list[Move]:
    dim, size, stride, _, _ = _walk(move.shape, move.source_strides)
    shape, source, target = (
        (*column[:dim], *column[dim + 1 :]) for column in (move.shape, move.source_strides, move.target_strides)
    )
    return [
        move._replace(
            shape=shape,
            source_strides=source,
            source_offset=move.source_offset + i * stride,
            target_strides=target,
            target_offset=move.target_offset + i * move.target_strides[dim],
        )
        for i in range(size)
    ]


def _divide(move: Move, cut: int, head: list[Move], tail: list[Move]) -> None:
    """Put the steps that start below ``cut`` into ``head`` and the others into ``tail``."""
    dim, size, stride, _, _ = _walk(move.shape, move.source_strides)
    below = min(size, max(0, -((move.source_offset - cut) // stride)))
    if below == size:
        head.append(move)
    elif below == 0:
        tail.append(move)
    else:
        head.append(_canonical(_narrowed(move, dim, 0, below)))
        tail.append(_narrowed(move, dim, below, size - below))


def _narrowed(move: Move, dim: int, first: int, size: int) -> Move:
    return move._replace(
        shape=(*move.shape[:dim], size, *move.shape[dim + 1 :]),
        source_offset=move.source_offset + first * move.source_strides[dim],
        target_offset=move.target_offset + first * move.target_strides[dim],
    )


def _canonical(move: Move) -> Move:
    return Move(*move[:2], *canonical(Piece(0, *move[2:]))[1:])


def _ranges(moves: Sequence[Move], gap: int) -> list[tuple[int, int]]:
    """The elements that moves read, as ranges with more than ``gap`` elements between them."""
    spans: list[tuple[int, int]] = []
    for move in moves:
        _, size, stride, width, span = _walk(move.shape, move.source_strides)
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
