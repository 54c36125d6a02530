"""Schedule a load to the host: jobs that say which bytes of which file go where, and that run in any order.

Pure: integers in, integers out. Bytes that only move are read straight into their final place. Bytes that are permuted
or cast, or that several targets want, are read into scratch, a slab of a source at a time, and copied from there. So
each byte is read once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from automodel_conv.dtypes import itemsize
from automodel_conv.files.checkpoint import Checkpoint
from automodel_conv.files.full_io import IOV_MAX
from automodel_conv.planning.boxes import run_of
from automodel_conv.planning.copies import Decode, StridedCopy, Target
from automodel_conv.schedule.cutting import ranges, slabs
from automodel_conv.schedule.decoding import decode_jobs
from automodel_conv.schedule.jobs import (
    GAP_BYTES,
    Job,
    Move,
    Read,
    ReadAndCopy,
    ReadInPlace,
    Reads,
    align_up,
    group_moves,
)

# Threads that read near each other share what the system reads ahead: a fifth faster from a disk than runs of 32 MiB,
# and as fast from memory (docs/performance.md). Smaller ones would cost calls.
RUN_BYTES = 4 << 20
_LEAST_JOB_BYTES = 1 << 20
# Slabs that stay in the cache between the read and the copy.
_SLAB_BYTES = 8 << 20


def schedule(
    targets: Sequence[Target],
    copies: Sequence[Sequence[StridedCopy]],
    checkpoint: Checkpoint,
    decodes: Mapping[int, Decode],
    *,
    threads: int,
    slot_bytes: int,
) -> list[Job]:
    """All jobs of a load to the host, in the order of the files.

    Args:
        copies: of each target, aimed at its buffer.
        decodes: of the sources that are quantized, by row.
        slot_bytes: what a job may use of scratch, a multiple of 64.

    Raises:
        ConversionError: ``slot_bytes`` is too small for a quantized source.
    """
    in_place, moves = divide(targets, copies, checkpoint, decodes)
    jobs: list[Job] = [ReadInPlace(run) for run in runs(in_place, portion(in_place.total_bytes, threads, RUN_BYTES))]
    through_scratch = sum(checkpoint.nbytes[row] for row in moves)
    jobs += jobs_through_scratch(
        moves, checkpoint, decodes, min(slot_bytes, portion(through_scratch, threads, _SLAB_BYTES))
    )
    jobs.sort(key=lambda job: (job.reads.file[0], job.reads.offset_bytes[0]))
    return jobs


def divide(
    targets: Sequence[Target],
    copies: Sequence[Sequence[StridedCopy]],
    checkpoint: Checkpoint,
    decodes: Mapping[int, Decode],
) -> tuple[Reads, dict[int, list[Move]]]:
    """What can be read in place, in the order of the files, and by source row what cannot; no byte is in both."""
    runs_of, moves = _split(targets, copies, checkpoint.dtypes, decodes)
    reads, rows = runs_of.reads(checkpoint)
    order = np.lexsort((reads.offset_bytes, reads.file))
    reads, rows = reads.take(order), rows[order]
    shared = np.isin(rows, [*_rows_read_twice(reads, rows), *moves])
    for read, row in zip(reads.take(shared).one_by_one(), rows[shared].tolist(), strict=True):
        moves.setdefault(row, []).append(_as_move(read, row, checkpoint))
    return (reads.take(~shared) if shared.any() else reads), moves


class _Runs(NamedTuple):
    """Runs of elements that go to targets unchanged; equal runs of one target share an entry of ``groups``."""

    rows: list[int]
    source_offsets: list[int]
    target_offsets: list[int]
    groups: list[tuple[int, int, int, int]]
    """Number of the target, bytes of an element, bytes of a run, how many runs."""

    def reads(self, checkpoint: Checkpoint) -> tuple[Reads, np.ndarray]:
        """The runs as reads of files, and the source row of each."""
        groups = np.array(self.groups, np.int64).reshape(-1, 4)
        number, size, nbytes = np.repeat(groups[:, :3], groups[:, 3], axis=0).T
        columns = (self.rows, self.source_offsets, self.target_offsets)
        rows, source, target = (np.array(column, np.int64) for column in columns)
        file_ids, offsets = np.array(checkpoint.file_ids, np.int64), np.array(checkpoint.offsets, np.int64)
        return Reads(file_ids[rows], offsets[rows] + source * size, nbytes, number, target * size), rows


def _split(
    targets: Sequence[Target],
    copies: Sequence[Sequence[StridedCopy]],
    dtypes: Sequence[str],
    decodes: Mapping[int, Decode],
) -> tuple[_Runs, dict[int, list[Move]]]:
    """Runs that can be read in place, and by source row the copies that cannot."""
    found = _Runs([], [], [], [])
    moves: dict[int, list[Move]] = {}
    for number, (target, group) in enumerate(zip(targets, copies, strict=True)):
        dtype, sources, size = target.dtype, target.sources, itemsize(target.dtype)
        alike = set(map(dtypes.__getitem__, sources)) <= {dtype} and decodes.keys().isdisjoint(sources)
        for copy in group:
            box, rows = copy.box, [*map(sources.__getitem__, copy.ordinals)]
            if alike and box.is_run:
                found.rows.extend(rows)
                found.source_offsets.extend(copy.source_offsets)
                found.target_offsets.extend(copy.target_offsets)
                found.groups.append((number, size, box.numel * size, len(rows)))
                continue
            for row, source, place in zip(rows, copy.source_offsets, copy.target_offsets, strict=True):
                if row not in decodes and dtypes[row] == dtype and box.is_run:
                    found.rows.append(row)
                    found.source_offsets.append(source)
                    found.target_offsets.append(place)
                    found.groups.append((number, size, box.numel * size, 1))
                else:
                    read_as = dtype if row in decodes else dtypes[row]
                    moves.setdefault(row, []).append(Move(number, read_as, box, source, place))
    return found, moves


def _rows_read_twice(reads: Reads, rows: np.ndarray) -> list[int]:
    """Source rows whose reads overlap; the reads are in order."""
    if not len(rows):
        return []
    stop = reads.stop_bytes
    apart = reads.file * (int(stop.max()) + 1)  # files one after the other in one long row of bytes
    furthest = np.maximum.accumulate(stop + apart)
    return np.unique(rows[1:][(reads.offset_bytes + apart)[1:] < furthest[:-1]]).tolist()


def _as_move(read: Read, row: int, checkpoint: Checkpoint) -> Move:
    dtype = checkpoint.dtypes[row]
    size = itemsize(dtype)
    source = (read.offset_bytes - checkpoint.offsets[row]) // size
    return Move(read.memory, dtype, run_of(read.nbytes // size), source, read.start_bytes // size)


def runs(reads: Reads, limit: int) -> Iterator[Reads]:
    """Join neighbouring reads and cut large ones to runs of at most ``limit`` bytes; the reads are in order."""
    reads = split_long(reads, limit)
    count = len(reads.file)
    most = IOV_MAX // 2  # every read may need a junk buffer before it
    gaps = reads.offset_bytes[1:] - reads.stop_bytes[:-1]
    near = (reads.file[1:] == reads.file[:-1]) & (gaps >= 0) & (gaps <= GAP_BYTES)
    ends = np.append(np.flatnonzero(~near) + 1, count)
    done = np.cumsum(reads.nbytes)
    start = 0
    while start < count:
        before = int(done[start]) - int(reads.nbytes[start])
        fitting = max(int(np.searchsorted(done, before + limit, "right")), start + 1)
        stop = min(fitting, start + most, int(ends[np.searchsorted(ends, start, "right")]))
        yield reads.take(slice(start, stop))
        start = stop


def portion(total_bytes: int, threads: int, most_bytes: int) -> int:
    """Bytes of a job: enough jobs for all threads to end at about the same time, none tiny."""
    return max(_LEAST_JOB_BYTES, min(most_bytes, total_bytes // (4 * threads)))


def split_long(reads: Reads, limit: int) -> Reads:
    """The same reads, each as several of at most ``limit`` bytes."""
    if not (reads.nbytes > limit).any():
        return reads
    counts = np.maximum(-(-reads.nbytes // limit), 1)
    first = np.repeat(np.cumsum(counts) - counts, counts)
    done = (np.arange(len(first)) - first) * limit
    file, offset_bytes, nbytes, memory, start_bytes = reads.take(np.repeat(np.arange(len(counts)), counts))
    return Reads(file, offset_bytes + done, np.minimum(limit, nbytes - done), memory, start_bytes + done)


def jobs_through_scratch(
    moves: Mapping[int, Sequence[Move]], checkpoint: Checkpoint, decodes: Mapping[int, Decode], limit: int
) -> Iterator[ReadAndCopy]:
    """All that goes through at most ``limit`` bytes of scratch."""
    yield from slab_jobs({row: of_row for row, of_row in moves.items() if row not in decodes}, checkpoint, limit)
    coded = {row: of_row for row, of_row in moves.items() if row in decodes}
    if coded:
        yield from decode_jobs(coded, checkpoint, decodes, limit)


def slab_jobs(moves: Mapping[int, Sequence[Move]], checkpoint: Checkpoint, limit: int) -> Iterator[ReadAndCopy]:
    """Slabs of sources, several to a job while they fit into ``limit`` bytes of scratch and lie in one file.

    Each slab starts at a multiple of 64 bytes.
    """
    file_ids, offsets = checkpoint.file_ids, checkpoint.offsets
    reads: list[Read] = []
    placed: list[Move] = []
    used = 0
    for row in sorted(moves, key=lambda row: (file_ids[row], offsets[row])):
        file, base = file_ids[row], offsets[row]
        size = itemsize(checkpoint.dtypes[row])
        for start, stop, cut in slabs(moves[row], limit // size):
            place = align_up(used)
            end = place + (stop - start) * size
            if reads and (end > limit or file != reads[0].file):
                yield ReadAndCopy(Reads.from_list(reads), used, group_moves(placed))
                reads, placed, place, end = [], [], 0, (stop - start) * size
            for first, last in ranges(cut, GAP_BYTES // size):
                at = place + (first - start) * size
                reads.append(Read(file, base + first * size, (last - first) * size, 0, at))
            shift = place // size - start
            placed += [move._replace(source_offset=move.source_offset + shift) for move in cut]
            used = end
    if reads:
        yield ReadAndCopy(Reads.from_list(reads), used, group_moves(placed))
