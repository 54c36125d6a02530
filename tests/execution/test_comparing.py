"""Tests of comparing files with the slabs that they should hold: the first byte that differs is reported."""

from __future__ import annotations

import random

import pytest

from automodel_conv.errors import ReadError
from automodel_conv.execution import writing
from automodel_conv.execution.writing import first_different_byte
from automodel_conv.files.source import LocalFile
from automodel_conv.schedule.writes import Slabs
from tests.execution.slab_writes import MAKERS, every_case, producer_of, write


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    return every_case(tmp_path_factory)


def compared(kind, case, path, threads=2, **options):
    with producer_of(kind, case, **options) as (_, slabs, start):
        return first_different_byte(slabs.slabs, LocalFile(str(path)), start, threads, lambda nbytes: None)


@pytest.mark.parametrize("kind", MAKERS)
def test_correct_file_has_no_first_difference(cases, tmp_path, kind):
    for number, case in enumerate(cases):
        path = write("host", case, tmp_path / str(number))
        assert compared(kind, case, path) is None


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("window_bytes", [16, 1 << 20])
def test_first_different_byte_is_found_anywhere(cases, tmp_path, monkeypatch, kind, window_bytes):
    monkeypatch.setattr(writing, "_WINDOW_BYTES", window_bytes)
    rng = random.Random(5)
    for number, case in enumerate(cases):
        path = write("host", case, tmp_path / str(number))
        right = path.read_bytes()
        start = len(right) - sum(t.nbytes for t in case.plan.targets)
        places = [start, len(right) - 1, *(rng.randrange(start, len(right)) for _ in range(6))]
        for at in places:
            wrong = bytearray(right)
            for place in {at, *(rng.randrange(at, len(right)) for _ in range(rng.randint(0, 3)))}:
                wrong[place] ^= 1 << rng.randrange(8)
            path.write_bytes(wrong)
            assert compared(kind, case, path, threads=1) == at
            assert compared(kind, case, path, threads=3) == at


def test_truncated_file_is_reported(cases, tmp_path):
    path = write("host", cases[0], tmp_path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ReadError, match="ends too early"):
        compared("host", cases[0], path)


def test_nothing_to_compare_is_equal(tmp_path):
    (tmp_path / "a").write_bytes(b"x")
    assert (
        first_different_byte(Slabs([], ()).slabs, LocalFile(str(tmp_path / "a")), lambda: None, 2, lambda nbytes: None)
        is None
    )
