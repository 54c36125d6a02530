"""Schedule a load to a GPU: chunks to read and windows to empty, in the order of the files.

Pure: integers in, integers out. A chunk is read into pinned memory and uploaded from there: bytes that only move
straight to their final place, all others to a window of device memory, from which copies take them once it is full. So
each byte is read and uploaded once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from automodel_conv.files.checkpoint import Checkpoint
from automodel_conv.files.full_io import IOV_MAX
from automodel_conv.planning.copies import Decode, StridedCopy, Target
from automodel_conv.schedule.code_slabs import Position, Rectangle, ScaleKind
from automodel_conv.schedule.code_windows import ScaleGroup, code_windows
from automodel_conv.schedule.host import divide, runs, slab_jobs
from automodel_conv.schedule.jobs import Copies, Read, Reads, concatenate, group_moves


class Upload(NamedTuple):
    """Bytes of a slot of pinned memory, and where in a target or a window they go."""

    slot_start: int
    nbytes: int
    start_bytes: int


class Chunk(NamedTuple):
    """What is read at once, one read after the other into a slot, and uploaded from it."""

    reads: Reads
    """In order; the slot is their only memory."""
    nbytes: int
    to_targets: dict[int, list[Upload]]
    to_windows: dict[int, list[Upload]]  # ascending


class Window(NamedTuple):
    """Copies out of a piece of device memory, once ``chunks`` chunks have filled it; offsets count from its start."""

    copies: Sequence[Copies]
    nbytes: int
    chunks: int
    scale_groups: Mapping[ScaleKind, ScaleGroup]
    """The scales in it."""
    rectangles: Mapping[Rectangle, Sequence[Position]]
    """The codes in it, to be decoded before the copies."""

    @property
    def targets(self) -> set[int]:
        """The tensors that it writes."""
        decoded = (places for rectangle, places in self.rectangles.items() if not rectangle.in_window)
        return {copies.target for copies in self.copies} | {place.target for places in decoded for place in places}


def device_schedule(
    targets: Sequence[Target],
    copies: Sequence[Sequence[StridedCopy]],
    checkpoint: Checkpoint,
    decodes: Mapping[int, Decode],
    *,
    slot_bytes: int,
    window_bytes: int,
) -> tuple[list[Chunk], list[Window]]:
    """All chunks of a load and the windows they fill.

    A chunk that fills a window comes at or after every chunk that fills an earlier one. So whoever takes chunks in this
    order may wait, before it fills a window, until an earlier one has been emptied.

    Args:
        copies: of each target, aimed at its buffer.
        decodes: of the sources that are quantized, by row.
        slot_bytes: of a chunk, at most.
        window_bytes: of a window, at most; a multiple of 64.

    Raises:
        ConversionError: ``window_bytes`` is too small for a quantized source.
    """
    in_place, moves = divide(targets, copies, checkpoint, decodes)
    first = len(targets)  # the memories of all reads here: the targets, then the windows
    plain = {row: of_row for row, of_row in moves.items() if row not in decodes}
    coded = {row: of_row for row, of_row in moves.items() if row in decodes}
    jobs = list(slab_jobs(plain, checkpoint, window_bytes))
    to_windows = [job.reads._replace(memory=job.reads.memory + first + number) for number, job in enumerate(jobs)]
    reads = concatenate([in_place, *to_windows]).in_order()
    of_codes = list(code_windows(coded, checkpoint, decodes, window_bytes, first + len(jobs)))
    chunks = [_chunk(run, first) for run in runs(reads, slot_bytes)]
    chunks += [_chunk(some, first) for some in _packed((window.reads for window in of_codes), slot_bytes)]
    filled = Counter(window for chunk in chunks for window in chunk.to_windows)
    windows = [Window(job.copies, job.scratch_bytes, filled[n], {}, {}) for n, job in enumerate(jobs)]
    windows += [
        Window(group_moves(window.moves), window.nbytes, filled[n], window.groups, window.rectangles)
        for n, window in enumerate(of_codes, len(jobs))
    ]
    return chunks, windows


def _packed(windows: Iterable[Sequence[Read]], limit: int) -> Iterator[Reads]:
    """The reads of windows, one window after another, in chunks of ``limit`` bytes, wherever in the files they lie.

    Scales and codes may lie far apart, so one chunk takes several calls.
    """
    chunk: list[Read] = []
    room = limit
    for reads in windows:
        for file, offset, nbytes, memory, start in sorted(reads):
            while nbytes:
                taken = min(nbytes, room)
                chunk.append(Read(file, offset, taken, memory, start))
                offset, start, nbytes, room = offset + taken, start + taken, nbytes - taken, room - taken
                if not room or len(chunk) == IOV_MAX // 2:
                    yield Reads.from_list(sorted(chunk))
                    chunk, room = [], limit
    if chunk:
        yield Reads.from_list(sorted(chunk))


def _chunk(reads: Reads, first_window: int) -> Chunk:
    at = np.cumsum(reads.nbytes) - reads.nbytes
    to_targets: dict[int, list[Upload]] = {}
    to_windows: dict[int, list[Upload]] = {}
    for memory, slot_start, nbytes, start in np.array((reads.memory, at, reads.nbytes, reads.start_bytes)).T.tolist():
        side, number = (to_targets, memory) if memory < first_window else (to_windows, memory - first_window)
        _append(side.setdefault(number, []), Upload(slot_start, nbytes, start))
    into_slot = Reads(reads.file, reads.offset_bytes, reads.nbytes, np.zeros_like(at), at)
    return Chunk(into_slot, into_slot.total_bytes, to_targets, dict(sorted(to_windows.items())))


def _append(uploads: list[Upload], upload: Upload) -> None:
    """Add an upload, or lengthen the last one if this continues it on both sides."""
    if uploads:
        slot_start, nbytes, start_bytes = uploads[-1]
        if (slot_start + nbytes, start_bytes + nbytes) == (upload.slot_start, upload.start_bytes):
            uploads[-1] = Upload(slot_start, nbytes + upload.nbytes, start_bytes)
            return
    uploads.append(upload)
