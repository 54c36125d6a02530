"""Tests of the result of ``refit-plan``."""

from dataclasses import fields
from typing import get_args, get_type_hints

import pytest

pytest.importorskip("transformers", reason="builds transformers models")

from automodel_conv.cli.engine_mesh import Division, parse_engine_mesh
from automodel_conv.cli.refit_plan import refit_plan
from automodel_conv.cli.results.refits import Divided, Link, RefitPlanned, refit_planned
from automodel_conv.refitting.costs import RefitForecast
from tests.model_zoo import build_on_meta


@pytest.fixture(scope="module")
def plan():
    return refit_plan(build_on_meta("qwen3_moe"), {"fsdp": 2}, parse_engine_mesh("tp=2"), 1 << 16)


def test_result_has_the_fields_of_the_forecast():
    names = {field.name for field in fields(RefitForecast)}
    more = {"bytes_sent", "bytes_received", "imbalance", "busiest_link", "divided"}
    assert {*RefitPlanned.__struct_fields__} == names | more


def test_links_are_those_of_the_forecast(plan):
    result, forecast = refit_planned(plan), plan.forecast
    assert {(link.sender, link.receiver): link.nbytes for link in result.links} == forecast.links
    assert result.busiest_link in result.links
    assert result.busiest_link.nbytes == max(forecast.links.values())
    assert result.bytes_sent == forecast.bytes_sent
    assert result.bytes_received == forecast.bytes_received
    for name in ("messages", "rounds", "peak_extra_bytes", "imbalance", "left_out", "senders", "receivers"):
        assert getattr(result, name) == getattr(forecast, name)


def test_divisions_are_words(plan):
    words = get_args(get_type_hints(Divided)["division"])
    assert {division.name.lower() for division in Division} == {*words}
    result = refit_planned(plan)
    assert result.divided[0].division == "intermediate"
    assert result.divided[0].modules == ("experts",)
    assert [part.nbytes for part in result.divided] == [part.nbytes for part in plan.divided]


def test_nothing_sent_is_no_busiest_link(plan):
    class Nothing:
        forecast = RefitForecast({}, 0, 0, 0, (0,), (1,))
        divided = ()
        busiest_link = None

    assert refit_planned(Nothing()).busiest_link is None
    assert refit_planned(Nothing()).links == ()
    assert Link(0, 1, 2) == Link(sender=0, receiver=1, nbytes=2)
