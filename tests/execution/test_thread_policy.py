"""Tests of the number of reading threads on simulated machines: the page cache, a disk, a slow network."""

from __future__ import annotations

import heapq
import time

import pytest

from automodel_conv.execution import host as cpu
from automodel_conv.execution import thread_policy
from automodel_conv.execution.buffers import allocate
from automodel_conv.execution.host import load_to_host
from automodel_conv.execution.thread_policy import ThreadPolicy
from automodel_conv.files import system
from automodel_conv.schedule.host import group_reads
from automodel_conv.schedule.jobs import ReadInPlace, concatenate
from automodel_conv.testing import assert_bytes_equal
from tests.execution.support import moe, naive

JOB_BYTES = 4 << 20
MOST = 32


class Machine:
    """Simulated reads of 4 MiB: each waits, then needs a core, and all together share the bandwidth to the data."""

    def __init__(self, wait_ms, core_ms=1.0, gb_per_s=100.0, cores=2):
        self.wait, self.core, self.cores = 1e-3 * wait_ms, 1e-3 * core_ms, cores
        self.shared = JOB_BYTES / (1e9 * gb_per_s)

    def run(self, policy, jobs, change=None):
        """Return the seconds of the jobs with the threads that the policy wants, and their number after each job."""
        ends = [(0.0, n) for n in range(policy.threads)]
        free_at, numbers = 0.0, []
        for job in range(jobs):
            if change is not None:
                change(self, job)
            now, thread = heapq.heappop(ends)
            crowd = max(1.0, len(ends) * self.core / (self.cores * (self.core + self.wait)))
            free_at = max(free_at + self.shared, now + self.wait)
            end = free_at + self.core * crowd
            policy.record(JOB_BYTES, end - now - self.core * crowd, end - now, end)
            numbers.append(policy.threads)
            heapq.heappush(ends, (end, thread))
            while len(ends) < policy.threads:
                heapq.heappush(ends, (end, len(ends)))
            while len(ends) > policy.threads:
                heapq.heappop(ends)
        return max(ends)[0], numbers


def test_slow_network_gets_more_threads():
    policy = ThreadPolicy(2, MOST)
    seconds, numbers = Machine(wait_ms=50, gb_per_s=20).run(policy, 2000)
    assert policy.threads == MOST
    assert seconds < 0.2 * Machine(wait_ms=50, gb_per_s=20).run(ThreadPolicy(2, 2), 2000)[0]
    assert numbers == sorted(numbers)


def test_threads_that_do_not_wait_get_no_more_threads():
    policy = ThreadPolicy(2, MOST)
    _, numbers = Machine(wait_ms=0).run(policy, 2000)
    assert set(numbers) == {2}


def test_disk_at_its_limit_soon_loses_extra_threads():
    policy = ThreadPolicy(4, MOST)
    _, numbers = Machine(wait_ms=1, core_ms=0.5, gb_per_s=1.0).run(policy, 4000)
    assert policy.threads == 4
    assert sum(number > 4 for number in numbers) < 0.1 * len(numbers)


def test_end_of_a_warm_cache_adds_threads():
    def end(machine, job):
        machine.wait = 0.05 if job > 500 else 0.0

    policy = ThreadPolicy(2, MOST)
    _, numbers = Machine(wait_ms=0, gb_per_s=20).run(policy, 3000, end)
    assert set(numbers[:500]) == {2}
    assert policy.threads >= 16


def test_threads_stay_below_the_maximum():
    policy = ThreadPolicy(3, 5)
    Machine(wait_ms=50).run(policy, 1000)
    assert policy.threads == 5


@pytest.mark.parametrize("threads", [1, 2])
def test_load_whose_reads_wait_gets_threads_and_right_bytes(tmp_path, monkeypatch, threads):
    tensors, checkpoint, plan = moe(tmp_path, shape=(16, 64, 512))
    monkeypatch.setattr(cpu, "_ADAPTED_BYTES", 0)
    monkeypatch.setattr(cpu, "default_threads", lambda nbytes: threads)
    monkeypatch.setattr(cpu, "schedule", _in_pieces_of(32 << 10))
    for name, value in (("_WINDOW_BYTES", 0), ("_WINDOW_SECONDS", 0.0)):
        monkeypatch.setattr(thread_policy, name, value)
    stock = system.preadv

    def late(*arguments):
        time.sleep(0.005)
        return stock(*arguments)

    monkeypatch.setattr(system, "preadv", late)
    buffers = allocate(plan.targets)
    stats = load_to_host(plan, checkpoint, buffers)
    for name, tensor in naive(plan, tensors).items():
        assert_bytes_equal(buffers[name], tensor)
    assert threads < stats.threads <= 32
    assert load_to_host(plan, checkpoint, buffers, threads=threads).threads == threads


def _in_pieces_of(nbytes):
    stock = cpu.schedule

    def schedule(*arguments, **options):
        reads = concatenate(job.reads for job in stock(*arguments, **options))
        return [ReadInPlace(run) for run in group_reads(reads, nbytes)]

    return schedule
