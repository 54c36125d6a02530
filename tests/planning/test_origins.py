"""Tests of origins: what casts and views make of them are the values that torch makes."""

from __future__ import annotations

import itertools

import pytest
import torch

from automodel_conv.planning.origins import Number, Read, Unknown, cast, constant, reinterpreted, rows_of
from tests.planning.test_traced_copies import bits

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn)
INTEGERS = (torch.int64, torch.int32, torch.uint8)
VALUES = torch.tensor([0.0, 1.0, 3.0, 0.1, 1.0625, 448.0, 6e4, 1e-3, -7.7], dtype=torch.float64)


@pytest.mark.parametrize("stored", FLOATS)
@pytest.mark.parametrize("first", FLOATS)
@pytest.mark.parametrize("second", FLOATS)
def test_casts_in_a_row_are_one_cast_or_unknown(stored, first, second):
    origin = cast(cast(Read(3, stored, stored), first), second)
    assert rows_of(origin) == {3}
    if isinstance(origin, Read):
        assert (origin.stored, origin.value) == (stored, second)
        elements = VALUES.to(stored)
        assert bits(elements.to(first).to(second)) == bits(elements.to(origin.value))


@pytest.mark.parametrize(
    ("dtypes", "is_read"),
    [
        ((torch.bfloat16, torch.float32, torch.float16), True),
        ((torch.float16, torch.float32, torch.float16), True),
        ((torch.uint8, torch.int32, torch.int64), True),
        ((torch.float32, torch.bfloat16, torch.float32), False),
        ((torch.float16, torch.bfloat16, torch.float32), False),
        ((torch.float32, torch.int32, torch.float32), False),
    ],
)
def test_only_a_cast_without_rounding_is_skipped(dtypes, is_read):
    stored, first, second = dtypes
    assert isinstance(cast(cast(Read(0, stored, stored), first), second), Read) == is_read


@pytest.mark.parametrize(("before", "after"), [*itertools.product((*FLOATS, *INTEGERS), repeat=2)])
def test_constant_is_cast_as_torch_does(before, after):
    for value in (0, 1, 100):
        stored = torch.tensor(value, dtype=before)
        assert cast(constant(stored), after) == constant(stored.to(after))


def test_bytes_of_a_constant_are_viewed():
    assert reinterpreted(Number(1.0, torch.float32), torch.int32) == Number(0x3F800000, torch.int32)


def test_bytes_of_a_source_are_viewed_unless_it_was_cast():
    assert reinterpreted(Read(2, torch.uint8, torch.uint8), torch.int8) == Read(2, torch.int8, torch.int8)
    viewed = reinterpreted(Read(2, torch.float32, torch.bfloat16), torch.int16)
    assert viewed == Unknown("views torch.bfloat16, cast from torch.float32, as torch.int16", frozenset([2]))


def test_what_is_unknown_stays_unknown():
    unknown = Unknown("aten.add.Tensor", frozenset([1, 4]))
    assert cast(unknown, torch.float16) is unknown
    assert reinterpreted(unknown, torch.int16) is unknown
    assert rows_of(unknown) == {1, 4}


def test_constants_come_from_no_source():
    assert rows_of(Number(1, torch.float32)) == frozenset()
