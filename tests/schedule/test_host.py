"""Tests of the schedule of a load to the host, executed one element at a time."""

from __future__ import annotations

import itertools

import pytest
import torch

from automodel_conv.dtypes import itemsize, torch_dtype
from automodel_conv.schedule.host import bytes_per_job, group_reads, schedule, split_copies, split_long
from automodel_conv.schedule.jobs import GAP_BYTES, Read, ReadAndCopy, ReadInPlace, Reads
from automodel_conv.testing import address_valued, assert_bytes_equal
from tests.execution.support import LAYOUTS, columns, moe, naive, plan_of, target, write_checkpoint


def raw(tensor):
    return bytearray(tensor.contiguous().reshape(-1).view(torch.uint8).tolist())


def elements(memory, dtype):
    return torch.frombuffer(memory, dtype=torch_dtype(dtype)) if memory else torch.empty(0, dtype=torch_dtype(dtype))


def carried_out(jobs, plan, checkpoint):
    """Return the targets that jobs fill, and how often each byte of a file is read."""
    files = [open(file, "rb").read() for file in checkpoint.files]
    targets = [bytearray(b"\xa5" * t.nbytes) for t in plan.targets]
    written, read = [set() for _ in targets], {}
    for job in jobs:
        assert len(set(job.reads.file.tolist())) == 1
        scratch = bytearray(job.scratch_bytes) if isinstance(job, ReadAndCopy) else None
        for file, offset, nbytes, memory, start in job.reads.one_by_one():
            into = targets[memory] if scratch is None else scratch
            assert start + nbytes <= len(into)
            into[start : start + nbytes] = files[file][offset : offset + nbytes]
            for byte in range(offset, offset + nbytes):
                read[file, byte] = read.get((file, byte), 0) + 1
            if scratch is None:
                assert written[memory].isdisjoint(range(start, start + nbytes))
                written[memory].update(range(start, start + nbytes))
        for copies in job.copies if scratch is not None else ():
            size, code = itemsize(plan.targets[copies.target].dtype), plan.targets[copies.target].dtype
            source = elements(scratch[: len(scratch) // itemsize(copies.dtype) * itemsize(copies.dtype)], copies.dtype)
            for source_start, target_start in zip(copies.source_offsets, copies.target_offsets, strict=True):
                for index in itertools.product(*map(range, copies.box.shape)):
                    at = source_start + sum(i * s for i, s in zip(index, copies.box.source_strides, strict=True))
                    to = target_start + sum(i * s for i, s in zip(index, copies.box.target_strides, strict=True))
                    assert to * size not in written[copies.target]
                    written[copies.target].update(range(to * size, to * size + size))
                    targets[copies.target][to * size : to * size + size] = raw(source[at].to(torch_dtype(code)))
    assert [len(one) for one in written] == [t.nbytes for t in plan.targets]
    tensors = {t.name: elements(data, t.dtype).reshape(t.shape) for t, data in zip(plan.targets, targets, strict=True)}
    return tensors, read


def jobs_of(plan, checkpoint, **options):
    options = {"threads": 2, "slot_bytes": 1 << 20} | options
    return schedule(plan.targets, [t.copies for t in plan.targets], checkpoint, {}, **options)


@pytest.mark.parametrize("dtype", ["BF16", "F32"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_jobs_fill_every_target_and_read_each_byte_once(tmp_path, layout, dtype):
    tensors, checkpoint, plan = moe(tmp_path, *LAYOUTS[layout], shape=(2, 4, 6), pad=1)
    plan = plan_of(plan.sources, *(t._replace(dtype=dtype) for t in plan.targets))
    targets, read = carried_out(jobs_of(plan, checkpoint), plan, checkpoint)
    expected = naive(plan, tensors)
    for name, tensor in targets.items():
        assert_bytes_equal(tensor, expected[name])
    assert set(read.values()) == {1}
    assert len(read) == plan.bytes_read


@pytest.mark.parametrize("slot_bytes", [64, 128, 1 << 20])
def test_slabs_stay_within_the_scratch(tmp_path, slot_bytes):
    tensors, checkpoint, plan = moe(tmp_path, *LAYOUTS["transposed"], shape=(3, 3, 5))
    jobs = jobs_of(plan, checkpoint, slot_bytes=slot_bytes)
    assert all(job.scratch_bytes <= slot_bytes for job in jobs if isinstance(job, ReadAndCopy))
    targets, _ = carried_out(jobs, plan, checkpoint)
    for name, tensor in targets.items():
        assert_bytes_equal(tensor, naive(plan, tensors)[name])


def test_bytes_that_only_move_need_no_scratch(tmp_path):
    _, checkpoint, plan = moe(tmp_path, shape=(2, 4, 6))
    assert all(isinstance(job, ReadInPlace) for job in jobs_of(plan, checkpoint))


def test_bytes_that_two_targets_need_go_through_scratch(tmp_path):
    tensors = {"a": address_valued((4,), torch.bfloat16), "b": address_valued((4,), torch.bfloat16, 4)}
    checkpoint = write_checkpoint(tmp_path, {"a.safetensors": tensors})
    sources = columns(checkpoint)
    plan = plan_of(sources, *(target(sources, n, "BF16", [[s]]) for n, s in (("x", "a"), ("y", "a"), ("z", "b"))))
    reads, moves = split_copies(plan.targets, [t.copies for t in plan.targets], checkpoint, {})
    assert [read.memory for read in reads.one_by_one()] == [2]
    assert [(row, [move.target for move in of_row]) for row, of_row in moves.items()] == [(0, [0, 1])]
    targets, read = carried_out(jobs_of(plan, checkpoint), plan, checkpoint)
    assert set(read.values()) == {1}
    assert_bytes_equal(targets["y"], tensors["a"])


@pytest.mark.parametrize("shape", [(0,), (0, 3), (), (1,)])
def test_empty_and_single_elements_are_scheduled(tmp_path, shape):
    tensors = {"a": address_valued(shape, torch.float32, 7)}
    checkpoint = write_checkpoint(tmp_path, {"a.safetensors": tensors})
    plan = plan_of(columns(checkpoint), target(columns(checkpoint), "a", "BF16", [["a"]]))
    targets, _ = carried_out(jobs_of(plan, checkpoint), plan, checkpoint)
    assert_bytes_equal(targets["a"], tensors["a"].bfloat16())


def test_runs_join_neighbours_up_to_the_limit():
    reads = Reads.from_list([Read(0, 10 * n, 10, n, 0) for n in range(5)] + [Read(1, 50, 10, 5, 0)])
    assert [run.memory.tolist() for run in group_reads(reads, 30)] == [[0, 1, 2], [3, 4], [5]]
    assert [run.memory.tolist() for run in group_reads(reads, 10)] == [[n] for n in range(6)]
    apart = Reads.from_list([Read(0, 0, 10, 0, 0), Read(0, 10 + GAP_BYTES + 1, 10, 1, 0)])
    assert len(list(group_reads(apart, 1 << 20))) == 2


@pytest.mark.parametrize(("nbytes", "parts"), [(10, [10]), (30, [30]), (31, [30, 1]), (90, [30, 30, 30]), (0, [0])])
def test_long_reads_are_split(nbytes, parts):
    reads = split_long(Reads.from_list([Read(2, 100, nbytes, 1, 7), Read(2, 500, 5, 1, 0)]), 30)
    done = [sum(parts[:n]) for n in range(len(parts))]
    assert [tuple(read) for read in reads.one_by_one()] == [
        *((2, 100 + at, part, 1, 7 + at) for at, part in zip(done, parts, strict=True)),
        (2, 500, 5, 1, 0),
    ]


@pytest.mark.parametrize(
    ("total", "threads", "expected"), [(1 << 30, 4, 4 << 20), (64 << 20, 8, 2 << 20), (1000, 2, 1 << 20)]
)
def test_job_is_neither_tiny_nor_larger_than_requested(total, threads, expected):
    assert bytes_per_job(total, threads, 4 << 20) == expected
