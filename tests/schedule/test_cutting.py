"""Tests of moves cut into slabs: each element is in one slab, and slabs stay small."""

from __future__ import annotations

import itertools

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from automodel_conv.planning.boxes import Box, contiguous_strides
from automodel_conv.schedule.cutting import slabs
from automodel_conv.schedule.jobs import Move


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_slabs_hold_each_move_element_once_and_stay_small_and_within_sections(data):
    size = st.integers(1, 6)
    moves = []
    for number in range(data.draw(st.integers(1, 3))):
        shape = tuple(data.draw(st.lists(size, max_size=3)))
        strides = tuple(data.draw(st.integers(0, 12)) for _ in shape)
        places = contiguous_strides(shape)
        start = data.draw(st.integers(0, 9))
        moves.append(Move(number, "U8", Box(shape, strides, places), start, 0))
    capacity = data.draw(st.integers(1, 20))
    section = data.draw(st.none() | st.integers(1, 20))

    def pairs(moves):
        elements = []
        for move in moves:
            for index in (
                torch.cartesian_prod(*map(torch.arange, move.box.shape)).reshape(-1, len(move.box.shape)).tolist()
                if move.box.shape
                else [[]]
            ):
                read = move.source_offset + sum(i * s for i, s in zip(index, move.box.source_strides, strict=True))
                write = move.target_offset + sum(i * s for i, s in zip(index, move.box.target_strides, strict=True))
                elements.append((move.target, write, read))
        return elements

    cut = list(slabs(moves, capacity, section))
    assert sorted(p for _, _, part in cut for p in pairs(part)) == sorted(pairs(moves))
    ends = [(start, stop) for start, stop, _ in cut]
    for start, stop, part in cut:
        assert stop - start <= capacity
        assert section is None or start // section == (stop - 1) // section
        assert all(start <= read < stop for _, _, read in pairs(part))
    assert all(before[1] <= after[0] for before, after in itertools.pairwise(ends))
