"""Tests of rows, matrices and blocks of a quantized source, against loops over its elements."""

import numpy as np
import pytest

from automodel_conv.planning.copies import Decode
from automodel_conv.schedule.coded_source import CodedSource
from tests.schedule.coded import File

GEOMETRIES = [  # matrices, rows, columns, block
    (1, 4, 4, (2, 2)),
    (3, 4, 6, (2, 4)),
    (3, 5, 6, (2, 4)),
    (2, 1, 1, (1, 1)),
    (4, 1, 8, (128, 128)),
    (2, 3, 2, (1, 2)),
    (2, 8, 3, (8, 3)),
]


def source_of(matrices, rows, columns, block):
    file = File()
    file.add("w", "F8_E4M3", np.zeros((matrices, rows, columns), np.uint8))
    return CodedSource(0, Decode("e4m3", (rows, columns), block, 1), file, "F32")


def coordinates(element, rows, columns):
    return element // columns // rows, element // columns % rows, element % columns


@pytest.mark.parametrize(("matrices", "rows", "columns", "block"), GEOMETRIES)
def test_every_element_is_in_the_row_of_blocks_of_its_matrix(matrices, rows, columns, block):
    source = source_of(matrices, rows, columns, block)
    grid_rows = -(-rows // block[0])
    assert source.numel == matrices * rows * columns
    assert source.grid_columns == -(-columns // block[1])
    for element in range(source.numel):
        matrix, row, _ = coordinates(element, rows, columns)
        assert source.block_row(element) == matrix * grid_rows + row // block[0]


@pytest.mark.parametrize(("matrices", "rows", "columns", "block"), GEOMETRIES)
def test_number_of_scales_is_that_of_all_blocks(matrices, rows, columns, block):
    source = source_of(matrices, rows, columns, block)
    scales = matrices * -(-rows // block[0]) * -(-columns // block[1])
    assert source.scales_per_element * source.numel == pytest.approx(scales)


@pytest.mark.parametrize(("matrices", "rows", "columns", "block"), GEOMETRIES)
def test_rectangles_hold_each_element_of_a_range_once_and_stay_in_a_matrix(matrices, rows, columns, block):
    source = source_of(matrices, rows, columns, block)
    for start in range(source.numel):
        for stop in range(start + 1, source.numel + 1, 2):
            for left, right in ((0, columns), (columns // 3, columns - columns // 4)):
                elements = []
                for element, first, after, c0, c1 in source.rectangles(start, stop, (left, right)):
                    assert element // columns % source.matrix_rows == first
                    assert element % columns == c0
                    assert after <= source.matrix_rows
                    elements += [element + r * columns + c for r in range(after - first) for c in range(c1 - c0)]
                assert elements == [e for e in range(start, stop) if left <= e % columns < right]


def test_matrices_of_whole_blocks_count_as_one():
    source = source_of(3, 4, 6, (2, 4))
    assert (source.matrix_rows, source.grid_rows) == (12, 6)
    source = source_of(3, 5, 6, (2, 4))
    assert (source.matrix_rows, source.grid_rows) == (5, 3)


@pytest.mark.parametrize(("matrices", "rows", "columns", "block"), GEOMETRIES)
def test_matrices_with_global_scales_of_their_own_are_sections(matrices, rows, columns, block):
    file = File()
    file.add("w", "F8_E4M3", np.zeros((matrices, rows, columns), np.uint8))
    file.add("globals", "F32", np.ones(matrices, np.float32))
    source = CodedSource(0, Decode("e4m3", (rows, columns), block, 1, global_scale=1), file, "F32")
    grid_rows = -(-rows // block[0])
    assert source.section == rows * columns
    assert (source.matrix_rows, source.grid_rows) == (rows, grid_rows)
    for element in range(source.numel):
        matrix, row, _ = coordinates(element, rows, columns)
        assert source.block_row(element) == matrix * grid_rows + row // block[0]
        assert source.global_bytes(element) == 4 * matrix


def test_one_global_scale_makes_one_section():
    file = File()
    file.add("w", "F8_E4M3", np.zeros((3, 4, 6), np.uint8))
    file.add("global", "F32", np.ones(1, np.float32))
    source = CodedSource(0, Decode("e4m3", (4, 6), (2, 4), 1, global_scale=1), file, "F32")
    assert (source.section, source.matrix_rows) == (72, 12)
    assert {source.global_bytes(element) for element in range(72)} == {0}


def test_codes_of_four_bits_are_counted_in_halves_of_bytes():
    file = File()
    file.add("w", "U8", np.zeros((2, 3, 4), np.uint8))
    assert CodedSource(0, Decode("e2m1", (3, 8), (1, 4), 1), file, "F32").numel == 48
