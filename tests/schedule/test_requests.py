"""Tests of groups of jobs: every byte that a job reads is in a range that was stated, and gaps are small."""

from __future__ import annotations

import random

import pytest

from automodel_conv.schedule import requests
from automodel_conv.schedule.jobs import GAP_BYTES, Read, ReadInPlace, Reads
from automodel_conv.schedule.requests import (
    LEAST_REQUEST_BYTES,
    MOST_REQUEST_BYTES,
    group_by_requests,
    one_by_one,
    ranges_of,
)

MIB = 1 << 20


def ranges(jobs):
    return ranges_of(job.reads for job in jobs)


def job(*reads):
    """Return a job of reads of ``(file, offset, nbytes)``."""
    return ReadInPlace(Reads.from_list([Read(file, offset, nbytes, 0, 0) for file, offset, nbytes in reads]))


def random_jobs(seed):
    """Return jobs in the order of their files, with reads of all sizes, small and large gaps, and other files."""
    choose = random.Random(seed)
    jobs, offset, file = [], 0, 0
    for _ in range(choose.choice([1, 3, 40])):
        reads = []
        for _ in range(choose.choice([1, 1, 5])):
            offset += choose.choice([0, 0, 0, 1, 100, GAP_BYTES, GAP_BYTES + 1, MIB, MIB + 1, 50 * MIB])
            nbytes = choose.choice([0, 1, 17, 5000, MIB, 3 * MIB])
            reads.append((file, offset, nbytes))
            offset += nbytes
        if choose.random() < 0.3:  # scales of a quantized tensor, perhaps in another file
            reads.append((choose.choice([file, 7]), choose.choice([0, offset + 10, offset // 2]), 900))
        jobs.append(job(*sorted(reads)))
        if choose.random() < 0.1:
            offset, file = 0, file + 1
    return jobs


@pytest.mark.parametrize("threads", [1, 4, 16])
@pytest.mark.parametrize("seed", range(30))
def test_every_job_is_in_one_group_in_order(seed, threads):
    jobs = random_jobs(seed)
    groups = group_by_requests(jobs, threads)
    assert [number for group in groups for number in group.numbers] == list(range(len(jobs)))


@pytest.mark.parametrize("seed", range(60))
def test_every_call_is_covered_by_a_range_of_its_group(seed):
    jobs = random_jobs(seed)
    for group in group_by_requests(jobs, 4):
        for number in group.numbers:
            for call in jobs[number].reads.calls():
                start, stop = int(call.offset_bytes[0]), int(call.stop_bytes[-1])
                own = group.ranges[int(call.file[0])]
                assert any(first <= start and stop <= last for first, last in own), (start, stop, own)


@pytest.mark.parametrize("seed", range(60))
def test_ranges_have_few_bytes_that_no_job_reads(seed):
    """A gap is at most 1 MiB, and gaps are at most a 64th of what a range has, next to those that one call has."""
    for group in group_by_requests(jobs := random_jobs(seed), 4):
        for file, own in group.ranges.items():
            for first, last in own:
                wanted, within_calls = _read_bytes([jobs[number] for number in group.numbers], file, first, last)
                gaps = last - first - wanted - within_calls
                assert 64 * gaps <= wanted + within_calls
                assert last > first or wanted == 0


def _read_bytes(jobs, file, first, last):
    """Return the bytes of a range that reads want, and those between the reads of one call."""
    wanted, called = [], []
    for one in jobs:
        for call in one.reads.calls():
            if int(call.file[0]) == file and first <= int(call.offset_bytes[0]) and int(call.stop_bytes[-1]) <= last:
                called.append((int(call.offset_bytes[0]), int(call.stop_bytes[-1])))
                wanted += zip(call.offset_bytes.tolist(), call.stop_bytes.tolist(), strict=True)
    return _length(wanted), _length(called) - _length(wanted)


def _length(spans):
    """Return the length of the union of spans."""
    total, end = 0, 0
    for start, stop in sorted(spans):
        total += max(0, stop - max(start, end))
        end = max(end, stop)
    return total


def test_neighbours_come_by_one_request():
    jobs = [job((0, number * MIB, MIB)) for number in range(8)]
    [group] = group_by_requests(jobs, 1)
    assert group.ranges == {0: [(0, 8 * MIB)]}
    assert group.numbers == tuple(range(8))


@pytest.mark.parametrize(
    ("gap", "joined"), [(0, True), (1, True), (MIB // 64, True), (MIB // 64 * 8 + MIB // 8, False), (2 * MIB, False)]
)
def test_gap_is_read_over_if_it_is_small(gap, joined):
    jobs = [job((0, 0, 3 * MIB)), job((0, 3 * MIB + gap, 3 * MIB))]
    [group] = group_by_requests(jobs, 1)
    assert (len(group.ranges[0]) == 1) == joined


@pytest.mark.parametrize("reverse", [False, True])
def test_overlapping_small_reads_come_by_one_request(reverse):
    """Blocks of codes need overlapping rows of scales."""
    reads = [(0, 100, 200), (0, 150, 300), (0, 450, 10)]
    jobs = [job(read) for read in (reversed(reads) if reverse else reads)]
    own = ranges(jobs)[0]
    for _, start, nbytes in reads:
        assert any(first <= start and start + nbytes <= last for first, last in own)
    if not reverse:
        assert own == [(100, 460)]


@pytest.mark.parametrize(
    ("nbytes", "threads", "most"),
    [
        (1 * MIB, 16, LEAST_REQUEST_BYTES),
        (100 * MIB, 16, LEAST_REQUEST_BYTES),
        (400 * MIB, 16, 400 * MIB // 32),
        (4000 * MIB, 16, MOST_REQUEST_BYTES),
        (400 * MIB, 1, MOST_REQUEST_BYTES),
    ],
)
def test_groups_are_long_but_leave_work_for_all_threads(nbytes, threads, most):
    jobs = [job((0, offset, MIB)) for offset in range(0, nbytes, MIB)]
    groups = group_by_requests(jobs, threads)
    sizes = [sum(jobs[number].total_bytes for number in group.numbers) for group in groups]
    assert max(sizes) < most + MIB
    assert min(sizes[:-1], default=most) >= most
    assert all(len(group.ranges[0]) == 1 for group in groups)


def test_groups_end_with_their_file():
    jobs = [job((file, offset, 10)) for file in (0, 1, 5) for offset in (0, 10)]
    assert [group.ranges for group in group_by_requests(jobs, 4)] == [{0: [(0, 20)]}, {1: [(0, 20)]}, {5: [(0, 20)]}]


def test_long_job_is_not_split():
    [group] = group_by_requests([job((0, 0, 3 * MOST_REQUEST_BYTES))], 16)
    assert group.ranges == {0: [(0, 3 * MOST_REQUEST_BYTES)]}


def test_job_of_several_files_has_ranges_of_each():
    jobs = [job((0, 0, 100), (3, 50, 10)), job((0, 100, 100), (3, 60, 10))]
    [group] = group_by_requests(jobs, 2)
    assert group.ranges == {0: [(0, 200)], 3: [(50, 70)]}


def test_no_jobs_have_no_groups():
    assert group_by_requests([], 4) == one_by_one([]) == []
    assert ranges([]) == {}


def test_files_on_this_machine_are_read_job_by_job():
    jobs = random_jobs(2)
    assert one_by_one(jobs) == [requests.JobGroup((number,), {}) for number in range(len(jobs))]
