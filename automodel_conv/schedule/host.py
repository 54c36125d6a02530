"""Schedule a load to the host: turn the copies of all targets into jobs; pure.

Bytes that only move are read straight into their final place. Bytes that are permuted or cast, or that several targets
need, are read into scratch one slab of a source at a time, and copied from there to the targets. So each byte is read
once. Jobs can run in any order.
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
from automodel_conv.schedule.cutting import read_ranges, slabs
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
    jobs: list[Job] = [
        ReadInPlace(run) for run in group_reads(in_place, bytes_per_job(in_place.total_bytes, threads, RUN_BYTES))
    ]
    through_scratch = sum(checkpoint.nbytes[row] for row in moves)
    jobs += jobs_through_scratch(
        moves, checkpoint, decodes, min(slot_bytes, bytes_per_job(through_scratch, threads, _SLAB_BYTES))
    )
    jobs.sort(key=lambda job: (job.reads.file[0], job.reads.offset_bytes[0]))
    return jobs


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
    """Runs of elements that go to targets unchanged; equal runs of one target share an entry of ``groups``."""

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
    """Return the runs that go to targets unchanged, and by source row the moves that are no such runs."""
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
    """Return the source rows that overlapping reads belong to; the reads are in order."""
    if not len(rows):
        return []
    stop = reads.stop_bytes
    file_start = reads.file * (int(stop.max()) + 1)  # places all files in one long row of bytes
    furthest = np.maximum.accumulate(stop + file_start)
    return np.unique(rows[1:][(reads.offset_bytes + file_start)[1:] < furthest[:-1]]).tolist()


def _as_move(read: Read, row: int, checkpoint: Checkpoint) -> Move:
    """Return the move that does through scratch what a read does in place."""
    dtype = checkpoint.dtypes[row]
    size = itemsize(dtype)
    source = (read.offset_bytes - checkpoint.offsets[row]) // size
    return Move(read.memory, dtype, run_of(read.nbytes // size), source, read.start_bytes // size)


def group_reads(reads: Reads, limit: int) -> Iterator[Reads]:
    """Group reads that are in order into runs of neighbours, of at most ``limit`` bytes; cut reads that are larger."""
    reads = split_long(reads, limit)
    count = len(reads.file)
    most = IOV_MAX // 2  # each read may need a junk buffer for the gap before it
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
    file_ids, offsets = checkpoint.file_ids, checkpoint.offsets
    reads: list[Read] = []
    job_moves: list[Move] = []
    used = 0
    for row in sorted(moves, key=lambda row: (file_ids[row], offsets[row])):
        file, base = file_ids[row], offsets[row]
        size = itemsize(checkpoint.dtypes[row])
        for start, stop, parts in slabs(moves[row], limit // size):
            slab_start = align_up(used)
            slab_stop = slab_start + (stop - start) * size
            if reads and (slab_stop > limit or file != reads[0].file):
                yield ReadAndCopy(Reads.from_list(reads), used, group_moves(job_moves))
                reads, job_moves, slab_start, slab_stop = [], [], 0, (stop - start) * size
            for first, last in read_ranges(parts, GAP_BYTES // size):
                start_bytes = slab_start + (first - start) * size
                reads.append(Read(file, base + first * size, (last - first) * size, 0, start_bytes))
            shift = slab_start // size - start
            job_moves += [move._replace(source_offset=move.source_offset + shift) for move in parts]
            used = slab_stop
    if reads:
        yield ReadAndCopy(Reads.from_list(reads), used, group_moves(job_moves))
