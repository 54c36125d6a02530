"""Schedule the writing of output files: turn the copies of all targets into slabs; pure.

A slab is a range of an output file; slabs can be written in any order. A slab is filled by reads of unchanged bytes, in
memory by copies that permute or cast, or with zeros. Slabs do not overlap, and every byte that a copy writes is in one
of them. If the copies write only part of a target, as on one of several ranks, the bytes in between are not written.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import NamedTuple, Protocol

import numpy as np

from automodel_conv.dtypes import itemsize
from automodel_conv.errors import UnsupportedError, message
from automodel_conv.files.full_io import IOV_MAX
from automodel_conv.planning.boxes import Box
from automodel_conv.planning.copies import Decode, StridedCopy, Target
from automodel_conv.schedule.cutting import read_range, slabs
from automodel_conv.schedule.jobs import Move, Read

# Large enough for a system call to pay off, small enough to stay in the cache next to what is read.
_SLAB_BYTES = 8 << 20
_NO_DECODES: Mapping[int, Decode] = {}


class SourceLocations(Protocol):
    """The dtype, file and offset of each source, in columns by source row; a ``Checkpoint`` is an implementation."""

    @property
    def dtypes(self) -> Sequence[str]:
        """Dtype code of each source."""
        ...

    @property
    def file_ids(self) -> Sequence[int]:
        """Number of the file that holds each source, or of the tensor if sources are in memory."""
        ...

    @property
    def offsets(self) -> Sequence[int]:
        """Offset of the first byte of each source in its file."""
        ...


class Slab(NamedTuple):
    """A range of an output file, filled either by ``reads`` or by ``moves``; if both are empty, with zeros.

    Offsets count from the first byte of the slab: in bytes for reads, in elements for moves.
    """

    file: int
    """Number of the output file."""
    offset_bytes: int
    """Offset of the first byte in the output file."""
    nbytes: int
    reads: list[Read]
    """Reads of unchanged bytes; the slab is the only memory of the reads."""
    moves: dict[int, list[Move]]
    """Copies that permute or cast, by source row; a move's ``target`` is the index of its dtype in ``Slabs.dtypes``."""
    sparse_itemsize: int = 0
    """Bytes of an element if the moves fill only part of the slab (see ``filled_ranges``); 0 if they fill all of it."""

    @property
    def is_zeros(self) -> bool:
        """Whether all bytes are zero."""
        return not self.reads and not self.moves


class Slabs(NamedTuple):
    """All slabs, in the order of the output files, and the dtypes that their moves write."""

    slabs: list[Slab]
    dtypes: tuple[str, ...]
    """Dtype codes of the targets, sorted."""

    def by_file(self) -> dict[int, list[Slab]]:
        """Return the slabs of each output file, by its number."""
        groups: dict[int, list[Slab]] = {}
        for slab in self.slabs:
            groups.setdefault(slab.file, []).append(slab)
        return groups


def slab_schedule(
    targets: Sequence[Target],
    copies: Sequence[Sequence[StridedCopy]],
    sources: SourceLocations,
    places: Sequence[tuple[int, int]],
    decodes: Mapping[int, Decode] = _NO_DECODES,
    *,
    most_bytes: int,
) -> Slabs:
    """Return the slabs that write all targets.

    Args:
        targets: the tensors to write.
        copies: the copies of each target, from sources that are contiguous or have the strides they have in memory.
        sources: dtype, file and offset of each source.
        places: for each target, the number of its output file and the byte of that file where its data starts. The
            byte needs no alignment.
        decodes: the ``Decode`` of each quantized source, by row.
        most_bytes: maximum bytes of a slab that is filled in memory. Larger targets are cut where no copy is cut in
            two, if possible.
    """
    dtypes = tuple(sorted({target.dtype for target in targets}))
    sizes = [itemsize(dtype) for dtype in dtypes]
    finished: list[Slab] = []
    group: list[Slab] = []
    nbytes = 0
    for number in sorted(range(len(targets)), key=lambda number: places[number]):
        target, (file, begin) = targets[number], places[number]
        swapped = list(_swap_copies(target, copies[number], sources, decodes))
        if all(copy.box.is_run and copy.dtype == target.dtype and copy.row not in decodes for copy in swapped):
            pieces = _slabs_of_reads(swapped, file, begin, sources, min(_SLAB_BYTES, most_bytes))
        else:
            size, dtype = itemsize(target.dtype), dtypes.index(target.dtype)
            pieces = _slabs_of_moves(swapped, file, begin, size, dtype, most_bytes)
        for piece in chain(pieces, _slabs_of_zeros(target, file, begin, most_bytes)):
            if group and not _can_join(group, nbytes, piece, min(_SLAB_BYTES, most_bytes), target.dtype):
                finished.append(_join(group, nbytes, sizes))
                group, nbytes = [], 0
            group.append(piece)
            nbytes += piece.nbytes
    if group:
        finished.append(_join(group, nbytes, sizes))
    return Slabs(finished, dtypes)


