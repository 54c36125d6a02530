"""Tests of jobs that decode quantized sources on the host, executed one element at a time in float64."""

from __future__ import annotations

import pytest

from automodel_conv.errors import ConversionError
from automodel_conv.planning.boxes import Box
from automodel_conv.schedule.decoding import decode_jobs
from automodel_conv.schedule.jobs import Move
from tests.schedule.coded import FORMATS, SMALL_MATRICES, VIEWS, Case, run_job


def jobs_of(case, limit):
    jobs = list(decode_jobs(case.moves, case.file, case.decodes, limit))
    assert all(job.scratch_bytes <= limit for job in jobs)
    return jobs


def carried_out(case, limit):
    written = {}
    for job in jobs_of(case, limit):
        run_job(case.file, job, written)
    return written


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("name", FORMATS)
def test_every_element_is_decoded_with_its_own_scale(name, view):
    case = Case()
    case.add([view], matrices=2, rows=9, columns=16, **FORMATS[name])
    for limit in (1200, 1 << 20):
        assert carried_out(case, limit) == case.expected


@pytest.mark.parametrize(("rows", "columns", "block"), SMALL_MATRICES)
@pytest.mark.parametrize("name", ["fp8", "int4 in blocks"])
def test_square_single_and_cut_off_blocks(name, rows, columns, block):
    case = Case(seed=rows)
    case.add(["whole", "transposed"], matrices=3, rows=rows, columns=columns, **FORMATS[name] | {"block": block})
    for limit in (800, 1 << 20):
        assert carried_out(case, limit) == case.expected


def test_sources_are_decoded_in_the_order_of_the_file():
    case = Case()
    for _ in range(3):
        case.add(["whole"])
    case.moves = dict(reversed(case.moves.items()))
    targets = [copies.target for job in jobs_of(case, 1 << 20) for copies in job.copies]
    assert targets == [0, 1, 2]


def test_codes_are_read_once_with_any_scratch():
    case = Case()
    row = case.add(["whole", "transposed"], rows=64, columns=32)
    jobs = jobs_of(case, 1500)
    assert len(jobs) > 4
    begin, nbytes = case.file.offsets[row], case.file.nbytes[row]
    reads = sorted(read[1:3] for job in jobs for read in job.reads.one_by_one() if begin <= read[1] < begin + nbytes)
    assert [offset for offset, _ in reads] == [begin, *(offset + length for offset, length in reads[:-1])]
    assert sum(length for _, length in reads) == nbytes


def test_part_of_the_columns_decodes_no_others():
    case = Case()
    row = case.add([], rows=96, columns=128)
    case.moves[row] = [Move(0, "F32", Box((96, 20), (128, 1), (20, 1)), 50, 0)]
    shapes = [rectangle.shape for job in jobs_of(case, 1 << 20) for rectangle in job.rectangles]
    assert {columns for _, columns in shapes} == {20}
    assert sum(rows for rows, _ in shapes) == 96


@pytest.mark.parametrize("name", FORMATS)
def test_scratch_that_is_too_small_is_refused_with_the_bytes_that_are_enough(name):
    case = Case()
    case.add(["whole"], rows=9, columns=64, **FORMATS[name])
    with pytest.raises(ConversionError, match=r"too small to decode s0(.|\n)*found: +100") as caught:
        jobs_of(case, 100)
    enough = int(str(caught.value).split("at least ")[1].split()[0])
    assert carried_out(case, enough) == case.expected
    with pytest.raises(ConversionError, match="too small"):
        jobs_of(case, enough - 1)
