"""Tests of messages: what senders read in the order in which receivers write it, one element at a time."""

from __future__ import annotations

from math import prod

from hypothesis import given, settings

from automodel_conv.planning.boxes import Box, Piece
from automodel_conv.planning.parts_of_sources import SourcePart, plan_from_parts
from automodel_conv.planning.regions import whole
from automodel_conv.refitting.messages import Run, bucket_bytes, messages_of, orders, received, sent
from automodel_conv.schedule.transfers import by_owner, transfers_of, units_of
from tests.planning.oracles import addressed, execute, pairs
from tests.planning.parts import SEEDS
from tests.planning.plans import random_plan


def elements(run):
    """Return the elements of a tensor that a run walks, in its order."""
    box = Box(run.shape, run.strides, (0,) * len(run.shape))
    return [element for element, _ in pairs(Piece(0, box, run.offset, 0))]


@settings(max_examples=60)
@given(SEEDS)
def test_what_senders_send_is_what_the_receiver_writes(seed):
    rng, plan = random_plan(seed)
    plan = plan_from_parts(plan, [SourcePart(row, whole(shape)) for row, shape in enumerate(plan.sources.shapes)])
    moves, _ = transfers_of(plan)
    owners = [rng.randrange(5) for _ in plan.sources.names]
    starts = [rng.choice([0, 7]) for _ in owners]
    units = [by_owner(unit, owners) for unit in units_of(moves, rng.choice([8, 40, 400]))]
    receives = received(plan, units)
    ordered = orders(plan, units, starts)
    sends = {rank: sent({9: data}, len(units)) for rank, data in ordered.items()}
    sources, start_of = addressed(plan.sources), dict(zip(plan.sources.names, starts, strict=True))
    results = {target.name: [None] * prod(target.shape) for target in plan.targets}
    for number, messages in enumerate(receives):
        for message in messages:
            [from_sender] = sends[message.rank][number]
            assert (from_sender.rank, from_sender.nbytes) == (9, message.nbytes)
            assert message.nbytes == sum(run.nbytes for run in message.runs)
            given_values = [
                sources[run.tensor][element - start_of[run.tensor]]
                for run in from_sender.runs
                for element in elements(run)
            ]
            places = [(run.tensor, element) for run in message.runs for element in elements(run)]
            for (name, element), value in zip(places, given_values, strict=True):
                results[name][element] = value
    assert results == execute(plan, sources)
    for rank, rounds in sends.items():
        for number, messages in enumerate(rounds):
            assert bool(messages) == any(message.rank == rank for message in receives[number])


def test_messages_of_a_round_follow_each_other_in_the_bucket():
    runs = {7: [Run("a", "F32", (5,), (1,), 0)], 2: [Run("b", "BF16", (), (), 3), Run("b", "U8", (2, 2), (4, 1), 0)]}
    messages = messages_of(runs)
    assert [(each.rank, each.start, each.nbytes) for each in messages] == [(2, 0, 6), (7, 16, 20)]
    assert bucket_bytes([messages, []]) == 48
    assert bucket_bytes([]) == 0


def test_rank_without_orders_sends_nothing_in_any_round():
    assert sent({}, 3) == [[], [], []]
