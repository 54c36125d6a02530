"""From copies to jobs: which bytes of which file go where, in portions that run in any order.

Pure: integers in, integers out. Bytes that only move are read straight into their final place.
Bytes that are permuted or cast, or that several targets want, are read into scratch, a slab of a
source at a time, and copied from there. So each byte is read once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from automodel_conv.dtypes import itemsize
from automodel_conv.execution.cutting import ranges, slabs
from automodel_conv.execution.decode_schedule import decoded
from automodel_conv.execution.jobs import GAP_BYTES, SCRATCH, Job, Move, Part, aligned
from automodel_conv.files import system
from automodel_conv.files.checkpoint import Checkpoint
from automodel_conv.planning.copies import Decode, StridedCopy, Target

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
    parts, moves = divide(targets, copies, checkpoint, decodes)
    jobs = list(runs(parts, portion(sum(part.nbytes for part in parts), threads, RUN_BYTES)))
    through_scratch = sum(checkpoint.nbytes[row] for row in moves)
    jobs += staged(moves, checkpoint, decodes, min(slot_bytes, portion(through_scratch, threads, _SLAB_BYTES)))
    jobs.sort(key=lambda job: job.parts[0])
    return jobs


def divide(
    targets: Sequence[Target],
    copies: Sequence[Sequence[StridedCopy]],
    checkpoint: Checkpoint,
    decodes: Mapping[int, Decode],
) -> tuple[list[Part], dict[int, list[Move]]]:
    """What can be read in place, in the order of the files, and by source row what cannot; no byte is in both."""
    parts, moves = _split(targets, copies, checkpoint, decodes)
    parts.sort()
    shared = _rows_read_twice(parts) | (moves.keys() & {part.row for part in parts})
    if shared:
        for part in parts:
            if part.row in shared:
                moves.setdefault(part.row, []).append(_as_move(part, checkpoint))
        parts = [part for part in parts if part.row not in shared]
    return parts, moves


def _split(
    targets: Sequence[Target],
    copies: Sequence[Sequence[StridedCopy]],
    checkpoint: Checkpoint,
    decodes: Mapping[int, Decode],
) -> tuple[list[Part], dict[int, list[Move]]]:
    """What can be read in place, and by source row what cannot."""
    dtypes, file_ids, offsets = checkpoint.dtypes, checkpoint.file_ids, checkpoint.offsets
    parts: list[Part] = []
    moves: dict[int, list[Move]] = {}
    for number, (target, group) in enumerate(zip(targets, copies, strict=True)):
        dtype, sources, size = target.dtype, target.sources, itemsize(target.dtype)
        for copy in group:
            plain = copy.is_contiguous
            nbytes = size * (copy.shape[0] if copy.shape else 1)
            columns = zip(copy.ordinals, copy.source_offsets, copy.target_offsets, strict=True)
            for ordinal, source, place in columns:
                row = sources[ordinal]
                if plain and dtypes[row] == dtype and row not in decodes:
                    start = offsets[row] + source * size
                    parts.append(Part(file_ids[row], start, nbytes, number, place * size, row))
                else:
                    read_as = dtype if row in decodes else dtypes[row]
                    move = Move(number, read_as, *copy[:2], source, copy.target_strides, place)
                    moves.setdefault(row, []).append(move)
    return parts, moves


def _rows_read_twice(parts: Sequence[Part]) -> set[int]:
    """Rows of which parts, sorted by place, overlap."""
    rows: set[int] = set()
    file_before = stop = -1
    for file, start, nbytes, _, _, row in parts:
        if file == file_before and start < stop:
            rows.add(row)
            stop = max(stop, start + nbytes)
        else:
            file_before, stop = file, start + nbytes
    return rows


def _as_move(part: Part, checkpoint: Checkpoint) -> Move:
    dtype = checkpoint.dtypes[part.row]
    size = itemsize(dtype)
    source = (part.offset_bytes - checkpoint.offsets[part.row]) // size
    return Move(part.target, dtype, (part.nbytes // size,), (1,), source, (1,), part.start_bytes // size)


# --- bytes that only move -------------------------------------------------------------------------


def runs(parts: Sequence[Part], limit: int) -> Iterator[Job]:
    """Neighbours in one job of at most ``limit`` bytes, large tensors over several."""
    most = system.IOV_MAX // 2  # every part may need a junk buffer before it
    run: list[Part] = []
    used = file_before = stop = 0
    for whole in parts:
        for part in chopped(whole, limit):
            file, start, nbytes, _, _, _ = part
            full = used + nbytes > limit or len(run) == most
            if run and (full or file != file_before or not 0 <= start - stop <= GAP_BYTES):
                yield Job(run, [], 0)
                run, used = [], 0
            run.append(part)
            used += nbytes
            file_before, stop = file, start + nbytes
    if run:
        yield Job(run, [], 0)


def portion(total_bytes: int, threads: int, most_bytes: int) -> int:
    """Bytes of a job: enough jobs for all threads to end at about the same time, none tiny."""
    return max(_LEAST_JOB_BYTES, min(most_bytes, total_bytes // (4 * threads)))


def chopped(part: Part, limit: int) -> Sequence[Part]:
    """A part as parts of at most ``limit`` bytes."""
    if part.nbytes <= limit:
        return (part,)
    return [
        part._replace(
            offset_bytes=part.offset_bytes + done,
            nbytes=min(limit, part.nbytes - done),
            start_bytes=part.start_bytes + done,
        )
        for done in range(0, part.nbytes, limit)
    ]


# --- bytes that go through scratch ----------------------------------------------------------------


def staged(
    moves: Mapping[int, Sequence[Move]], checkpoint: Checkpoint, decodes: Mapping[int, Decode], limit: int
) -> Iterator[Job]:
    """All that goes through at most ``limit`` bytes of scratch."""
    yield from joined({row: of_row for row, of_row in moves.items() if row not in decodes}, checkpoint, limit)
    coded = {row: of_row for row, of_row in moves.items() if row in decodes}
    if coded:
        yield from decoded(coded, checkpoint, decodes, limit)


def joined(moves: Mapping[int, Sequence[Move]], checkpoint: Checkpoint, limit: int) -> Iterator[Job]:
    """Slabs of sources, several to a job while they fit into ``limit`` bytes of scratch and lie in one file.

    Each slab starts at a multiple of 64 bytes.
    """
    file_ids, offsets = checkpoint.file_ids, checkpoint.offsets
    job, used = Job([], [], 0), 0
    for row in sorted(moves, key=lambda row: (file_ids[row], offsets[row])):
        file, base = file_ids[row], offsets[row]
        size = itemsize(checkpoint.dtypes[row])
        for start, stop, cut in slabs(moves[row], limit // size):
            place = aligned(used)
            end = place + (stop - start) * size
            if job.parts and (end > limit or file != job.parts[0].file):
                yield job._replace(scratch_bytes=used)
                job, place, end = Job([], [], 0), 0, (stop - start) * size
            for first, last in ranges(cut, GAP_BYTES // size):
                at = place + (first - start) * size
                nbytes = (last - first) * size
                job.parts.append(Part(file, base + first * size, nbytes, SCRATCH, at, row))
            shift = place // size - start
            job.moves.extend(Move(*m[:4], m.source_offset + shift, *m[5:]) for m in cut)
            used = end
    if job.parts:
        yield job._replace(scratch_bytes=used)
