"""Tests of the schedule of a load to a device: chunks, windows and uploads."""

from __future__ import annotations

import itertools

import pytest
import torch

from automodel_conv.schedule.device import device_schedule
from tests.execution.support import columns, experts, plan_of, target, write_checkpoint


@pytest.mark.parametrize(("slot_bytes", "window_bytes"), [(100, 4096), (4096, 128), (700, 640), (1 << 20, 1 << 20)])
def test_chunks_fill_windows_in_their_order_and_carry_each_byte_once(cases, slot_bytes, window_bytes):
    for case in cases:
        copies = [t.copies for t in case.plan.targets]
        chunks, windows = device_schedule(
            case.plan.targets, copies, case.checkpoint, {}, slot_bytes=slot_bytes, window_bytes=window_bytes
        )
        filled = [list(chunk.to_windows) for chunk in chunks if chunk.to_windows]
        assert [window for group in filled for window in group] == sorted(
            window for group in filled for window in group
        )
        assert [window.chunks for window in windows] == [
            sum(n in group for group in filled) for n in range(len(windows))
        ]
        assert all(window.nbytes <= window_bytes for window in windows)
        parts = sorted(read[:3] for chunk in chunks for read in chunk.reads.one_by_one())
        assert all(first[:1] != after[:1] or sum(first[1:]) <= after[1] for first, after in itertools.pairwise(parts))
        assert sum(part[2] for part in parts) == case.plan.bytes_read
        for chunk in chunks:
            assert chunk.reads.total_bytes <= slot_bytes
            uploads = [u for side in (chunk.to_targets, chunk.to_windows) for group in side.values() for u in group]
            spans = sorted((upload.slot_start, upload.slot_start + upload.nbytes) for upload in uploads)
            assert [start for start, _ in spans] == [0, *(stop for _, stop in spans[:-1])]
            assert spans[-1][1] == chunk.reads.total_bytes


def test_adjacent_sources_that_stay_adjacent_are_one_upload(tmp_path):
    tensors = experts(5, 16, 32, torch.bfloat16)
    checkpoint = write_checkpoint(tmp_path, {"a.safetensors": tensors})
    sources = columns(checkpoint)
    plan = plan_of(sources, *(target(sources, name, "F32", [[name]]) for name in tensors))
    chunks, windows = device_schedule(
        plan.targets, [t.copies for t in plan.targets], checkpoint, {}, slot_bytes=1 << 20, window_bytes=1 << 20
    )
    [chunk], [window] = chunks, windows
    assert [len(uploads) for uploads in chunk.to_windows.values()] == [1]
    assert window.nbytes == plan.bytes_read
