"""Tests of adding a verb, which is a file and a line in the table: batches of copies use it."""

import numpy as np
import pytest
import torch

from automodel_conv.execution.copy_batch import CopyBatch
from automodel_conv.execution.stats import CopyCounts
from automodel_conv.kernels import verbs
from automodel_conv.kernels.launch import compile_ahead
from automodel_conv.planning.boxes import Box
from automodel_conv.planning.copies import StridedCopy
from automodel_conv.testing import POISON, address_valued, assert_bytes_equal
from tests.kernels.toy_verb import GATHER, GATHER_TILES

pytest.importorskip("triton")

ROWS, COLUMNS, COUNT = 19, 45, 3  # several tiles in each direction, the last ones partial
# Every other element of matrices [ROWS, 2 * COLUMNS + 1], one after the other in one tensor.
COPY = StridedCopy(
    Box((ROWS, COLUMNS), (2 * COLUMNS + 1, 2), (COLUMNS, 1)),
    (0,) * COUNT,
    tuple(k * ROWS * (2 * COLUMNS + 1) for k in range(COUNT)),
    tuple(k * ROWS * COLUMNS for k in range(COUNT)),
)


@pytest.fixture
def table(monkeypatch):
    """Add a line for the toy verb to the table."""
    monkeypatch.setattr(verbs, "VERBS", (*verbs.VERBS, GATHER))


def batch_of(src_dtype, dst_dtype, phase_bytes=0):
    """Return a batch of copies, its output, and the expected result. Sources start off any multiple of their size."""
    values = address_valued((COUNT, ROWS, 2 * COLUMNS + 1), src_dtype)
    raw = torch.zeros(values.nbytes + phase_bytes, dtype=torch.uint8)
    raw[phase_bytes:] = values.view(torch.uint8).flatten()
    source = torch.frombuffer(raw.numpy()[phase_bytes:], dtype=src_dtype).view(values.shape)
    nbytes = COUNT * ROWS * COLUMNS * dst_dtype.itemsize
    output = torch.from_numpy(np.full(nbytes, POISON, np.uint8)).view(dst_dtype).view(COUNT, ROWS, COLUMNS)
    batch = CopyBatch()
    batch.add(COPY, [source], output)
    return batch, output, values[:, :, : 2 * COLUMNS : 2].to(dst_dtype).contiguous()


DTYPES = [(torch.uint8, torch.uint8), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)]


@pytest.mark.parametrize("phase_bytes", [0, 1])
@pytest.mark.parametrize(("src_dtype", "dst_dtype"), DTYPES, ids=str)
def test_copies_use_an_added_verb_and_write_the_same_bytes(table, src_dtype, dst_dtype, phase_bytes):
    batch, output, expected = batch_of(src_dtype, dst_dtype, phase_bytes)
    (variants,) = batch.variants()
    assert {variant.kernel for variant in variants} == {GATHER_TILES}
    compile_ahead(variants, output.device)
    assert batch.run(True, variants) == CopyCounts(by_kernels=COUNT, by_torch=0)
    assert_bytes_equal(output, expected)


def test_without_its_line_torch_runs_these_copies():
    batch, output, expected = batch_of(torch.bfloat16, torch.bfloat16)
    assert not batch.variants()
    assert batch.run(True) == CopyCounts(by_kernels=0, by_torch=COUNT)
    assert_bytes_equal(output, expected)


def test_copies_that_an_added_verb_refuses_are_left_to_torch(table):
    batch, output, expected = batch_of(torch.int64, torch.int64)
    assert batch.run(True) == CopyCounts(by_kernels=0, by_torch=COUNT)
    assert_bytes_equal(output, expected)
