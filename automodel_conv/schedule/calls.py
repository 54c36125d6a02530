"""Count the reads of a load to the host, without its jobs: for forecasts; pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from automodel_conv.files.checkpoint import Checkpoint
from automodel_conv.planning.copies import Decode, StridedCopy, Target
from automodel_conv.schedule.decoding import cut_coded
from automodel_conv.schedule.host import cut_into_runs, limits_of, slab_jobs, split_copies
from automodel_conv.schedule.jobs import GAP_BYTES, Reads, SlabSource, SourceSlab


class Calls(NamedTuple):
    """The calls that read files, in columns: one int64 array ``[n]`` for each field."""

    file: np.ndarray
    nbytes: np.ndarray
    """Bytes of each call, including the gaps that it reads across."""


def calls_of_load(
    targets: Sequence[Target],
    copies: Sequence[Sequence[StridedCopy]],
    checkpoint: Checkpoint,
    decodes: Mapping[int, Decode],
    *,
    threads: int,
    slot_bytes: int,
) -> Calls:
    """Return the calls of all jobs that ``schedule`` returns for the same arguments.

    The reads of quantized sources that share their slabs are computed in columns.
    """
    in_place, moves = split_copies(targets, copies, checkpoint, decodes)
    limits = limits_of(in_place, moves, checkpoint, threads, slot_bytes)
    coded = {row: row_moves for row, row_moves in moves.items() if row in decodes}
    plain = {row: row_moves for row, row_moves in moves.items() if row not in decodes}
    parts = [_of_runs(*cut_into_runs(in_place, limits.in_place_bytes))]
    parts.append(_of_lists(job.listed_reads() for job in slab_jobs(plain, checkpoint, limits.scratch_bytes)))
    by_slabs: dict[int, tuple[tuple[SourceSlab, ...], list[SlabSource]]] = {}
    for slabs, source in cut_coded(coded, checkpoint, decodes, limits.scratch_bytes):
        by_slabs.setdefault(id(slabs), (slabs, []))[1].append(source)
    parts += [_of_sources(slabs, sources) for slabs, sources in by_slabs.values()]
    calls = [_calls(part) for part in parts]
    return Calls(*map(np.concatenate, zip(*calls, strict=True)))


class _JobReads(NamedTuple):
    """Reads of several jobs in columns, int64 ``[n]``, in no order."""

    job: np.ndarray
    """Number of the job of each read."""
    file: np.ndarray
    offset_bytes: np.ndarray
    nbytes: np.ndarray


def _of_runs(reads: Reads, bounds: Sequence[int]) -> _JobReads:
    """Return reads in place, given the bounds of jobs, see ``cut_into_runs``."""
    job = np.zeros(len(reads.file), np.int64)
    job[bounds[1:-1]] = 1
    return _JobReads(np.cumsum(job), reads.file, reads.offset_bytes, reads.nbytes)


def _of_lists(jobs: Iterable[Sequence[tuple[int, ...]]]) -> _JobReads:
    """Return the reads of jobs, given the ``Read`` tuples of each."""
    rows = [(number, *read[:3]) for number, reads in enumerate(jobs) for read in reads]
    return _JobReads(*np.array(rows, np.int64).reshape(-1, 4).T)


def _of_sources(slabs: Sequence[SourceSlab], sources: Sequence[SlabSource]) -> _JobReads:
    """Return the reads of quantized sources that share their slabs; each slab is a job."""
    rows = [(number, *read[:3]) for number, slab in enumerate(slabs) for read in slab.reads]
    job, part, offset, nbytes = np.array(rows, np.int64).T
    places = np.array([source.places for source in sources], np.int64)  # [sources, parts, 2]
    file, start = places[:, part].transpose(2, 0, 1)  # [sources, reads]
    numbers = job + len(slabs) * np.arange(len(sources))[:, None]
    return _JobReads(numbers.ravel(), file.ravel(), (start + offset).ravel(), np.tile(nbytes, len(sources)))


def _calls(reads: _JobReads) -> Calls:
    """Return the calls of jobs: reads of one job and file that are near each other share one, as in ``Reads.calls``."""
    order = np.lexsort((reads.offset_bytes, reads.file, reads.job))
    job, file, start, nbytes = (column[order] for column in reads)
    stop = start + nbytes
    gaps = start[1:] - stop[:-1]
    near = (job[1:] == job[:-1]) & (file[1:] == file[:-1]) & (gaps >= 0) & (gaps <= GAP_BYTES)
    firsts = np.flatnonzero(np.concatenate([[True], ~near]))[: len(file)]
    lasts = np.append(firsts[1:], len(file))[: len(firsts)] - 1
    return Calls(file[firsts], stop[lasts] - start[firsts])
