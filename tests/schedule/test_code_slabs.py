"""Tests of slabs of a quantized source: they cover it, fit into their window, and have the kind of their scales."""

from __future__ import annotations

import pytest

from automodel_conv.errors import ConversionError
from automodel_conv.planning.boxes import Box
from automodel_conv.schedule.code_slabs import cut_into_slabs
from automodel_conv.schedule.coded_source import CodedSource
from automodel_conv.schedule.jobs import ALIGN_BYTES, Move
from tests.schedule.coded import FORMATS, Case


def cut(case, row, limit, **options):
    source = CodedSource(row, case.decodes[row], case.file, "F32")
    moves = [move._replace(target=number) for number, move in enumerate(case.moves[row])]
    return list(cut_into_slabs(source, moves, limit, **options))


def one(name, *views, **more):
    case = Case()
    return case, case.add(views or ["whole"], **FORMATS[name] | more)


@pytest.mark.parametrize("limit", [40_000, 80_000, 1 << 20])
@pytest.mark.parametrize("name", FORMATS)
def test_slabs_read_all_codes_once_and_fit(name, limit):
    case, row = one(name, rows=64, columns=32, matrices=2)
    slabs = cut(case, row, limit)
    ranges = [part for slab in slabs for part in slab.codes]
    assert ranges[0][0] == 0
    assert [first for first, _ in ranges[1:]] == [last for _, last in ranges[:-1]]
    assert ranges[-1][1] == case.file.nbytes[row]
    assert all(slab.nbytes <= limit for slab in slabs)
    assert all(slab.codes_bytes % ALIGN_BYTES == 0 for slab in slabs)


@pytest.mark.parametrize(
    ("name", "more", "is_row", "is_shared", "for_each"),
    [
        ("fp8", {}, False, False, False),
        ("mxfp4", {}, True, True, False),
        ("mxfp4", {"has_global": True}, True, False, True),
        ("mxfp4", {"code_format": "int4", "zero_points": True}, False, False, False),
        ("nvfp4", {}, False, False, False),
    ],
)
def test_byte_of_a_scale_is_its_table_row_unless_zero_points_change_it(name, more, is_row, is_shared, for_each):
    case, row = one(name, **more)
    kind = cut(case, row, 1 << 20)[0].kind
    assert (kind.scale_is_table_row, kind.is_shared, kind.has_table_for_each_source) == (is_row, is_shared, for_each)


@pytest.mark.parametrize(("name", "row_bytes"), [("fp8", 4 * 256), ("mxfp4", 4 * 16), ("int4 in blocks", 4 * 16)])
def test_table_row_has_a_value_for_each_code(name, row_bytes):
    case, row = one(name)
    assert cut(case, row, 1 << 20)[0].kind.row_bytes == row_bytes


@pytest.mark.parametrize(("view", "straight"), [("transposed", True), ("every other column", False)])
def test_values_go_to_the_window_only_if_strides_demand_it(view, straight):
    case, row = one("fp8", view)
    (slab,) = cut(case, row, 1 << 20)
    assert (slab.values_bytes == 0) is straight
    assert (slab.moves == ()) is straight
    assert {rectangle.in_window for rectangle, _ in slab.rectangles} == {not straight}


def test_caller_can_ask_for_values_in_the_window():
    case, row = one("fp8")
    (slab,) = cut(case, row, 1 << 20, in_place=False)
    assert slab.values_bytes == 4 * 32
    assert [move.source_offset for move in slab.moves] == [0]


def test_cut_between_the_two_codes_of_a_byte_decodes_into_the_window():
    case, row = one("mxfp4", "transposed", rows=2, columns=4096, block=(1, 4096))
    case.moves[row] = [Move(0, "F32", Box((4095,), (1,), (1,)), 1, 0)]
    assert all(slab.moves for slab in cut(case, row, 1 << 20))


def test_rows_of_blocks_are_those_of_the_elements():
    case, row = one("fp8", rows=9, columns=8, block=(4, 4))
    case.moves[row] = [Move(0, "F32", Box((2, 8), (8, 1), (8, 1)), 5 * 8, 0)]
    (slab,) = cut(case, row, 1 << 20)
    assert slab.block_rows == (1, 2)
    assert slab.scale_count == 2
    assert slab.codes == ((40, 56),)
    ((rectangle, position),) = slab.rectangles
    assert (rectangle.shape, rectangle.start, position.scale) == ((2, 8), (1, 0), 0)


def test_zero_points_of_the_rows_are_counted_in_packed_rows():
    case, row = one("int4 with zero points", rows=32, columns=8, block=(1, 8))
    case.moves[row] = [Move(0, "F32", Box((10, 8), (8, 1), (8, 1)), 6 * 8, 0)]
    (slab,) = cut(case, row, 1 << 20)
    assert slab.kind.zero_points == (2, 6)
    assert slab.kind.grid == (10, 1)


def test_limit_that_is_too_small_names_the_source():
    case, row = one("fp8", rows=64, columns=64)
    with pytest.raises(ConversionError, match=r"too small to decode s0(.|\n)*device_scratch_bytes of at least \d+"):
        cut(case, row, 500)
