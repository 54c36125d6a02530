"""Tests of windows of device memory, executed one element at a time in float64."""

from __future__ import annotations

import numpy as np
import pytest

from automodel_conv.errors import ConversionError
from automodel_conv.planning.boxes import run_of
from automodel_conv.planning.copies import Decode
from automodel_conv.schedule.code_windows import code_windows
from automodel_conv.schedule.jobs import Move
from tests.schedule.coded import FORMATS, SMALL_MATRICES, VIEWS, Case, File, run_window


def windows_of(case, limit, first=0):
    windows = list(code_windows(case.moves, case.file, case.decodes, limit, first))
    assert all(window.nbytes <= limit for window in windows)
    assert [{read.memory for read in window.reads} for window in windows] == [
        {number} for number in range(first, first + len(windows))
    ]
    return windows


def carried_out(case, limit):
    written = {}
    for window in windows_of(case, limit):
        run_window(case.file, window, written)
    return written


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("name", FORMATS)
def test_every_element_is_decoded_with_its_own_scale(name, view):
    case = Case()
    for _ in range(2):
        case.add([view], matrices=2, rows=9, columns=16, **FORMATS[name])
    for limit in (20_000, 1 << 20):
        assert carried_out(case, limit) == case.expected


@pytest.mark.parametrize(("rows", "columns", "block"), SMALL_MATRICES)
@pytest.mark.parametrize("name", ["fp8", "int4 in blocks"])
def test_square_single_and_cut_off_blocks(name, rows, columns, block):
    case = Case(seed=rows)
    case.add(["whole", "transposed"], matrices=3, rows=rows, columns=columns, **FORMATS[name] | {"block": block})
    for limit in (20_000, 1 << 20):
        assert carried_out(case, limit) == case.expected


def test_equal_sources_share_one_call_and_one_table():
    case = Case()
    for _ in range(5):
        case.add(["whole"], **FORMATS["fp8"])
    (window,) = windows_of(case, 1 << 20)
    ((rectangle, positions),) = window.rectangles.items()
    assert (rectangle.shape, len(positions)) == ((4, 8), 5)
    (group,) = window.groups.values()
    assert (group.sources, group.count, group.table_rows) == (5, 20, 20)


@pytest.mark.parametrize(
    ("name", "groups", "rows_of_one"),
    [("fp8", 1, 4), ("mxfp4", 1, 0), ("int4 with zero points", 3, 8), ("nvfp4", 3, 16)],
)
def test_tables_are_as_large_as_the_scales_need(name, groups, rows_of_one):
    case = Case()
    for _ in range(3):
        case.add(["whole"], **FORMATS[name])
    (window,) = windows_of(case, 1 << 20)
    (group,) = window.groups.values()
    assert (group.table_groups, group.table_rows) == (groups, 3 * rows_of_one)


def test_byte_scales_with_a_global_scale_have_a_table_for_each_source():
    case = Case()
    for _ in range(2):
        case.add(["whole"], **FORMATS["mxfp4"] | {"has_global": True})
    (window,) = windows_of(case, 1 << 20)
    (group,) = window.groups.values()
    assert group.table_rows == 2 * 256
    assert carried_out(case, 1 << 20) == case.expected


def test_each_matrix_with_a_global_scale_of_its_own_has_a_table():
    case = Case()
    for _ in range(2):
        case.add(["transposed"], matrices=3, **FORMATS["nvfp4, a global scale for each matrix"])
    case.add(["whole"], **FORMATS["mxfp4"] | {"has_global": True})
    (window,) = windows_of(case, 1 << 20)
    (group,) = window.groups.values()
    assert (group.sources, group.table_rows) == (7, 7 * 256)
    assert not window.moves
    assert carried_out(case, 1 << 20) == case.expected


def test_stack_with_global_scales_is_read_in_as_few_reads_as_one_without():
    """Its matrices are decoded one by one, straight into the target, also if there are thousands of them."""
    file = File()
    codes = np.zeros((2000, 16, 64), np.uint8)
    row = file.add("w", "U8", codes)
    scales = file.add("s", "U8", np.ones((2000, 16, 8), np.uint8))
    global_scale = file.add("g", "F32", np.ones(2000, np.float32))
    decodes = {row: Decode("e2m1", (16, 128), (1, 16), scales, global_scale=global_scale)}
    moves = {row: [Move(0, "BF16", run_of(2 * codes.size), 0, 0)]}
    (window,) = code_windows(moves, file, decodes, 1 << 26, 0)
    assert sorted(read.nbytes for read in window.reads) == [8000, codes.size // 8, codes.size]
    ((rectangle, positions),) = window.rectangles.items()
    assert (rectangle.shape, rectangle.in_window, len(positions)) == ((16, 128), False, 2000)


def test_sources_of_several_kinds_share_a_window():
    case = Case()
    for name in (*FORMATS, *FORMATS):
        case.add(["whole", "transposed"], rows=6, **FORMATS[name])
    assert len(windows_of(case, 1 << 20)[0].groups) == len(FORMATS)
    assert carried_out(case, 1 << 20) == case.expected
    assert len(windows_of(case, 20_000)) > 1
    assert carried_out(case, 20_000) == case.expected


def test_windows_are_numbered_from_the_first():
    case = Case()
    case.add(["whole"], rows=512, columns=64)
    assert len(windows_of(case, 100_000, first=7)) > 2


def test_without_moves_there_are_no_windows():
    assert list(code_windows({}, File(), {}, 4096, 0)) == []


@pytest.mark.parametrize("name", FORMATS)
def test_window_that_is_too_small_is_refused_with_the_bytes_that_are_enough(name):
    case = Case()
    case.add(["whole", "every other column"], rows=9, columns=64, **FORMATS[name])
    with pytest.raises(ConversionError, match=r"too small to decode s0(.|\n)*found: +200") as caught:
        windows_of(case, 100)
    enough = int(str(caught.value).split("at least ")[1].split()[0]) // 2
    assert carried_out(case, enough) == case.expected


@pytest.mark.parametrize("rows", [1, 5, 8])
def test_many_matrices_that_end_within_blocks_stay_within_the_window(rows):
    """Their blocks of scales exceed their elements by those of a whole block."""
    file = File()
    shape = 2000, rows, 16
    codes = np.zeros(shape, np.uint8)
    row = file.add("w", "F8_E4M3", codes)
    scales = file.add("s", "F32", np.ones((2000 * -(-rows // 4), 8), np.float32))
    decodes = {row: Decode("e4m3", (rows, 16), (4, 2), scales)}
    moves = {row: [Move(0, "F32", run_of(codes.size), 0, 0)]}
    windows = list(code_windows(moves, file, decodes, 1 << 17, 0))
    assert len(windows) > 10
    assert all(window.nbytes <= 1 << 17 for window in windows)
    of_codes = range(file.offsets[row], file.offsets[row] + codes.size)
    assert (
        sum(read.nbytes for window in windows for read in window.reads if read.offset_bytes in of_codes) == codes.size
    )
