"""Tests of reads in columns, and of moves that are grouped into copies."""

import numpy as np
import pytest

from automodel_conv.planning.boxes import Box, run_of
from automodel_conv.schedule.jobs import (
    ALIGN_BYTES,
    GAP_BYTES,
    Copies,
    Move,
    PlacedSlab,
    Read,
    ReadAndCopy,
    ReadInPlace,
    Reads,
    SlabRead,
    SlabSource,
    SourceSlab,
    align_down,
    align_up,
    concatenate,
    group_moves,
)


def reads_of(*reads):
    return Reads.from_list([Read(*read) for read in reads])


def listed(reads):
    return [tuple(read) for read in reads.one_by_one()]


@pytest.mark.parametrize("nbytes", [0, 1, 63, 64, 65, 128, 1000])
def test_bytes_are_rounded_to_multiples_of_the_alignment(nbytes):
    multiples = range(0, nbytes + 2 * ALIGN_BYTES, ALIGN_BYTES)
    assert align_up(nbytes) == min(m for m in multiples if m >= nbytes)
    assert align_down(nbytes) == max(m for m in multiples if m <= nbytes)


@pytest.mark.parametrize("rows", [[], [(0, 5, 3, 1, 7)], [(0, 5, 3, 1, 7), (2, 1 << 40, 4, 0, 0)]], ids=len)
def test_columns_keep_every_field_of_a_read(rows):
    reads = reads_of(*rows)
    assert listed(reads) == rows
    assert all(column.dtype == np.int64 for column in reads)
    assert reads.total_bytes == sum(row[2] for row in rows)
    assert reads.stop_bytes.tolist() == [row[1] + row[2] for row in rows]
    assert reads.files == {row[0] for row in rows}


def test_reads_are_ordered_by_file_and_offset():
    reads = reads_of((1, 0, 1, 0, 0), (0, 9, 1, 0, 1), (0, 2, 1, 0, 2))
    assert listed(reads.in_order()) == [(0, 2, 1, 0, 2), (0, 9, 1, 0, 1), (1, 0, 1, 0, 0)]
    ordered = reads.in_order()
    assert ordered.in_order() is ordered
    assert listed(reads.take(slice(1, 2))) == [(0, 9, 1, 0, 1)]
    assert listed(concatenate([reads, reads.take(slice(0, 1))])) == [*listed(reads), (1, 0, 1, 0, 0)]


@pytest.mark.parametrize(
    ("gap", "calls"), [(0, 1), (1, 1), (GAP_BYTES, 1), (GAP_BYTES + 1, 2), (-1, 2)], ids=lambda value: str(value)
)
def test_call_reads_across_small_gaps_and_no_overlaps(gap, calls):
    reads = reads_of((0, 100, 50, 0, 0), (0, 150 + gap, 50, 0, 50))
    grouped = list(reads.calls())
    assert len(grouped) == calls
    assert listed(concatenate(grouped)) == listed(reads)


def test_call_reads_one_file():
    reads = reads_of((0, 0, 10, 0, 0), (1, 10, 10, 0, 10), (1, 20, 10, 0, 20), (3, 0, 1, 0, 30))
    assert [sorted(call.files) for call in reads.calls()] == [[0], [1], [3]]
    assert [len(call.file) for call in reads.calls()] == [1, 2, 1]
    assert list(reads_of().calls()) == []


def test_equal_moves_become_columns_in_the_order_of_the_target():
    run, other = run_of(4), Box((2, 2), (1, 2), (2, 1))
    moves = [
        Move(1, "F32", run, 0, 8),
        Move(0, "F32", run, 4, 0),
        Move(1, "F32", run, 8, 4),
        Move(1, "BF16", run, 0, 12),
        Move(1, "F32", other, 12, 0),
    ]
    assert group_moves(moves) == [
        Copies(0, "F32", run, [4], [0]),
        Copies(1, "F32", other, [12], [0]),
        Copies(1, "F32", run, [8, 0], [4, 8]),
        Copies(1, "BF16", run, [0], [12]),
    ]
    assert group_moves([]) == []


def test_copies_out_of_one_memory_have_one_source():
    copy = Copies(3, "F32", run_of(2), [4, 0], [0, 6]).as_strided_copy()
    assert (copy.ordinals, copy.source_offsets, copy.target_offsets) == ((0, 0), (4, 0), (0, 6))
    assert copy.box == run_of(2)


def test_jobs_name_the_tensors_that_they_write():
    assert ReadInPlace(reads_of((0, 0, 4, 7, 0), (0, 4, 4, 2, 0))).targets == {2, 7}
    moves = [Move(5, "F32", run_of(2), 0, 0), Move(3, "F32", run_of(1), 2, 2)]
    first, second = (SourceSlab((), (Move(n, "F32", run_of(1), 0, 0),), 12) for n in (0, 1))
    source = SlabSource(((0, 0),), moves)
    assert ReadAndCopy((PlacedSlab(first, source),)).targets == {5}
    assert ReadAndCopy((PlacedSlab(first, source), PlacedSlab(second, source))).targets == {3, 5}


def test_slabs_of_equal_sources_are_placed_at_each_source():
    """Check two sources that share a slab, in one job: the reads of both, and the copies to the target of each."""
    box = Box((2, 2), (3, 1), (1, 2))
    part = Move(0, "BF16", box, 4, 10)
    slab = SourceSlab((SlabRead(0, 6, 20, 0), SlabRead(1, 8, 4, 64)), (part,), 80)
    sources = [
        SlabSource(((2, 1000), (1, 500)), [Move(7, "BF16", run_of(100), 0, 100)]),
        SlabSource(((2, 3000), (3, 700)), [Move(9, "BF16", run_of(100), 0, 300)]),
    ]
    job = ReadAndCopy((PlacedSlab(slab, sources[0]), PlacedSlab(slab, sources[1], 128)))
    assert listed(job.reads) == [(1, 508, 4, 0, 64), (2, 1006, 20, 0, 0), (2, 3006, 20, 0, 128), (3, 708, 4, 0, 192)]
    assert job.copies == [Copies(7, "BF16", box, [4], [110]), Copies(9, "BF16", box, [68], [310])]
    assert (job.total_bytes, job.scratch_bytes, job.files, job.place) == (48, 208, {1, 2, 3}, (1, 508))
    assert job.total_bytes == job.reads.total_bytes
    assert job.rectangles == []


def test_jobs_in_place_start_at_their_first_read():
    job = ReadInPlace(reads_of((3, 8, 4, 7, 0), (3, 12, 4, 2, 0)))
    assert (job.total_bytes, job.files, job.place) == (8, {3}, (3, 8))
