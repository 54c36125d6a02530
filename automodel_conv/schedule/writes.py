"""Schedule the writing of files: slabs are ranges of an output file that are made and written in any order.

Pure: integers in, integers out. A slab is made either of bytes that only move, or of copies that permute or cast and so
fill memory first. No byte is in two slabs, and every byte that a copy makes is in one. Where the copies make only part
of a target, as on one of several ranks, the bytes between are left alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import NamedTuple, Protocol

import numpy as np

from automodel_conv.dtypes import itemsize
from automodel_conv.files.full_io import IOV_MAX
from automodel_conv.planning.boxes import Box
from automodel_conv.planning.copies import Decode, StridedCopy, Target
from automodel_conv.schedule.cutting import reads, slabs
from automodel_conv.schedule.jobs import Move, Read

# As large as a call to the system is worth, and as the cache takes beside what is read.
_SLAB_BYTES = 8 << 20
_NONE: Mapping[int, Decode] = {}


class SourceLocations(Protocol):
    """Where sources lie: by row, the dtype, the file (or whatever holds it) and its first byte there."""

    @property
    def dtypes(self) -> Sequence[str]: ...
    @property
    def file_ids(self) -> Sequence[int]: ...
    @property
    def offsets(self) -> Sequence[int]: ...


class Slab(NamedTuple):
    """A range of an output file; ``reads`` or ``moves`` fill it, the other is empty.

    Places in ``reads`` count bytes, those in ``moves`` elements, both from the slab's first byte. The slab is the only
    memory of the reads; ``target`` of a move is the row of its dtype in ``Slabs.dtypes``.
    """

    file: int
    offset_bytes: int
    nbytes: int
    reads: list[Read]
    moves: dict[int, list[Move]]  # by source row
    sparse_itemsize: int = 0
    """Bytes of an element, if moves leave some of the slab alone (see ``filled_ranges``); 0: they fill all of it."""


class Slabs(NamedTuple):
    """All slabs, in the order of the files, and the dtypes that their moves write."""

    slabs: list[Slab]
    dtypes: tuple[str, ...]

    def by_file(self) -> dict[int, list[Slab]]:
        groups: dict[int, list[Slab]] = {}
        for slab in self.slabs:
            groups.setdefault(slab.file, []).append(slab)
        return groups


def slab_schedule(
    targets: Sequence[Target],
    copies: Sequence[Sequence[StridedCopy]],
    sources: SourceLocations,
    places: Sequence[tuple[int, int]],
    decodes: Mapping[int, Decode] = _NONE,
    *,
    most_bytes: int,
) -> Slabs:
    """The slabs that write all targets.

    Args:
        copies: of each target, as contiguous tensors or aimed at where the sources really lie.
        places: of each target, the output file and the byte of it where the target's data begins, any byte.
        decodes: of the sources that are quantized, by row.
        most_bytes: of a slab that is made in memory; larger targets are cut where no copy is cut through, if that can
            be.
    """
    dtypes = tuple(sorted({target.dtype for target in targets}))
    sizes = [itemsize(dtype) for dtype in dtypes]
    made: list[Slab] = []
    group: list[Slab] = []
    nbytes = 0
    for number in sorted(range(len(targets)), key=lambda number: places[number]):
        target, (file, begin) = targets[number], places[number]
        filled = list(_fills(target, copies[number], sources, decodes))
        if all(fill.box.is_run and fill.dtype == target.dtype and fill.row not in decodes for fill in filled):
            pieces = _direct(filled, file, begin, sources, min(_SLAB_BYTES, most_bytes))
        else:
            pieces = _in_memory(filled, file, begin, itemsize(target.dtype), dtypes.index(target.dtype), most_bytes)
        for piece in pieces:
            if group and not _joins(group, nbytes, piece, min(_SLAB_BYTES, most_bytes), target.dtype):
                made.append(_joined(group, nbytes, sizes))
                group, nbytes = [], 0
            group.append(piece)
            nbytes += piece.nbytes
    if group:
        made.append(_joined(group, nbytes, sizes))
    return Slabs(made, dtypes)


def filled_ranges(slab: Slab) -> list[tuple[int, int]]:
    """What the moves of a sparse slab fill, as runs: first byte from the slab's own on, and length.

    Computed when a slab is written: where ranks hold columns there is a run for each row of a model.
    """
    elements, lengths = [], []
    for move in chain.from_iterable(slab.moves.values()):
        run, offsets = 1, np.array([move.target_offset])
        for stride, count in sorted(zip(move.box.target_strides, move.box.shape, strict=True)):
            if stride == run:
                run *= count
            else:
                offsets = (offsets[:, None] + np.arange(count) * stride).reshape(-1)
        elements.append(offsets)
        lengths.append(np.full(len(offsets), run))
    firsts, counts = (np.concatenate(column) * slab.sparse_itemsize for column in (elements, lengths))
    order = np.argsort(firsts)
    firsts, counts = firsts[order], counts[order]
    begins = np.flatnonzero(np.append(True, firsts[1:] != firsts[:-1] + counts[:-1]))
    return list(zip(firsts[begins].tolist(), np.add.reduceat(counts, begins).tolist(), strict=True))


class _Fill(NamedTuple):
    """A copy with its sides swapped, so that it is cut along the target.

    ``source_offset`` and the source side of the box are places in the target; ``target_offset`` and the target side are
    places in the source.
    """

    row: int
    dtype: str
    """That the source is read as."""
    box: Box
    source_offset: int
    target_offset: int


def _fills(
    target: Target, copies: Sequence[StridedCopy], sources: SourceLocations, decodes: Mapping[int, Decode]
) -> Iterator[_Fill]:
    for copy in copies:
        box = copy.box.inverse()
        for ordinal, source, place in zip(copy.ordinals, copy.source_offsets, copy.target_offsets, strict=True):
            row = target.sources[ordinal]
            yield _Fill(row, target.dtype if row in decodes else sources.dtypes[row], box, place, source)


def _direct(filled: Sequence[_Fill], file: int, begin: int, sources: SourceLocations, limit: int) -> Iterator[Slab]:
    for row, dtype, box, place, source in sorted(filled, key=lambda fill: fill.source_offset):
        size = itemsize(dtype)
        nbytes = box.numel * size
        for done in range(0, nbytes, limit):
            length = min(limit, nbytes - done)
            read = Read(sources.file_ids[row], sources.offsets[row] + source * size + done, length, 0, 0)
            yield Slab(file, begin + place * size + done, length, [read], {})


def _in_memory(
    filled: Sequence[_Fill], file: int, begin: int, size: int, dtype: int, most_bytes: int
) -> Iterator[Slab]:
    for block in _blocks(filled):
        for start, stop, cut in slabs(block, most_bytes // size):
            moves: dict[int, list[Move]] = {}
            for fill in cut:
                move = Move(dtype, fill.dtype, fill.box.inverse(), fill.target_offset, fill.source_offset - start)
                moves.setdefault(fill.row, []).append(move)
            sparse = sum(fill.box.numel for fill in cut) < stop - start
            yield Slab(file, begin + start * size, (stop - start) * size, [], moves, size if sparse else 0)


def _blocks(filled: Iterable[_Fill]) -> Iterator[list[_Fill]]:
    """Copies whose ranges of the target overlap, in the order of the target."""
    block: list[_Fill] = []
    end = 0
    for fill in sorted(filled, key=lambda fill: fill.source_offset):
        start, stop = reads([fill])
        if block and start >= end:
            yield block
            block = []
        block.append(fill)
        end = max(end, stop)
    if block:
        yield block


def _joins(group: Sequence[Slab], nbytes: int, piece: Slab, limit: int, dtype: str) -> bool:
    """Whether a piece joins those before it: all alike, without gaps, few and small, its elements in their places."""
    first, last = group[0], group[-1]
    follows = first.file == piece.file and last.offset_bytes + last.nbytes == piece.offset_bytes
    small = nbytes + piece.nbytes <= limit and len(group) < IOV_MAX
    if first.sparse_itemsize or piece.sparse_itemsize:
        return False
    return follows and small and bool(first.reads) == bool(piece.reads) and nbytes % itemsize(dtype) == 0


def _joined(group: Sequence[Slab], nbytes: int, sizes: Sequence[int]) -> Slab:
    first = group[0]
    read: list[Read] = []
    moves: dict[int, list[Move]] = {}
    for piece in group:
        shift = piece.offset_bytes - first.offset_bytes
        read += [one._replace(start_bytes=one.start_bytes + shift) for one in piece.reads]
        for row, group_moves in piece.moves.items():
            moves.setdefault(row, []).extend(
                move._replace(target_offset=move.target_offset + shift // sizes[move.target]) for move in group_moves
            )
    return Slab(first.file, first.offset_bytes, nbytes, read, moves, first.sparse_itemsize)
