"""Schedule a load to the host: turn the copies of all targets into jobs; pure.

Unchanged bytes are read straight into their final place. Bytes that are permuted or cast, or that several targets
need, are read into scratch one slab of a source at a time, and copied from there to the targets. So each byte is read
once. Jobs can run in any order.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from automodel_conv.dtypes import itemsize
from automodel_conv.files.checkpoint import Checkpoint
from automodel_conv.files.full_io import IOV_MAX
from automodel_conv.planning.boxes import run_of
from automodel_conv.planning.copies import Decode, StridedCopy, Target
from automodel_conv.schedule.cutting import read_ranges, slabs
from automodel_conv.schedule.decoding import decode_jobs
from automodel_conv.schedule.jobs import (
    GAP_BYTES,
    Job,
    Move,
    PlacedSlab,
    Read,
    ReadAndCopy,
    ReadInPlace,
    Reads,
    SlabRead,
    SlabSource,
    SourceSlab,
    align_up,
)

# Threads that read close to each other share what the system reads ahead. Runs of this size are read a fifth faster
# from a disk than runs of 32 MiB, and as fast from memory (docs/performance.md). Smaller runs would cost calls.
RUN_BYTES = 4 << 20
_LEAST_JOB_BYTES = 1 << 20
# Slabs of this size stay in the cache between the read and the copy.
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
    """Return all jobs of a load to the host, in the order of the files.

    Args:
        targets: the tensors to fill.
        copies: the copies of each target, with the strides of its buffer.
        checkpoint: the sources.
        decodes: the ``Decode`` of each quantized source, by row.
        threads: number of threads that will run the jobs.
        slot_bytes: bytes of scratch that a job may use, a multiple of 64.

    Raises:
        ConversionError: ``slot_bytes`` is too small for a quantized source.
    """
    in_place, moves = split_copies(targets, copies, checkpoint, decodes)
    limits = limits_of(in_place, moves, checkpoint, threads, slot_bytes)
    jobs: list[Job] = [ReadInPlace(run) for run in group_reads(in_place, limits.in_place_bytes)]
    jobs += jobs_through_scratch(moves, checkpoint, decodes, limits.scratch_bytes)
    jobs.sort(key=lambda job: job.place)
    return jobs


class Limits(NamedTuple):
    """The bytes that one job may have."""

    in_place_bytes: int
    """Maximum bytes that a job reads in place."""
    scratch_bytes: int
    """Maximum bytes of scratch of a job."""


def limits_of(in_place: Reads, moves: Iterable[int], checkpoint: Checkpoint, threads: int, slot_bytes: int) -> Limits:
    """Return the limits of the jobs of a load.

    Args:
        in_place: all reads straight into targets.
        moves: the rows of all other sources.
        checkpoint: the sources.
        threads: number of threads that will run the jobs.
        slot_bytes: bytes of scratch that a job may use, a multiple of 64.
    """
    through_scratch = sum([checkpoint.nbytes[row] for row in moves])
    return Limits(
        bytes_per_job(in_place.total_bytes, threads, RUN_BYTES),
        min(slot_bytes, bytes_per_job(through_scratch, threads, _SLAB_BYTES)),
    )


def split_copies(
    targets: Sequence[Target],
    copies: Sequence[Sequence[StridedCopy]],
    checkpoint: Checkpoint,
    decodes: Mapping[int, Decode],
) -> tuple[Reads, dict[int, list[Move]]]:
    """Divide the copies of targets into reads straight into targets, and moves through scratch; no byte is in both.

    Returns:
        The reads straight into targets, in the order of the files, and the moves out of each other source, by row.
    """
    in_place, moves = _runs_and_moves(targets, copies, checkpoint.dtypes, decodes)
    reads, rows = in_place.reads(checkpoint)
    order = np.lexsort((reads.offset_bytes, reads.file))
    reads, rows = reads.take(order), rows[order]
    shared = np.isin(rows, [*_rows_read_twice(reads, rows), *moves])
    for read, row in zip(reads.take(shared).one_by_one(), rows[shared].tolist(), strict=True):
        moves.setdefault(row, []).append(_as_move(read, row, checkpoint))
    return (reads.take(~shared) if shared.any() else reads), moves


class _Runs(NamedTuple):
    """Runs of elements that targets store unchanged; equal runs of one target share an entry of ``groups``."""

    rows: list[int]
    """Source row of each run."""
    source_offsets: list[int]
    """Element of the source where each run starts."""
    target_offsets: list[int]
    """Element of the target where each run starts."""
    groups: list[tuple[int, int, int, int]]
    """Fields: number of the target, bytes of an element, bytes of a run, number of runs."""

    def reads(self, checkpoint: Checkpoint) -> tuple[Reads, np.ndarray]:
        """Return the runs as reads of files into targets, and the source row of each read, int64 ``[n]``."""
        groups = np.array(self.groups, np.int64).reshape(-1, 4)
        number, size, nbytes = np.repeat(groups[:, :3], groups[:, 3], axis=0).T
        columns = (self.rows, self.source_offsets, self.target_offsets)
        rows, source, target = (np.array(column, np.int64) for column in columns)
        file_ids, offsets = np.array(checkpoint.file_ids, np.int64), np.array(checkpoint.offsets, np.int64)
        return Reads(file_ids[rows], offsets[rows] + source * size, nbytes, number, target * size), rows


def _runs_and_moves(
    targets: Sequence[Target],
    copies: Sequence[Sequence[StridedCopy]],
    dtypes: Sequence[str],
    decodes: Mapping[int, Decode],
) -> tuple[_Runs, dict[int, list[Move]]]:
    """Return the runs that targets store unchanged, and all other copies as moves, by source row."""
    in_place = _Runs([], [], [], [])
    moves: dict[int, list[Move]] = {}
    for number, (target, group) in enumerate(zip(targets, copies, strict=True)):
        dtype, sources, size = target.dtype, target.sources, itemsize(target.dtype)
        same_dtype = set(map(dtypes.__getitem__, sources)) <= {dtype} and decodes.keys().isdisjoint(sources)
        for copy in group:
            box, rows = copy.box, [*map(sources.__getitem__, copy.ordinals)]
            if same_dtype and box.is_run:
                in_place.rows.extend(rows)
                in_place.source_offsets.extend(copy.source_offsets)
                in_place.target_offsets.extend(copy.target_offsets)
                in_place.groups.append((number, size, box.numel * size, len(rows)))
                continue
            for row, source, place in zip(rows, copy.source_offsets, copy.target_offsets, strict=True):
                if row not in decodes and dtypes[row] == dtype and box.is_run:
                    in_place.rows.append(row)
                    in_place.source_offsets.append(source)
                    in_place.target_offsets.append(place)
                    in_place.groups.append((number, size, box.numel * size, 1))
                else:
                    read_as = dtype if row in decodes else dtypes[row]
                    moves.setdefault(row, []).append(Move(number, read_as, box, source, place))
    return in_place, moves


def _rows_read_twice(reads: Reads, rows: np.ndarray) -> list[int]:
    """Return the source rows of reads that overlap; the reads must be in order."""
    if not len(rows):
        return []
    stop = reads.stop_bytes
    file_start = reads.file * (int(stop.max()) + 1)  # places all files in one long row of bytes
    furthest = np.maximum.accumulate(stop + file_start)
    overlapping = rows[1:][(reads.offset_bytes + file_start)[1:] < furthest[:-1]]
    return sorted({*overlapping.tolist()})  # np.unique imports np.ma, which takes longer than all of a small load


def _as_move(read: Read, row: int, checkpoint: Checkpoint) -> Move:
    """Return the move through scratch that writes the same bytes as a read in place."""
    dtype = checkpoint.dtypes[row]
    size = itemsize(dtype)
    source = (read.offset_bytes - checkpoint.offsets[row]) // size
    return Move(read.memory, dtype, run_of(read.nbytes // size), source, read.start_bytes // size)


def group_reads(reads: Reads, limit: int) -> Iterator[Reads]:
    """Group reads that are in order into runs of neighbours, of at most ``limit`` bytes; cut reads that are larger."""
    reads, bounds = cut_into_runs(reads, limit)
    return (reads.take(slice(*run)) for run in pairwise(bounds))


def cut_into_runs(reads: Reads, limit: int) -> tuple[Reads, list[int]]:
    """Return the reads of ``group_reads`` one after another, and the bounds of the runs: 0, ..., number of reads."""
    reads = split_long(reads, limit)
    count = len(reads.file)
    most = IOV_MAX // 2  # each read may need a junk buffer for the gap before it
    gaps = reads.offset_bytes[1:] - reads.stop_bytes[:-1]
    near = (reads.file[1:] == reads.file[:-1]) & (gaps >= 0) & (gaps <= GAP_BYTES)
    ends: list[int] = [*(np.flatnonzero(~near) + 1).tolist(), count]
    done: list[int] = np.cumsum(reads.nbytes).tolist()
    bounds: list[int] = []
    start = before = 0
    for end in ends:
        while start < end:
            bounds.append(start)
            start = min(max(bisect_right(done, before + limit, start), start + 1), start + most, end)
            before = done[start - 1]
    return reads, [*bounds, count]


def bytes_per_job(total_bytes: int, threads: int, most_bytes: int) -> int:
    """Return the bytes of a job such that all threads end at about the same time and no job is tiny."""
    return max(_LEAST_JOB_BYTES, min(most_bytes, total_bytes // (4 * threads)))


def split_long(reads: Reads, limit: int) -> Reads:
    """Split each read into reads of at most ``limit`` bytes."""
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
    """Schedule moves through at most ``limit`` bytes of scratch, quantized sources last.

    Args:
        moves: the copies out of each source, by row.
        decodes: the ``Decode`` of each quantized source, by row.
        limit: bytes of scratch that a job may use.

    Raises:
        ConversionError: ``limit`` is too small for a quantized source.
    """
    yield from slab_jobs({row: row_moves for row, row_moves in moves.items() if row not in decodes}, checkpoint, limit)
    coded = {row: row_moves for row, row_moves in moves.items() if row in decodes}
    if coded:
        yield from decode_jobs(coded, checkpoint, decodes, limit)


def slab_jobs(moves: Mapping[int, Sequence[Move]], checkpoint: Checkpoint, limit: int) -> Iterator[ReadAndCopy]:
    """Schedule moves out of sources that are not quantized, in the order of the files.

    A job has as many slabs of one file as fit into ``limit`` bytes of scratch. Each slab starts at a multiple of 64
    bytes.
    """
    slabs_by_geometry: dict[tuple[object, ...], tuple[SourceSlab, ...]] = {}
    file_ids, offsets = checkpoint.file_ids, checkpoint.offsets
    placed: list[PlacedSlab] = []
    used = last_file = 0
    for row in sorted(moves, key=lambda row: (file_ids[row], offsets[row])):
        file, dtype, row_moves = file_ids[row], checkpoint.dtypes[row], moves[row]
        key = (dtype, *[(move.box, move.source_offset) for move in row_moves])
        if key not in slabs_by_geometry:
            slabs_by_geometry[key] = tuple(_cut(row_moves, itemsize(dtype), limit))
        source = SlabSource(((file, offsets[row]),), row_moves)
        for slab in slabs_by_geometry[key]:
            start = align_up(used)
            if placed and (start + slab.nbytes > limit or file != last_file):
                yield ReadAndCopy(tuple(placed))
                placed, start = [], 0
            placed.append(PlacedSlab(slab, source, start))
            used, last_file = start + slab.nbytes, file
    if placed:
        yield ReadAndCopy(tuple(placed))


def _cut(moves: Sequence[Move], size: int, limit: int) -> Iterator[SourceSlab]:
    """Cut a source whose elements have ``size`` bytes into slabs of at most ``limit`` bytes."""
    numbered = [move._replace(target=n, target_offset=0) for n, move in enumerate(moves)]
    for start, stop, parts in slabs(numbered, limit // size):
        reads = [
            SlabRead(0, first * size, (last - first) * size, (first - start) * size)
            for first, last in read_ranges(parts, GAP_BYTES // size)
        ]
        relative = [move._replace(source_offset=move.source_offset - start) for move in parts]
        yield SourceSlab(tuple(reads), tuple(relative), (stop - start) * size)
