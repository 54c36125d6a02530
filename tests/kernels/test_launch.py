"""Tests of launches started together: one table is uploaded, and each uses its own rows of it, in the given order."""

from unittest import mock

import numpy as np
import pytest
import torch

from automodel_conv.errors import ConversionError
from automodel_conv.kernels import launch
from automodel_conv.kernels.address_table import as_matrices
from automodel_conv.kernels.interleave import interleave, interleave_launches, interleave_torch
from automodel_conv.kernels.strided_copy import strided_copy_launches
from automodel_conv.kernels.transpose import transpose, transpose_launches, transpose_torch
from automodel_conv.testing import address_valued, assert_bytes_equal

pytest.importorskip("triton")

COUNT, ROWS, COLUMNS = 3, 6, 16


def sources(number):
    return [address_valued((ROWS, COLUMNS), torch.bfloat16, 1000 * (COUNT * number + k)) for k in range(COUNT)]


def poisoned(*shape):
    return [torch.full(shape, -1, dtype=torch.int16).view(torch.bfloat16) for _ in range(COUNT)]


def works():
    """Return launches of three verbs, of two and three operands, with their outputs and the expected results."""
    copied, turned, woven = poisoned(ROWS, COLUMNS), poisoned(COLUMNS, ROWS), poisoned(COLUMNS, 2 * ROWS)
    reads = [sources(number) for number in range(4)]
    # At an odd address: another variant, so another launch with the same table.
    raw = torch.zeros(2 * ROWS * COLUMNS + 1, dtype=torch.uint8)
    raw[1:] = reads[1][1].view(torch.uint8).flatten()
    odd = torch.frombuffer(raw.numpy()[1:], dtype=torch.bfloat16).view(ROWS, COLUMNS)
    turnable = [reads[1][0], odd, reads[1][2]]
    operands = [
        [as_matrices("operand", operand) for operand in tensors]
        for tensors in ([copied, reads[0]], [turned, turnable], [woven, reads[2], reads[3]])
    ]
    launches = [
        verb(*matrices)
        for verb, matrices in zip(
            (strided_copy_launches, transpose_launches, interleave_launches), operands, strict=True
        )
    ]
    expected = [[*reads[0]], poisoned(COLUMNS, ROWS), poisoned(COLUMNS, 2 * ROWS)]
    transpose_torch(expected[1], reads[1])
    interleave_torch(expected[2], reads[2], reads[3])
    return launches, [copied, turned, woven], expected, (reads, raw)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1,)])
def test_launches_started_together_equal_separate_launches(order):
    launches, outputs, expected, _held = works()
    seen = []

    def spy(variant, grid, table, integers, real=launch.queue):
        seen.append((variant.kernel.name, grid[1], tuple(table.shape)))
        real(variant, grid, table, integers)

    with (
        mock.patch.object(launch, "upload", wraps=launch.upload) as upload,
        mock.patch.object(launch, "queue", spy),
    ):
        launch.start(*(launches[number] for number in order))
    assert upload.call_count == 1
    kernels = {
        0: [("copy_tiles", 3, (3, 2))],
        1: [("transpose_tiles", 2, (2, 2)), ("transpose_tiles", 1, (1, 2))],
        2: [("interleave_tiles", 3, (3, 3))],
    }
    assert [name for name, *_ in seen] == [name for number in order for name, *_ in kernels[number]]
    assert sorted(seen) == sorted(one for number in order for one in kernels[number])
    for number in range(3):
        wanted = expected[number] if number in order else poisoned(*outputs[number][0].shape)
        for output, want in zip(outputs[number], wanted, strict=True):
            assert_bytes_equal(output, want)


def test_nothing_to_launch_uploads_nothing():
    with mock.patch.object(launch, "upload") as upload:
        launch.start()
        launch.start(launch.NO_LAUNCHES, launch.NO_LAUNCHES)
    assert not upload.called


def test_calls_without_matrices_among_others_are_passed_over():
    launches, outputs, expected, _held = works()
    launch.start(launch.NO_LAUNCHES, launches[0], launch.NO_LAUNCHES)
    for output, want in zip(outputs[0], expected[0], strict=True):
        assert_bytes_equal(output, want)


def test_launches_of_several_devices_are_refused_before_anything_is_written():
    launches, outputs, _, _held = works()
    elsewhere = launches[1]._replace(device=torch.device("cuda", 1))
    with pytest.raises(ConversionError, match="cpu, cuda:1"):
        launch.start(launches[0], elsewhere)
    for output, untouched in zip(outputs[0], poisoned(ROWS, COLUMNS), strict=True):
        assert_bytes_equal(output, untouched)


def test_verbs_write_to_the_matrices_of_one_tensor():
    gate, up, down = sources(0), sources(1), sources(2)
    raw = torch.full((COUNT, COLUMNS, 2 * ROWS), -1, dtype=torch.int16)
    woven, halves = raw.view(torch.bfloat16), raw.clone().view(torch.bfloat16)
    interleave(woven, gate, up)
    transpose(
        halves.unflatten(2, (2, ROWS)).transpose(1, 2), [half for pair in zip(gate, down, strict=True) for half in pair]
    )
    for k in range(COUNT):
        assert_bytes_equal(woven[k], torch.stack([gate[k].t(), up[k].t()], 2).flatten(1))
        assert_bytes_equal(halves[k], torch.cat([gate[k], down[k]]).t().contiguous())


def test_matrices_with_the_alignment_of_their_rows_are_one_launch_in_order():
    # Rows of 12 bytes: no address gives them a better alignment than 4, and 20 of these matrices are better than that.
    src = [torch.zeros(5, 6, dtype=torch.bfloat16) for _ in range(20)]
    dst = [torch.zeros(6, 5, dtype=torch.bfloat16) for _ in range(20)]
    planned = transpose_launches(as_matrices("dst", dst), as_matrices("src", src))
    assert [(one.start, one.stop) for one in planned.launches] == [(0, 20)]
    assert np.array_equal(planned.table, [[d.data_ptr(), s.data_ptr()] for d, s in zip(dst, src, strict=True)])
