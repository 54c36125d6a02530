"""Schedule a load to a GPU: turn the copies of all targets into chunks to read and windows to empty; pure.

A chunk is read into pinned memory and uploaded from there. Bytes that only move are uploaded straight to their final
place. All other bytes are uploaded to a window of device memory, and copied or decoded from there once the window is
full. So each byte is read and uploaded once. Chunks and windows follow the order of the files, quantized sources last.
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
from automodel_conv.schedule.host import group_reads, slab_jobs, split_copies
from automodel_conv.schedule.jobs import Copies, Read, Reads, concatenate, group_moves


class Upload(NamedTuple):
    """A range of bytes of a slot of pinned memory, and the place in a target or a window that it goes to."""

    slot_start: int
    """Offset of the first byte in the slot."""
    nbytes: int
    start_bytes: int
    """Offset of the first byte in the target or the window."""


class Chunk(NamedTuple):
    """The unit of reading and uploading: reads that fill a slot one after another, and the uploads out of it."""

    reads: Reads
    """In order of file and offset; the slot is the only memory."""
    nbytes: int
    to_targets: dict[int, list[Upload]]
    """Uploads to the final place of bytes, by number of the target."""
    to_windows: dict[int, list[Upload]]
    """Uploads to windows, by number of the window, ascending."""


class Window(NamedTuple):
    """One filling of a region of device memory by chunks, and the decoding and copies that then empty the region.

    A load has many windows and few regions, which the windows use in rotation. Offsets count from the start of the
    region.
    """

    copies: Sequence[Copies]
    """Copies from the window to the targets, after decoding."""
    nbytes: int
    chunks: int
    """Number of chunks that fill the window."""
    scale_groups: Mapping[ScaleKind, ScaleGroup]
    """The scales in the window, by kind; empty if no source in it is quantized."""
    rectangles: Mapping[Rectangle, Sequence[Position]]
    """The codes in the window: the places of all rectangles of each geometry."""

    @property
    def targets(self) -> set[int]:
        """Numbers of the tensors that the window writes."""
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
    """Return all chunks of a load and the windows that they fill.

    No chunk that fills a window precedes a chunk that fills an earlier window. So an executor that reads chunks in this
    order can wait, before it fills a window, until an earlier window is emptied.

    Args:
        targets: the tensors to fill.
        copies: the copies of each target, with the strides of its buffer.
        checkpoint: the sources.
        decodes: the ``Decode`` of each quantized source, by row.
        slot_bytes: maximum bytes of a chunk.
        window_bytes: maximum bytes of a window; a multiple of 64.

    Raises:
        ConversionError: ``window_bytes`` is too small for a quantized source.
    """
    in_place, moves = split_copies(targets, copies, checkpoint, decodes)
    first_window = len(targets)  # memories of reads are numbered: targets first, then windows
    plain = {row: row_moves for row, row_moves in moves.items() if row not in decodes}
    coded = {row: row_moves for row, row_moves in moves.items() if row in decodes}
    jobs = list(slab_jobs(plain, checkpoint, window_bytes))
    to_windows = [job.reads._replace(memory=job.reads.memory + first_window + n) for n, job in enumerate(jobs)]
    reads = concatenate([in_place, *to_windows]).in_order()
    coded_windows = list(code_windows(coded, checkpoint, decodes, window_bytes, first_window + len(jobs)))
    chunks = [_chunk(run, first_window) for run in group_reads(reads, slot_bytes)]
    chunks += [_chunk(packed, first_window) for packed in _pack((window.reads for window in coded_windows), slot_bytes)]
    chunks_of_window = Counter(window for chunk in chunks for window in chunk.to_windows)
    windows = [Window(job.copies, job.scratch_bytes, chunks_of_window[n], {}, {}) for n, job in enumerate(jobs)]
    windows += [
        Window(group_moves(window.moves), window.nbytes, chunks_of_window[n], window.groups, window.rectangles)
        for n, window in enumerate(coded_windows, len(jobs))
    ]
    return chunks, windows


def _pack(windows: Iterable[Sequence[Read]], limit: int) -> Iterator[Reads]:
    """Pack the reads of one window after another into chunks of ``limit`` bytes.

    The reads of a chunk may be far apart in the files, as scales and codes are, so that a chunk needs several calls.
    """
    chunk: list[Read] = []
    room = limit
    for reads in windows:
        for file, offset, nbytes, memory, start in sorted(reads):
            while nbytes:
                part = min(nbytes, room)
                chunk.append(Read(file, offset, part, memory, start))
                offset, start, nbytes, room = offset + part, start + part, nbytes - part, room - part
                if not room or len(chunk) == IOV_MAX // 2:
                    yield Reads.from_list(sorted(chunk))
                    chunk, room = [], limit
    if chunk:
        yield Reads.from_list(sorted(chunk))


def _chunk(reads: Reads, first_window: int) -> Chunk:
    """Return the chunk that fills a slot with reads, one after another.

    Args:
        reads: reads into targets and windows, in order.
        first_window: number of the first memory that is a window.
    """
    slot_starts = np.cumsum(reads.nbytes) - reads.nbytes
    to_targets: dict[int, list[Upload]] = {}
    to_windows: dict[int, list[Upload]] = {}
    columns = np.array((reads.memory, slot_starts, reads.nbytes, reads.start_bytes))
    for memory, slot_start, nbytes, start in columns.T.tolist():
        side, number = (to_targets, memory) if memory < first_window else (to_windows, memory - first_window)
        _append(side.setdefault(number, []), Upload(slot_start, nbytes, start))
    into_slot = Reads(reads.file, reads.offset_bytes, reads.nbytes, np.zeros_like(slot_starts), slot_starts)
    return Chunk(into_slot, into_slot.total_bytes, to_targets, dict(sorted(to_windows.items())))


def _append(uploads: list[Upload], upload: Upload) -> None:
    """Append an upload, or lengthen the last upload if this one continues it on both sides."""
    if uploads:
        slot_start, nbytes, start_bytes = uploads[-1]
        if (slot_start + nbytes, start_bytes + nbytes) == (upload.slot_start, upload.start_bytes):
            uploads[-1] = Upload(slot_start, nbytes + upload.nbytes, start_bytes)
            return
    uploads.append(upload)
