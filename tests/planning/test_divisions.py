"""Tests of divisions: one that is stated gives each rank what it holds, by torch's own split, and others are none."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from hypothesis import given
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from automodel_conv.planning.boxes import Box, Piece
from automodel_conv.planning.copies import group_pieces
from automodel_conv.planning.divisions import Division, chunk, division_of, whole_holders
from automodel_conv.planning.sharding import placed
from automodel_conv.planning.views import held_part
from tests.planning.parts import SEEDS, coordinates, numbered, random_mesh


def parts_of(source, placements, mesh, target, copies):
    """Return the part of a target that each rank of a mesh holds."""
    return {at: held_part(target, copies, placed(source, mesh, at, placements)) for at in coordinates(mesh)}


def unchanged(shape):
    return group_pieces([Piece(0, Box(tuple(shape), strides(shape), strides(shape)).canonical(), 0, 0)])


def strides(shape):
    return numbered(shape).stride()


def split(placements):
    return [not placement.is_replicate() for placement in placements]


def chunked(tensor, division, mesh, coordinate):
    """Return the part of a tensor by ``torch.chunk``, the outer dimension of the mesh first."""
    for axis, dim in zip(division.order, division.sharded, strict=True):
        if dim is not None:
            parts = tensor.chunk(mesh[axis], dim)
            at = coordinate[axis]
            tensor = parts[at] if at < len(parts) else tensor.narrow(dim, 0, 0)
    return tensor


@given(SEEDS)
def test_chunk_is_that_of_torch(seed):
    rng = random.Random(seed)
    shape = tuple(rng.randint(1, 7) for _ in range(rng.randint(1, 3)))
    mesh = random_mesh(rng)
    order = tuple(rng.sample(range(len(mesh)), len(mesh)))
    division = Division(order, tuple(rng.choice([None, *range(len(shape))]) for _ in mesh))
    for at in coordinates(mesh):
        start, lengths = chunk(shape, mesh, division, at)
        wanted = chunked(numbered(shape), division, mesh, at)
        assert lengths == wanted.shape
        box = tuple(slice(low, low + size) for low, size in zip(start, lengths, strict=True))
        assert torch.equal(numbered(shape)[box], wanted)


@given(SEEDS)
def test_plain_shards_of_a_target_like_its_source_are_stated(seed):
    rng = random.Random(seed)
    shape = tuple(rng.randint(1, 7) for _ in range(rng.randint(1, 3)))
    mesh = random_mesh(rng, 3)
    placements = [rng.choice([Replicate(), Shard(rng.randrange(len(shape)))]) for _ in mesh]
    parts = parts_of(shape, placements, mesh, shape, unchanged(shape))
    division = division_of(shape, mesh, split(placements), parts)
    assert division is not None
    for at in coordinates(mesh):
        wanted = chunked(numbered(shape), division, mesh, at)
        held = parts[at]
        assert held.shape == wanted.shape or not wanted.numel()
        assert not wanted.numel() or wanted.reshape(-1)[0] == sum(map(lambda i, s: i * s, held.start, strides(shape)))


def test_transposed_target_is_split_along_its_own_dimension():
    copies = group_pieces([Piece(0, Box((6, 4), (1, 6), (4, 1)).canonical(), 0, 0)])
    parts = parts_of((4, 6), [Replicate(), Shard(1)], (2, 3), (6, 4), copies)
    assert division_of((6, 4), (2, 3), [False, True], parts) == Division((0, 1), (None, 0))


def test_strided_shards_are_stated_on_a_mesh_in_another_order():
    placements = [_StridedShard(0, split_factor=2), Shard(0)]
    parts = parts_of((8, 3), placements, (2, 2), (8, 3), unchanged((8, 3)))
    assert division_of((8, 3), (2, 2), [True, True], parts) == Division((1, 0), (0, 0))


def test_strided_shards_of_several_runs_are_not_stated():
    placements = [_StridedShard(0, split_factor=4), Replicate()]
    parts = parts_of((8, 3), placements, (2, 2), (8, 3), unchanged((8, 3)))
    assert parts[0, 0] is None
    assert division_of((8, 3), (2, 2), [True, False], parts) is None


def expert(number):
    """Return the copies of one of four experts of two rows."""
    return group_pieces([Piece(0, Box((6,), (1,), (1,)), 6 * number, 0)])


@pytest.mark.parametrize("number", range(4))
def test_expert_on_one_rank_is_not_divided_and_has_one_holder(number):
    parts = parts_of((4, 2, 3), [Shard(0)], (2,), (2, 3), expert(number))
    assert division_of((2, 3), (2,), [True], parts) is None
    assert whole_holders((2, 3), parts) == [(number // 2,)]


def test_replicas_of_an_expert_are_its_holders():
    parts = parts_of((4, 2, 3), [Replicate(), Shard(0)], (2, 2), (2, 3), expert(3))
    assert whole_holders((2, 3), parts) == [(0, 1), (1, 1)]


def test_divided_target_has_no_whole_holders():
    parts = parts_of((4, 2, 3), [Shard(1)], (2,), (2, 3), expert(0))
    assert whole_holders((2, 3), parts) == []
    assert division_of((2, 3), (2,), [True], parts) == Division((0,), (0,))


def test_all_ranks_hold_a_target_without_elements():
    parts = parts_of((0, 3), [Shard(0)], (2,), (0, 3), ())
    assert whole_holders((0, 3), parts) == [(0,), (1,)]
    assert division_of((0, 3), (2,), [True], parts) == Division((0,), (0,))


def test_uneven_part_of_fewer_ranks_is_not_stated():
    """Three experts of one row are 2 and 1 over two ranks, so the rows of a merged target would be 3 and 3."""
    merged = group_pieces([Piece(0, Box((6,), (1,), (1,)), 0, 0)])
    parts = parts_of((3, 2), [Shard(0)], (2,), (6,), merged)
    assert [part.shape for part in parts.values()] == [(4,), (2,)]
    assert division_of((6,), (2,), [True], parts) is None


def test_mesh_of_one_rank_splits_nothing():
    for is_split in itertools.product([False, True], repeat=2):
        parts = parts_of((2, 3), [Shard(0) if s else Replicate() for s in is_split], (1, 1), (2, 3), unchanged((2, 3)))
        assert division_of((2, 3), (1, 1), is_split, parts) == Division((0, 1), (None, None))
