"""Tests of windows emptied one after another: each from its own region, with the kernels worth compiling."""

import pytest
import torch

from automodel_conv.execution.stats import CopyCounts
from automodel_conv.execution.window_copies import WindowCopies
from automodel_conv.kernels import jit
from automodel_conv.planning.boxes import Box, run_of
from automodel_conv.schedule.device import Window
from automodel_conv.schedule.jobs import Copies
from automodel_conv.testing import address_valued, assert_bytes_equal

needs_triton = pytest.mark.skipif(not jit.IS_INSTALLED, reason="triton is not installed")
ROWS, COLUMNS = 16, 32
NBYTES = 2 * ROWS * COLUMNS
TRANSPOSED = Box((COLUMNS, ROWS), (1, COLUMNS), (ROWS, 1))
PLAIN = run_of(ROWS * COLUMNS)


def window(box, target, dtype="BF16"):
    return Window([Copies(target, dtype, box, [0], [0])], NBYTES, 1, {}, {})


def outputs(*dtypes):
    return [torch.full((ROWS * COLUMNS,), 0, dtype=dtype).fill_(-1) for dtype in dtypes]


def regions(count):
    """Return regions with different values, and these values."""
    memories = [address_valued((ROWS, COLUMNS), torch.bfloat16, 1000 * n) for n in range(count)]
    return [memory.view(torch.uint8).view(-1) for memory in memories], memories


@pytest.mark.parametrize("chosen", [None, frozenset()], ids=["no kernels", "no kernel is allowed"])
def test_each_window_is_copied_out_of_the_region_that_is_its_turn(chosen):
    raw, values = regions(2)
    tensors = outputs(*[torch.bfloat16] * 3)
    copies = WindowCopies([window(PLAIN, 0), window(TRANSPOSED, 1), window(PLAIN, 2)], tensors, raw)
    for number in (2, 0, 1):
        assert copies.run(number, chosen) == CopyCounts(0, 1)
    assert_bytes_equal(tensors[0].view(ROWS, COLUMNS), values[0])
    assert_bytes_equal(tensors[1].view(COLUMNS, ROWS), values[1].t().contiguous())
    assert_bytes_equal(tensors[2].view(ROWS, COLUMNS), values[0])


def test_copies_begin_at_their_offsets_and_cast():
    raw, values = regions(1)
    tensors = outputs(torch.float32)
    copies = WindowCopies([Window([Copies(0, "BF16", run_of(3), [5, 40], [1, 10])], NBYTES, 1, {}, {})], tensors, raw)
    assert copies.run(0, None) == CopyCounts(0, 2)
    wanted = torch.full((ROWS * COLUMNS,), -1.0)
    wanted[1:4], wanted[10:13] = values[0].view(-1)[5:8].float(), values[0].view(-1)[40:43].float()
    assert torch.equal(tensors[0], wanted)


def test_window_of_several_dtypes_views_its_region_as_each():
    raw = torch.arange(64, dtype=torch.uint8)
    tensors = [torch.zeros(2, dtype=torch.int32), torch.zeros(4, dtype=torch.uint8)]
    mixed = Window([Copies(0, "I32", run_of(2), [4], [0]), Copies(1, "U8", run_of(4), [7], [0])], 64, 1, {}, {})
    WindowCopies([mixed], tensors, [raw]).run(0, None)
    assert tensors[0].tolist() == raw.view(torch.int32)[4:6].tolist()
    assert tensors[1].tolist() == [7, 8, 9, 10]


@needs_triton
def test_kernels_run_the_chosen_copies_and_torch_the_rest():
    raw, values = regions(1)
    tensors = outputs(*[torch.bfloat16] * 2)
    both = WindowCopies(
        [Window([*window(PLAIN, 0).copies, *window(TRANSPOSED, 1).copies], NBYTES, 1, {}, {})], tensors, raw
    )
    plain = WindowCopies([window(PLAIN, 0)], tensors, raw).variants(10)
    assert len(plain) == 1
    assert both.run(0, plain) == CopyCounts(1, 1)
    assert both.run(0, both.variants(10)) == CopyCounts(2, 0)
    assert_bytes_equal(tensors[0].view(ROWS, COLUMNS), values[0])
    assert_bytes_equal(tensors[1].view(COLUMNS, ROWS), values[0].t().contiguous())


@needs_triton
def test_variants_that_write_the_most_bytes_are_chosen():
    raw, _ = regions(1)
    tensors = outputs(torch.bfloat16, torch.float32)
    few = Window([Copies(0, "BF16", TRANSPOSED, [0], [0])], NBYTES, 1, {}, {})
    many = Window([Copies(1, "BF16", TRANSPOSED, [0], [0])], NBYTES, 1, {}, {})  # twice as wide
    copies = WindowCopies([few, few, few, many], tensors, raw)  # a geometry counts once
    assert copies.variants(0) == frozenset()
    (one,) = copies.variants(1)
    assert one.dst == "float32"
    assert len(copies.variants(2)) == 2


def test_released_copies_still_copy_what_is_not_coded():
    raw, values = regions(1)
    tensors = outputs(torch.bfloat16)
    copies = WindowCopies([window(PLAIN, 0)], tensors, raw)
    copies.release()
    copies.run(0, None)
    assert_bytes_equal(tensors[0].view(ROWS, COLUMNS), values[0])