def filled_ranges(slab: Slab) -> list[tuple[int, int]]:
    """Return the ranges of bytes that the moves of a sparse slab fill: offset in the slab, and length.

    They are computed only when a slab is written: if ranks hold columns, a model has one range for each row.
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


class _SwappedCopy(NamedTuple):
    """A copy with its sides swapped, so that ``slabs`` cuts it along the target.

    ``source_offset`` and the source side of the box belong to the target. ``target_offset`` and the target side belong
    to the source.
    """

    row: int
    """Source row."""
    dtype: str
    """Dtype code that the source is read or decoded as."""
    box: Box
    source_offset: int
    target_offset: int


def _swap_copies(
    target: Target, copies: Sequence[StridedCopy], sources: SourceLocations, decodes: Mapping[int, Decode]
) -> Iterator[_SwappedCopy]:
    for copy in copies:
        box = copy.box.inverse()
        for ordinal, source, place in zip(copy.ordinals, copy.source_offsets, copy.target_offsets, strict=True):
            row = target.sources[ordinal]
            yield _SwappedCopy(row, target.dtype if row in decodes else sources.dtypes[row], box, place, source)


def _slabs_of_reads(
    swapped: Sequence[_SwappedCopy], file: int, begin: int, sources: SourceLocations, limit: int
) -> Iterator[Slab]:
    """Return slabs of one read each, of at most ``limit`` bytes, for a target that starts at byte ``begin``."""
    for row, dtype, box, place, source in sorted(swapped, key=lambda copy: copy.source_offset):
        size = itemsize(dtype)
        nbytes = box.numel * size
        for done in range(0, nbytes, limit):
            length = min(limit, nbytes - done)
            read = Read(sources.file_ids[row], sources.offsets[row] + source * size + done, length, 0, 0)
            yield Slab(file, begin + place * size + done, length, [read], {})


def _slabs_of_zeros(target: Target, file: int, begin: int, most_bytes: int) -> Iterator[Slab]:
    """Yield the slabs of the zeros of a target that starts at byte ``begin``.

    Raises:
        UnsupportedError: its constants are not runs of zeros.
    """
    size = itemsize(target.dtype)
    for fill in target.fills:
        if str(fill.value) == "-0.0" or fill.value or fill.strides not in ((1,), ()):
            text, do = (
                f"{target.name} has constants that cannot be written to files",
                "load the tensors in this form instead",
            )
            raise UnsupportedError(message(text, found=fill, do=do))
        stop = (fill.offset + fill.numel) * size
        for start in range(fill.offset * size, stop, most_bytes):
            yield Slab(file, begin + start, min(most_bytes, stop - start), [], {})


def _slabs_of_moves(
    swapped: Sequence[_SwappedCopy], file: int, begin: int, size: int, dtype: int, most_bytes: int
) -> Iterator[Slab]:
    """Return slabs of moves for a target that starts at byte ``begin``.

    Args:
        swapped: the copies of the target.
        file: number of the output file.
        begin: byte of the output file where the target starts.
        size: bytes of an element of the target.
        dtype: index of the target's dtype in ``Slabs.dtypes``.
        most_bytes: maximum bytes of a slab.
    """
    for group in _overlapping(swapped):
        for start, stop, parts in slabs(group, most_bytes // size):
            moves: dict[int, list[Move]] = {}
            for copy in parts:
                move = Move(dtype, copy.dtype, copy.box.inverse(), copy.target_offset, copy.source_offset - start)
                moves.setdefault(copy.row, []).append(move)
            sparse = sum(copy.box.numel for copy in parts) < stop - start
            yield Slab(file, begin + start * size, (stop - start) * size, [], moves, size if sparse else 0)


def _overlapping(swapped: Iterable[_SwappedCopy]) -> Iterator[list[_SwappedCopy]]:
    """Group copies with overlapping ranges of the target, in the order of the target."""
    group: list[_SwappedCopy] = []
    end = 0
    for copy in sorted(swapped, key=lambda copy: copy.source_offset):
        start, stop = read_range([copy])
        if group and start >= end:
            yield group
            group = []
        group.append(copy)
        end = max(end, stop)
    if group:
        yield group


def _can_join(group: Sequence[Slab], nbytes: int, piece: Slab, limit: int, dtype: str) -> bool:
    """Return whether a slab can be joined to those before it.

    It can if it follows them without a gap and is filled in the same way, if all together are few and small, and if its
    elements are aligned in the joined slab.
    """
    first, last = group[0], group[-1]
    follows = first.file == piece.file and last.offset_bytes + last.nbytes == piece.offset_bytes
    small = nbytes + piece.nbytes <= limit and len(group) < IOV_MAX
    if first.sparse_itemsize or piece.sparse_itemsize:
        return False
    same_kind = bool(first.reads) == bool(piece.reads) and first.is_zeros == piece.is_zeros
    return follows and small and same_kind and nbytes % itemsize(dtype) == 0


def _join(group: Sequence[Slab], nbytes: int, sizes: Sequence[int]) -> Slab:
    """Join adjacent slabs of one file; ``sizes`` are the bytes of an element of each dtype in ``Slabs.dtypes``."""
    first = group[0]
    reads: list[Read] = []
    moves: dict[int, list[Move]] = {}
    for piece in group:
        shift = piece.offset_bytes - first.offset_bytes
        reads += [read._replace(start_bytes=read.start_bytes + shift) for read in piece.reads]
        for row, row_moves in piece.moves.items():
            moves.setdefault(row, []).extend(
                move._replace(target_offset=move.target_offset + shift // sizes[move.target]) for move in row_moves
            )
    return Slab(first.file, first.offset_bytes, nbytes, reads, moves, first.sparse_itemsize)
