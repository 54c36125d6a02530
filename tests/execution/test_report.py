"""Tests of the report of a load, which sums up all devices."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from automodel_conv.execution import report
from automodel_conv.execution.page_policy import PageUse
from automodel_conv.execution.report import Clock, LoadedStateDict, report_of
from automodel_conv.execution.stats import CopyCounts, LoadStats
from automodel_conv.planning.problems import Problems
from tests.execution.support import columns, plan_of, target, write_checkpoint

HOST, FIRST, SECOND = torch.device("cpu"), torch.device("cuda", 0), torch.device("cuda", 1)
USE = PageUse()
STATS = {
    FIRST: LoadStats(10, 1, 100, 1000, CopyCounts(5, 2), None, 3),
    SECOND: LoadStats(20, 2, 200, 2000, CopyCounts(0, 7), "no compiler", 4),
    HOST: LoadStats(5, 0, 50, pages=USE, threads=2),
}


@pytest.fixture
def new_report(tmp_path):
    checkpoint = write_checkpoint(tmp_path, {"a.safetensors": {"a": torch.ones(2), "spare": torch.ones(2)}})
    sources = columns(checkpoint)
    plan = plan_of(sources, target(sources, "a", "F32", [["a"]]))
    problems = Problems(
        missing=["m"], unexpected=["u"], mismatched=[("x", (1,), (2,))], duplicated=[("d", ("one", "two"))]
    )

    def make(stats=STATS, mapped=None, extra_bytes=0):
        return report_of(checkpoint, plan, problems, Clock(), stats, mapped or {}, extra_bytes)

    return make


def test_bytes_threads_and_copies_of_all_devices_are_added(new_report):
    report = new_report(mapped={"b": torch.ones(3), "c": torch.ones(2, dtype=torch.uint8)}, extra_bytes=7)
    assert report.bytes_read == 35 + 3  # with the gaps
    assert report.peak_extra_bytes == 350 + 3000 + 7
    assert (report.copied_by_kernels, report.copied_by_torch) == (5, 9)
    assert report.threads == 9
    assert report.bytes_mapped == 14
    assert report.without_kernels == "no compiler"
    assert report.pages is USE


def test_load_that_moves_nothing_to_the_host_has_no_pages(new_report):
    assert new_report({FIRST: STATS[FIRST]}).pages is None
    assert new_report({FIRST: STATS[FIRST]}).without_kernels is None
    assert new_report({}).bytes_read == 0


def test_problems_and_left_out_tensors_are_named(new_report):
    report = new_report()
    assert report.missing_keys == ("m",)
    assert report.unexpected_keys == ("u",)
    assert report.mismatched_keys == (("x", (1,), (2,)),)
    assert report.duplicated_keys == (("d", ("one", "two")),)
    assert report.left_out == ("spare",)
    assert (report.fallbacks, report.unindexed, report.carried) == ((), (), ())


def test_clock_adds_to_each_phase_the_time_since_the_last_lap(monkeypatch):
    times = iter([10.0, 11.0, 13.0, 17.0])
    monkeypatch.setattr(report, "time", SimpleNamespace(perf_counter=lambda: next(times)))
    clock = Clock()
    for phase in ("open", "read", "open"):
        clock.lap(phase)
    assert clock.seconds == {"open": 5.0, "plan": 0.0, "read": 2.0}


def test_speed_is_that_of_the_read_phase(new_report):
    done = new_report()
    done.seconds.update(read=0.5, open=100.0)  # type: ignore[attr-defined]
    assert done.gb_per_s == 38 / 0.5 / 1e9
    done.seconds.update(read=0.0)  # type: ignore[attr-defined]
    assert done.gb_per_s > 0


def test_loaded_state_dict_is_a_dict_with_a_report(new_report):
    state = LoadedStateDict(a=torch.ones(1))
    state.report = new_report()
    assert state.layout is None
    assert dict(state) == {"a": torch.ones(1)}


def test_printed_report_has_bytes_seconds_and_the_names_of_each_problem(new_report):
    done = new_report(mapped={"b": torch.ones(3)})
    done.seconds.update(open=0.25, plan=0.5, read=7.0)  # type: ignore[attr-defined]
    text = " ".join(str(done).split())
    for words in (
        "read 38 bytes speed 5 bytes/s mapped 12 bytes seconds 7.750"
        " seconds: open 0.250 seconds: plan, with imports 0.500 seconds: read 7.000",
        "threads, at most 9 new memory no new memory of 4 MiB or more",
        "copies on the device by kernels 5 copies on the device by torch 9 no kernels, because no compiler",
        "missing 1 m unexpected 1 u wrong shape 1 x: [1], not [2] as in the model left out 1 spare",
        "claimed by several sources 1 d: one, two",
    ):
        assert words in text
    assert "unindexed" not in text
    assert repr(done).startswith("<LoadReport: read: 38 bytes, speed: 5 bytes/s, mapped: 12 bytes, ")


def test_printed_report_of_many_names_is_short(new_report):
    many = replace(new_report(), left_out=tuple(map(str, range(20_000))), pages=None)
    assert len(str(many).splitlines()) < 30
    assert "... and 19997 more" in str(many)
