"""Tests of comparing files with the slabs that they should hold: the first byte that differs is reported."""

from __future__ import annotations

import random

import pytest

from automodel_conv.errors import ReadError, VerificationError
from automodel_conv.execution import writing
from automodel_conv.execution.comparing import compare_file
from automodel_conv.execution.writing import SlabGroup, first_different_byte
from automodel_conv.files.header import read_header
from automodel_conv.files.source import LocalFile
from tests.execution.slab_writes import MAKERS, every_case, producer_of, write


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    return every_case(tmp_path_factory)


def compared(kind, case, path, threads=2, **options):
    with producer_of(kind, case, **options) as (_, slabs, start):
        return first_different_byte(SlabGroup(slabs.slabs, start), LocalFile(str(path)), threads, lambda nbytes: None)


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
        first_different_byte(SlabGroup([], lambda: None), LocalFile(str(tmp_path / "a")), 2, lambda nbytes: None)
        is None
    )


@pytest.mark.parametrize("element", [0, 1, -1])
def test_first_element_that_differs_is_named_by_tensor_and_index(cases, tmp_path, element):
    path = write("host", cases[0], tmp_path)
    header = read_header(LocalFile(str(path)))
    for name, offset, nbytes, shape in zip(header.names, header.offsets, header.nbytes, header.shapes, strict=True):
        data = bytearray(path.read_bytes())
        at = offset + (nbytes - 2 if element < 0 else 2 * element)
        data[at] ^= 1
        changed = tmp_path / f"{name}.{element}"
        changed.write_bytes(data)
        index = [0] * len(shape) if element == 0 else [size - 1 for size in shape]
        if element == 1:
            index = [*[0] * (len(shape) - 1), 1]
        with producer_of("host", cases[0]) as (shard, slabs, start), pytest.raises(VerificationError) as caught:
            compare_file(SlabGroup(slabs.slabs, start), LocalFile(str(changed)), shard, 1, lambda nbytes: None)
        text = str(caught.value)
        assert text.startswith(f"{name} does not match")
        assert f"{changed}, byte {at}" in text
        assert f"{index} of BF16 {list(shape)}" in text


def test_file_that_is_right_is_counted_and_raises_nothing(cases, tmp_path):
    path, seen = write("host", cases[0], tmp_path), []
    with producer_of("host", cases[0]) as (shard, slabs, start):
        compare_file(SlabGroup(slabs.slabs, start), LocalFile(str(path)), shard, 2, seen.append)
    assert sum(seen) == shard.nbytes - len(shard.header)
