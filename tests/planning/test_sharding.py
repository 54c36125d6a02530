"""Tests of the region of a tensor that a rank holds by its placements: it is the part that torch splits off."""

from __future__ import annotations

import random
from collections import Counter
from math import prod
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from torch.distributed.tensor import Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from automodel_conv.errors import UnsupportedError
from automodel_conv.planning.regions import whole
from automodel_conv.planning.sharding import placed, region_of
from tests.planning.parts import SEEDS, coordinates, held, numbered, random_mesh, random_placements, torch_part


@settings(max_examples=200)
@given(SEEDS)
def test_placed_region_equals_the_torch_split(seed):
    rng = random.Random(seed)
    shape = tuple(rng.choice((0, 1, 2, 3, 4, 5, 6, 7, 9, 12)) for _ in range(rng.randint(0, 3)))
    mesh = random_mesh(rng)
    placements = random_placements(rng, shape, mesh)
    for coordinate in coordinates(mesh):
        region = placed(shape, mesh, coordinate, placements)
        wanted = torch_part(numbered(shape), mesh, coordinate, placements)
        assert region.shape == shape
        assert region.local_shape == tuple(wanted.shape)
        assert held(region, numbered(shape)) == wanted.reshape(-1).tolist()
        assert region.is_whole == (tuple(wanted.shape) == shape)


@settings(max_examples=100)
@given(SEEDS)
def test_ranks_of_a_mesh_hold_every_element_once_per_replica(seed):
    rng = random.Random(seed)
    shape = tuple(rng.randint(0, 9) for _ in range(rng.randint(1, 3)))
    mesh = random_mesh(rng)
    placements = random_placements(rng, shape, mesh)
    seen = Counter()
    for coordinate in coordinates(mesh):
        seen.update(held(placed(shape, mesh, coordinate, placements), numbered(shape)))
    replicas = prod(size for size, placement in zip(mesh, placements, strict=True) if placement.is_replicate())
    assert seen == dict.fromkeys(range(prod(shape)), replicas)


def test_more_ranks_than_indices_leave_the_last_ranks_empty():
    regions = [placed((3, 5), (4,), (at,), [Shard(0)]) for at in range(4)]
    assert [region.local_shape for region in regions] == [(1, 5), (1, 5), (1, 5), (0, 5)]
    assert regions[3].pieces() == []


def test_data_parallel_shards_of_tensor_parallel_shards_alternate():
    """FSDP2 over tensor parallelism: tp=2 splits rows 0..7 first, dp=2 each half; dp is the outer mesh dimension."""
    placements = [_StridedShard(0, split_factor=2), Shard(0)]
    runs = {at: placed((8,), (2, 2), at, placements).runs for at in coordinates((2, 2))}
    assert runs == {(0, 0): (((0, 2),),), (0, 1): (((4, 2),),), (1, 0): (((2, 2),),), (1, 1): (((6, 2),),)}


def test_data_parallel_shards_divide_uneven_tensor_parallel_parts():
    """tp=2 splits 7 rows into 4 and 3, and dp=3 these into 2, 2, 0 and 1, 1, 1."""
    placements = [_StridedShard(0, split_factor=2), Shard(0)]
    runs = {at: placed((7,), (3, 2), at, placements).runs for at in coordinates((3, 2))}
    assert runs == {
        (0, 0): (((0, 2),),),
        (1, 0): (((2, 2),),),
        (2, 0): ((),),
        (0, 1): (((4, 1),),),
        (1, 1): (((5, 1),),),
        (2, 1): (((6, 1),),),
    }


def test_data_parallel_shards_divide_packed_shards():
    """Gate and up in one tensor: tp=2 takes rows 0, 1, 4, 5 and 2, 3, 6, 7; dp=2 takes halves of these."""
    placements = [_StridedShard(0, split_factor=2), _StridedShard(0, split_factor=2)]
    runs = {at: placed((8,), (2, 2), at, placements).runs for at in coordinates((2, 2))}
    assert runs == {(0, 0): (((0, 2),),), (1, 0): (((4, 2),),), (0, 1): (((2, 2),),), (1, 1): (((6, 2),),)}


def test_part_that_contradicts_its_placements_is_refused():
    class Distributed:
        shape, placements = torch.Size([4]), (Shard(0),)
        device_mesh = SimpleNamespace(shape=(2,), get_coordinate=lambda: [0])

        def to_local(self):
            return torch.empty(3)

    with pytest.raises(UnsupportedError, match="does not hold the part"):
        region_of(Distributed())


@pytest.mark.parametrize("shape", [(), (3,), (0, 2), (4, 2)])
def test_rank_outside_of_the_mesh_holds_nothing(shape):
    mesh = SimpleNamespace(get_coordinate=lambda: None)
    region = region_of(SimpleNamespace(shape=torch.Size(shape), placements=[Replicate()], device_mesh=mesh))
    assert region.shape == shape
    assert 0 in region.local_shape
    assert region.pieces() == []


def test_partial_sums_are_refused():
    with pytest.raises(UnsupportedError, match="partial sums"):
        placed((4, 4), (2, 2), (0, 1), [Shard(0), Partial()])


def test_plain_tensor_is_held_whole():
    assert region_of(torch.empty(2, 3)) == whole((2, 3))
    assert region_of(torch.empty(())).is_whole
    assert region_of(torch.empty(0, 3)).is_whole
