"""Tests of batches of copies: planned without a trace, started with one upload, the rest copied by torch."""

import math
from unittest import mock

import pytest
import torch

from automodel_conv.execution.copy_batch import CopyBatch
from automodel_conv.execution.stats import CopyCounts
from automodel_conv.kernels import launch
from automodel_conv.kernels.strided_copy_torch import strided_copy_torch
from automodel_conv.kernels.variants import Variant
from automodel_conv.planning.boxes import Box
from automodel_conv.planning.copies import StridedCopy
from automodel_conv.testing import POISON, address_valued, assert_bytes_equal

pytest.importorskip("triton")

ROWS, COLUMNS = 16, 24
NUMEL = ROWS * COLUMNS


def poisoned(shape, dtype):
    return torch.full((math.prod(shape) * dtype.itemsize,), POISON, dtype=torch.uint8).view(dtype).view(shape)


def untouched(outputs):
    return all(bool((output.view(torch.uint8) == POISON).all()) for output in outputs.values())


def copies():
    """Return a batch with every kind of copy, its outputs, and the expected results."""
    first, second, third = (address_valued((ROWS, COLUMNS), torch.bfloat16, 1000 * k) for k in range(3))
    wide = address_valued((ROWS, COLUMNS), torch.int64, 0)
    whole, turned = (1,), (1, COLUMNS)
    pairs = {
        "as it is": ((NUMEL,), whole, whole, [first, second], (0, 1), (0, 0), (0, NUMEL), (2, ROWS, COLUMNS)),
        "turned": ((COLUMNS, ROWS), turned, (ROWS, 1), [first], (0,), (0,), (0,), (COLUMNS, ROWS)),
        # Two that fill each other's gaps, and one that is unpaired.
        "woven": (
            (COLUMNS, ROWS),
            turned,
            (2 * ROWS, 2),
            [first, second, third],
            (0, 1, 2),
            (0, 0, 0),
            (0, 1, 2 * NUMEL),
            (2, COLUMNS, 2 * ROWS),
        ),
        "for torch": ((COLUMNS, ROWS), turned, (ROWS, 1), [wide], (0,), (0,), (0,), (COLUMNS, ROWS)),
    }
    expected = {
        "as it is": torch.stack([first, second]),
        "turned": first.t(),
        "woven": poisoned((2, COLUMNS, 2 * ROWS), torch.bfloat16),
        "for torch": wide.t(),
    }
    for (matrix, lane), source in {(0, 0): first, (0, 1): second, (1, 0): third}.items():
        expected["woven"][matrix, :, lane::2] = source.t()
    batch, outputs = CopyBatch(), {}
    for name, (*columns, shape) in pairs.items():
        sources = columns.pop(3)
        outputs[name] = poisoned(shape, sources[0].dtype)
        batch.add(StridedCopy(Box(*columns[:3]), *columns[3:]), sources, outputs[name])
    return batch, outputs, expected


def check(outputs, expected):
    for name, output in outputs.items():
        assert_bytes_equal(output, expected[name].contiguous())


def test_batch_of_any_copies_is_one_upload():
    batch, outputs, expected = copies()
    with mock.patch.object(launch, "upload", wraps=launch.upload) as upload:
        assert batch.run(True) == CopyCounts(by_kernels=5, by_torch=2)
    assert upload.call_count == 1
    check(outputs, expected)


def test_without_kernels_torch_runs_all_copies():
    batch, outputs, expected = copies()
    with mock.patch.object(launch, "upload") as upload:
        assert batch.run(False) == CopyCounts(by_kernels=0, by_torch=7)
    assert not upload.called
    check(outputs, expected)


def test_plan_writes_nothing_and_run_executes_it():
    batch, outputs, expected = copies()
    planned = batch.plan(True)
    assert untouched(outputs)
    assert planned.counts == CopyCounts(by_kernels=5, by_torch=2)
    assert len(planned.launches) == 3
    assert [len(side) for side in planned.by_torch] == [2, 2]
    launch.start(*reversed(planned.launches))
    strided_copy_torch(*planned.by_torch)
    check(outputs, expected)


@pytest.mark.parametrize("kernel", ["copy_tiles", "transpose_tiles"])
def test_only_variants_that_are_allowed_are_launched(kernel):
    batch, outputs, expected = copies()
    allowed: frozenset[Variant] = frozenset(
        variant for variants in batch.variants() for variant in variants if variant.kernel.name == kernel
    )
    planned = batch.plan(True, allowed)
    assert [one.variants for one in planned.launches] == [allowed]
    assert planned.counts.by_torch == 7 - planned.counts.by_kernels
    assert batch.run(True, allowed) == planned.counts
    check(outputs, expected)


def test_batch_that_has_run_is_empty():
    batch, outputs, _ = copies()
    batch.run(True)
    for output in outputs.values():
        output.view(torch.uint8).fill_(POISON)
    assert batch.run(True) == CopyCounts(0, 0)
    assert untouched(outputs)


def test_copies_from_sources_of_different_dtypes_keep_their_places():
    half, full = address_valued((8,), torch.bfloat16, 0), address_valued((8,), torch.float32, 100)
    output = poisoned((32,), torch.float32)
    batch = CopyBatch()
    batch.add(
        StridedCopy(Box((4,), (1,), (1,)), (0, 1, 0, 1), (4, 0, 0, 4), (0, 8, 16, 28)),
        [half, full],
        output,
    )
    assert batch.run(True) == CopyCounts(by_kernels=4, by_torch=0)
    want = poisoned((32,), torch.float32)
    want[0:4], want[8:12], want[16:20], want[28:32] = half[4:], full[:4], half[:4], full[4:]
    assert_bytes_equal(output, want)
