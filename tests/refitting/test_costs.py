"""Tests of the costs of a refit, from the sizes of its messages."""

from __future__ import annotations

import random

from hypothesis import given

from automodel_conv.refitting.costs import RefitForecast, RefitReport, forecast_of
from automodel_conv.schedule.rounds import ALIGNMENT
from tests.planning.parts import SEEDS


def test_forecast_adds_up_messages_by_link_and_the_largest_bucket_of_each_rank_twice():
    rounds = [{(0, 2): 100, (1, 2): 20, (0, 3): 7}, {(0, 2): 1, (1, 3): 33}]
    forecast = forecast_of(rounds, [0, 1], [2, 3], ["mtp"])
    assert forecast.links == {(0, 2): 101, (1, 2): 20, (0, 3): 7, (1, 3): 33}
    assert (forecast.messages, forecast.rounds, forecast.left_out) == (5, 2, ("mtp",))
    assert forecast.bytes_sent == {0: 108, 1: 53}
    assert forecast.bytes_received == {2: 121, 3: 40}
    assert forecast.peak_extra_bytes == 2 * (112 + 32)
    assert forecast.imbalance == 108 * 2 / 161


def test_one_round_needs_one_bucket():
    assert forecast_of([{(0, 1): 17}], [0], [1]).peak_extra_bytes == 32


def test_nothing_to_send_costs_nothing_and_is_balanced():
    forecast = forecast_of([], [0, 1], [2])
    assert (forecast.links, forecast.messages, forecast.rounds, forecast.peak_extra_bytes) == ({}, 0, 0, 0)
    assert forecast.bytes_sent == {0: 0, 1: 0}
    assert forecast.imbalance == 1.0
    assert "0 bytes" in str(forecast)


def test_rank_that_does_both_has_buckets_for_both():
    assert forecast_of([{(0, 1): 16, (1, 0): 16}], [0, 1], [0, 1]).peak_extra_bytes == 32


@given(SEEDS)
def test_forecast_of_any_rounds(seed):
    rng = random.Random(seed)
    senders, receivers = range(rng.randint(1, 4)), range(4, 4 + rng.randint(1, 4))
    links = [(sender, receiver) for sender in senders for receiver in receivers]
    rounds = [
        {link: rng.randint(1, 99) for link in rng.sample(links, rng.randint(1, len(links)))}
        for _ in range(rng.randint(0, 5))
    ]
    forecast = forecast_of(rounds, senders, receivers)
    total = sum(size for messages in rounds for size in messages.values())
    assert sum(forecast.links.values()) == sum(forecast.bytes_sent.values()) == total
    assert sum(forecast.bytes_received.values()) == total
    assert forecast.messages == sum(map(len, rounds))
    most = 0
    for end in (0, 1):
        for rank in range(9):
            own = [[-(-size // ALIGNMENT) for link, size in r.items() if link[end] == rank] for r in rounds]
            most = max(most, ALIGNMENT * max(map(sum, own), default=0))
    assert forecast.peak_extra_bytes == most * min(2, len(rounds))


def test_report_states_its_rate_and_what_it_left():
    report = RefitReport(3_000_000_000, 1_000_000_000, 7, 2.0, 4096, ("mtp.a",), ("cache",))
    assert report.gb_per_s == 2.0
    text = str(report)
    for part in ("7", "2.000", "mtp.a", "cache"):
        assert part in text
    assert RefitReport(0, 0, 0, 0.0, 0).gb_per_s == 0.0


def test_forecast_shows_its_numbers():
    text = str(RefitForecast({(0, 2): 3000, (1, 2): 1000}, 9, 4, 64, (0, 1), (2,)))
    for part in ("1.50", "9", "4"):
        assert part in text
