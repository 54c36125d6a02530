"""Tests of the rounds of a refit: buckets suffice for every rank, and each unit is in one round."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
from hypothesis import given

from automodel_conv.schedule.rounds import (
    ALIGNMENT,
    Units,
    bucket_of,
    offsets_in_bucket,
    rounds_of,
    sizes_by_round,
)
from tests.planning.parts import SEEDS


def random_units(rng, receivers, senders, unit_bytes):
    """Return units of each receiver, none larger than ``unit_bytes`` in all."""
    units = []
    for _ in range(receivers):
        own = []
        for _ in range(rng.randint(0, 9)):
            left, unit = unit_bytes, {}
            for sender in rng.sample(range(senders), rng.randint(1, senders)):
                nbytes = rng.randint(1, max(1, left // 2))
                if nbytes <= left:
                    unit[sender] = nbytes
                    left -= nbytes
            own.append(unit)
        units.append(own)
    return units


def random_refit(rng):
    senders, receivers = rng.randint(1, 5), rng.randint(1, 5)
    both = rng.random() < 0.3
    nbytes = rng.randint(2 * ALIGNMENT * (senders + receivers), 4000) * (2 if both else 1)
    bucket = bucket_of(nbytes, senders, receivers, both)
    ranks = list(range(receivers)) if both else list(range(senders, senders + receivers))
    return nbytes, both, bucket, ranks, None if bucket is None else random_units(rng, receivers, senders, bucket[1])


@given(SEEDS)
def test_what_a_rank_sends_or_receives_in_a_round_fits_into_its_bucket(seed):
    nbytes, both, bucket, ranks, units = random_refit(random.Random(seed))
    if bucket is None:
        return
    rounds = rounds_of(units, ranks, bucket.round_bytes)
    for messages in sizes_by_round(units, ranks, rounds):
        for end in (0, 1):
            for rank in {link[end] for link in messages}:
                own = {link[1 - end]: size for link, size in messages.items() if link[end] == rank}
                assert offsets_in_bucket(own)[1] <= (nbytes // 2 if both else nbytes)


@given(SEEDS)
def test_rounds_have_each_unit_once_in_order_and_are_not_smaller_than_needed(seed):
    _, _, bucket, ranks, units = random_refit(random.Random(seed))
    if bucket is None:
        return
    rounds = rounds_of(units, ranks, bucket.round_bytes)
    assert [number for numbers in rounds for number in numbers] == list(range(max(map(len, units))))
    for first, second in pairwise(rounds):
        [messages] = sizes_by_round(units, ranks, [range(first.start, second.start + 1)])
        loads = [{}, {}]
        for link, size in messages.items():
            for end in (0, 1):
                loads[end][link[end]] = loads[end].get(link[end], 0) + size
        assert max(max(of_end.values()) for of_end in loads) > bucket.round_bytes


@given(SEEDS)
def test_sizes_are_the_sums_of_the_units_of_a_round(seed):
    _, _, bucket, ranks, units = random_refit(random.Random(seed))
    if bucket is None:
        return
    rounds = rounds_of(units, ranks, bucket.round_bytes)
    sizes = sizes_by_round(units, ranks, rounds)
    for link in ((sender, receiver) for sender in range(5) for receiver in range(10)):
        wanted = 0
        if link[1] in ranks:
            wanted = sum(unit.get(link[0], 0) for unit in units[ranks.index(link[1])])
        assert sum(messages.get(link, 0) for messages in sizes) == wanted


def test_nothing_to_send_has_no_rounds():
    assert rounds_of([], [], 100) == rounds_of([[], []], [2, 3], 100) == []
    assert sizes_by_round([[]], [1], []) == []


def test_a_receiver_with_fewer_units_takes_part_in_the_first_rounds():
    units = [[{0: 10}, {0: 10}, {0: 10}], [{1: 10}]]
    rounds = rounds_of(units, [2, 3], 10)
    assert rounds == [range(0, 1), range(1, 2), range(2, 3)]
    assert sizes_by_round(units, [2, 3], rounds) == [{(0, 2): 10, (1, 3): 10}, {(0, 2): 10}, {(0, 2): 10}]


@pytest.mark.parametrize(
    ("bucket_bytes", "senders", "receivers", "both", "unit_bytes"),
    [
        (64, 2, 2, False, 16),
        (63, 2, 2, False, None),
        (128, 2, 2, True, 16),
        (126, 2, 2, True, None),
        (32, 1, 1, False, 16),
        (31, 1, 1, False, None),
        (0, 1, 1, False, None),
        (-5, 1, 1, False, None),
        (96, 4, 2, False, 16),
        (95, 4, 2, False, None),
        (1 << 20, 1, 4, False, (1 << 18) - 16),
    ],
)
def test_smallest_buckets_have_units_of_one_alignment(bucket_bytes, senders, receivers, both, unit_bytes):
    bucket = bucket_of(bucket_bytes, senders, receivers, both)
    assert (None if bucket is None else bucket.unit_bytes) == unit_bytes


@given(SEEDS)
def test_messages_in_a_bucket_are_aligned_and_share_no_byte(seed):
    rng = random.Random(seed)
    sizes = {rank: rng.randint(0, 100) for rank in rng.sample(range(20), rng.randint(0, 8))}
    offsets, end = offsets_in_bucket(sizes)
    assert offsets.keys() == sizes.keys()
    at = 0
    for rank in sorted(sizes):
        assert offsets[rank] % ALIGNMENT == 0
        assert offsets[rank] >= at
        at = offsets[rank] + sizes[rank]
    assert at <= end < at + ALIGNMENT or not sizes


@given(SEEDS)
def test_units_in_arrays_are_those_that_were_added_and_survive_as_bytes(seed):
    rng = random.Random(seed)
    [plain] = random_units(rng, 1, 4, 1 << 40)
    units = Units()
    for unit in plain:
        units.append(unit)
    for each in (units, Units.from_bytes(units.to_bytes())):
        assert list(each) == plain
        assert len(each) == len(plain)
