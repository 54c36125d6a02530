"""Tests of peak memory: it is counted from the level at the start and includes memory that is freed before the end."""

import mmap
import sys
import time

import pytest
import torch

from automodel_conv.cli.measuring import PeakMemory, ready_memory

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

MIB = 1 << 20


def test_memory_freed_before_the_end_counts():
    kept = torch.ones(64 * MIB, dtype=torch.uint8)
    with PeakMemory() as peak:
        buffer = torch.ones(96 * MIB, dtype=torch.uint8)
        time.sleep(0.1)  # time for one sample
        del buffer
    assert 90 * MIB < peak.anonymous_bytes < 110 * MIB
    assert peak.mapped_bytes < 8 * MIB
    assert 90 * MIB < peak.resident_bytes < 110 * MIB
    del kept


def test_mapped_files_are_resident_but_not_anonymous(tmp_path):
    file = tmp_path / "data"
    file.write_bytes(bytes(64 * MIB))
    with PeakMemory() as peak, file.open("rb") as opened:
        for _ in range(2):
            with mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
                assert sum(mapped[:: mmap.PAGESIZE]) == 0
                time.sleep(0.1)  # time for one sample
            time.sleep(0.1)
    assert peak.anonymous_bytes < 8 * MIB
    assert 56 * MIB < peak.resident_bytes < 72 * MIB
    assert 120 * MIB < peak.mapped_bytes < 144 * MIB


def test_nothing_is_measured_without_proc(monkeypatch):
    monkeypatch.setattr("automodel_conv.cli.measuring._STATUS", "/nowhere")
    with PeakMemory() as peak:
        pass
    assert (peak.anonymous_bytes, peak.mapped_bytes, peak.resident_bytes) == (None, None, None)


def test_prepared_memory_is_touched_and_freed():
    with PeakMemory() as peak:
        ready_memory(512 * MIB)
        with PeakMemory() as after:
            pass
    # The memory is freed as soon as it is touched, so only the kernel's own peak includes all of it. Memory left over
    # from earlier tests may be freed meanwhile, some MiB.
    assert 480 * MIB < peak.resident_bytes < 544 * MIB
    assert after.anonymous_bytes < 8 * MIB


def test_a_peak_before_the_block_does_not_count():
    ready_memory(256 * MIB)
    with PeakMemory() as peak:
        buffer = torch.ones(32 * MIB, dtype=torch.uint8)
        del buffer
    assert peak.resident_bytes < 48 * MIB
