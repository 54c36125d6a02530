"""Tests of stored grids of scales and zero points against loops over their elements."""

import itertools

import pytest
import torch

from automodel_conv.execution.grids import in_code_order, unpacked_zeros
from automodel_conv.planning.copies import ZeroPacking


def test_scales_without_words_are_returned_as_they_are():
    scales = torch.rand(3, 8)
    assert in_code_order(scales, ()) is scales


@pytest.mark.parametrize("lead", [(), (1,), (3,), (2, 3), (0,)], ids=str)
@pytest.mark.parametrize("words", [1, 4])
def test_scales_of_awq_are_in_the_order_of_its_codes(lead, words):
    scales = torch.arange(8 * words).expand(*lead, -1)
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    expected = torch.tensor([8 * word + column for word in range(words) for column in order])
    assert torch.equal(in_code_order(scales, (4, 2)), expected.expand(*lead, -1))


def test_axes_of_a_word_are_reversed():
    word = (2, 3, 4)
    expected = [a * 12 + b * 4 + c for c, b, a in itertools.product(range(4), range(3), range(2))]
    assert in_code_order(torch.arange(24), word).tolist() == expected


PACKINGS = [
    ZeroPacking(),
    ZeroPacking(by_columns=True),
    ZeroPacking(by_columns=True, added=0x11111111),
    ZeroPacking(added=-1),
]


@pytest.mark.parametrize("packing", PACKINGS, ids=str)
@pytest.mark.parametrize("lead", [(), (2,)], ids=str)
@pytest.mark.parametrize(("first", "last", "columns"), [(0, 1, 1), (0, 9, 8), (3, 12, 13), (8, 16, 16), (5, 5, 8)])
def test_zero_points_are_nibbles_of_words(packing, lead, first, last, columns):
    packed_first, packed_last = packing.rows(first, last)
    shape = (*lead, packed_last - packed_first, packing.columns(columns))
    generator = torch.Generator().manual_seed(0)
    packed = torch.randint(-(2**31), 2**31, shape, generator=generator).to(torch.int32)
    skipped = packing.skipped(first)
    zeros = unpacked_zeros(packed, packing, skipped, (last - first, columns))
    assert zeros.dtype == torch.int32
    assert zeros.shape == (*lead, last - first, columns)
    for place in itertools.product(*map(range, zeros.shape)):
        *matrix, row, column = place
        row += skipped
        at, nibble = ((row, column // 8), column % 8) if packing.by_columns else ((row // 8, column), row % 8)
        word = (packed[(*matrix, *at)].item() + packing.added) % 2**32
        assert zeros[place] == word >> 4 * nibble & 15
