"""Tests of the plan of a refit on each rank, carried out one element at a time without communication."""

from __future__ import annotations

import random
from math import prod

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings

from automodel_conv.errors import CoverageError, UnsupportedError
from automodel_conv.planning.regions import box
from automodel_conv.planning.sharding import placed
from automodel_conv.refitting.agreement import Roles
from automodel_conv.refitting.engine import Engine, engine_of
from automodel_conv.refitting.held import Held
from automodel_conv.refitting.planned import bucket_for, incoming, planned
from tests.planning.oracles import pairs
from tests.planning.parts import SEEDS, coordinates, held, numbered, random_mesh, random_placements
from tests.refitting.support import published, zeros


def random_refit(rng):
    """Return what ranks of a trainer hold by random placements, and the regions of one rank of the engine."""
    shapes = {f"t{n}": tuple(rng.randint(1, 5) for _ in range(rng.randint(0, 3))) for n in range(rng.randint(1, 4))}
    mesh = random_mesh(rng, 2)
    parts = []
    for name, shape in shapes.items():
        placements = random_placements(rng, shape, mesh)
        regions = {}
        for rank, at in enumerate(coordinates(mesh)):
            region = placed(shape, mesh, at, placements)
            if prod(region.local_shape):
                regions.setdefault(region, []).append(rank)
        parts += [(name, region, tuple(ranks)) for region, ranks in regions.items()]
    of_engine = random_mesh(rng, 2)
    at = tuple(rng.randrange(size) for size in of_engine)
    regions = {n: placed(s, of_engine, at, random_placements(rng, s, of_engine)) for n, s in shapes.items()}
    return shapes, parts, regions, prod(mesh)


@settings(max_examples=80)
@given(SEEDS)
def test_each_element_comes_once_from_a_rank_that_holds_it(seed):
    rng = random.Random(seed)
    shapes, parts, regions, senders = random_refit(rng)
    trainer = published(shapes, parts, least_bytes=rng.choice([1, 20, 1 << 20]))
    whole_engine = engine_of(trainer, zeros(shapes), [], None, None, None, 0)
    engine = Engine(Held(whole_engine.held.tensors, regions), whole_engine.plan, ())
    receiver = rng.choice([senders, 0])  # a rank of its own, or one of the trainer
    taken = incoming(trainer, engine, receiver, rng.choice([16, 64, 1000]))
    results = [[None] * prod(target.shape) for target in taken.plan.targets]
    of_others = [(rank, move) for unit in taken.units for rank, moves in unit.items() for move in moves]
    for rank, move in [*of_others, *((receiver, move) for move in taken.own)]:
        part = trainer.parts[move.part]
        name = trainer.plan.sources.names[part.part.source]
        assert rank == (receiver if receiver in part.holders else part.owner)
        # The tensor of the sender, from the first element of the part on.
        [whole_part] = [r for n, r, ranks in parts if n == name and rank in ranks]
        values = held(whole_part, numbered(shapes[name]))[taken.starts[move.part] :]
        for read, write in pairs(move.piece):
            assert results[move.target][write] is None
            results[move.target][write] = name, values[read]
    for repeat in taken.repeats:
        for read, write in pairs(repeat.piece):
            results[repeat.target][write] = results[repeat.first][read]
    assert all(rank != receiver for rank, _ in of_others)
    for target, result in zip(taken.plan.targets, results, strict=True):
        assert result == [(target.name, value) for value in held(regions[target.name], numbered(shapes[target.name]))]
    sizes = taken.sizes()
    assert sum(sum(unit.values()) for unit in sizes) == sum(move.nbytes for _, move in of_others)


def test_tensors_that_an_engine_does_not_need_are_left_out_if_no_rank_needs_them():
    made = zeros({"a": (2,)})
    trainer = published({"a": (2,), "mtp": (3,)})
    engine = engine_of(trainer, made, None, None, lambda pairs: made.a.data.copy_(dict(pairs)["a"]), None, 0)
    assert incoming(trainer, engine, 1, 64).unused == ("mtp",)


def test_element_that_no_rank_holds_is_an_error():
    trainer = published({"a": (2,)}, [("a", box((2,), (0,), (1,)), (0,))])
    engine = engine_of(trainer, zeros({"a": (2,)}), [], None, None, None, 0)
    with pytest.raises(CoverageError, match="a would be left partly unwritten"):
        incoming(trainer, engine, 1, 64)


def test_element_that_two_parts_have_is_an_error_if_they_have_as_many_as_the_tensor():
    trainer = published({"a": (4,)}, [("a", box((4,), (0,), (2,)), (0,)), ("a", box((4,), (1,), (2,)), (1,))])
    engine = engine_of(trainer, zeros({"a": (4,)}), [], None, None, None, 0)
    with pytest.raises(CoverageError, match="a"):
        incoming(trainer, engine, 2, 64)


def test_bucket_that_is_too_small_is_refused_with_the_number_of_ranks():
    roles = Roles((0, 1), (2, 3))
    assert bucket_for(64, roles).unit_bytes == 16
    with pytest.raises(UnsupportedError, match="63 bytes for 2 ranks that send and 2 that receive"):
        bucket_for(63, roles)
    with pytest.raises(UnsupportedError, match="bucket_bytes= is too small"):
        bucket_for(100, Roles((0, 1), (1, 2)))  # a rank that does both has both in one bucket


def test_rank_that_holds_everything_itself_sends_nothing():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        roles = Roles((0,), (0,))
        trainer = published({"a": (2, 3), "b": ()})
        engine = engine_of(trainer, zeros({"a": (2, 3), "b": ()}), [], None, None, None, 0)
        bucket = bucket_for(4096, roles)
        own = incoming(trainer, engine, 0, bucket.unit_bytes)
        work, forecast = planned(dist.group.WORLD, 0, roles, bucket, own, torch.device("cpu"))
    finally:
        dist.destroy_process_group()
    assert (forecast.links, forecast.rounds, work.buffer_bytes, work.message_count) == ({}, 0, 0, 0)
    assert {copy.target for copy in work.own} == {"a", "b"}
