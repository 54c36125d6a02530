"""Tests of the timelines in the reports of loads: phases, the work around the reads, and the page that shows them."""

from __future__ import annotations

import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import automodel_conv as amc
from automodel_conv import loading
from automodel_conv.execution.timeline import (
    CODE,
    FILL,
    FINISH,
    MAP,
    MERGE,
    OPEN,
    PLAN,
    RANKS,
    READ,
    SEND,
    VERIFY,
    Timeline,
)
from automodel_conv.testing import address_valued
from tests.doors.adapters.support import default_adapter, published, write_base


@pytest.fixture
def saved(tmp_path):
    """Return a directory with two tensors of an ``nn.Linear`` and their checksums."""
    tensors = {"weight": address_valued((64, 32), torch.float32), "bias": address_valued((64,), torch.float32, 7)}
    amc.save_checkpoint(tensors, tmp_path / "saved", rules=[], checksums=True)
    return tmp_path / "saved"


def slow(monkeypatch, module, name, seconds=0.02):
    """Make a function of a module take longer."""
    function = getattr(module, name)

    def late(*arguments, **options):
        time.sleep(seconds)
        return function(*arguments, **options)

    monkeypatch.setattr(module, name, late)


def check(report):
    """Check the phases of a load against its seconds, and its reads against its bytes."""
    timeline = report.timeline
    assert timeline.bytes_of(READ) == report.bytes_read
    assert all(0 <= span.begin <= span.end <= timeline.seconds for span in timeline.spans)
    seconds = dict.fromkeys(report.seconds, 0.0)
    for span in timeline.spans:
        phase = {OPEN: "open", PLAN: "plan", VERIFY: "verify", MAP: "plan", FILL: "read", MERGE: "read"}.get(span.kind)
        if phase is not None:
            seconds[phase] += span.seconds
    for phase, total in report.seconds.items():
        assert seconds[phase] == pytest.approx(total, abs=1e-3)  # phases below 0.1 ms are left out
    return timeline


@pytest.mark.parametrize("threads", [1, 4])
def test_timeline_of_a_load_has_its_phases_and_reads(saved, threads):
    timeline = check(amc.load_state_dict(saved, rules=[], threads=threads).report)
    assert {"phases", "main", "thread 1"} <= {*timeline.lanes}
    assert timeline.seconds_of(FILL) > 0
    assert timeline.merged_seconds == 0


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_load_into_a_model_has_a_timeline(saved, device):
    check(amc.load_model(nn.Linear(32, 64, device=device), saved, rules=[]))


def test_time_after_the_last_read_is_in_the_timeline(saved, monkeypatch):
    slow(monkeypatch, loading, "in_order")
    assert amc.load_state_dict(saved, rules=[]).report.timeline.seconds_of(FINISH) >= 0.02


@pytest.mark.skipif(sys.platform != "linux", reason="files are mapped on Linux")
@pytest.mark.parametrize("into_model", [False, True])
def test_mapping_is_a_span_and_nothing_is_read(saved, monkeypatch, into_model):
    slow(monkeypatch, loading, "map_targets")
    if into_model:
        report = amc.load_model(nn.Linear(32, 64, device="meta"), saved, rules=[], memory_map=True)
    else:
        report = amc.load_state_dict(saved, rules=[], memory_map=True).report
    timeline = check(report)
    assert timeline.seconds_of(MAP) >= 0.02
    assert timeline.bytes_of(READ) == 0


@pytest.mark.parametrize("into_model", [False, True])
def test_comparing_checksums_is_a_span(saved, monkeypatch, into_model):
    slow(monkeypatch, loading, "verify_checksums")
    if into_model:
        report = amc.load_model(nn.Linear(32, 64), saved, rules=[], verify=True)
    else:
        report = amc.load_state_dict(saved, rules=[], verify=True).report
    assert check(report).seconds_of(VERIFY) >= 0.02


def test_merging_an_adapter_is_a_span(tmp_path, monkeypatch):
    pytest.importorskip("transformers", reason="the rules are for its models")
    write_base(tmp_path / "base", published())
    default_adapter(tmp_path / "adapter")
    slow(monkeypatch, loading, "add_to_tensors")
    report = amc.load_state_dict(tmp_path / "base", adapter=tmp_path / "adapter").report
    assert report.adapted
    assert check(report).seconds_of(MERGE) >= 0.02


@pytest.mark.parametrize("into_model", [False, True])
def test_sending_and_waiting_for_ranks_are_spans_but_no_reading(saved, monkeypatch, into_model):
    slow(monkeypatch, loading, "send_shared")
    all_or_raise = loading.all_or_raise

    @contextmanager
    def late(groups, what):
        with all_or_raise(groups, what):
            yield
        time.sleep(0.02)

    monkeypatch.setattr(loading, "all_or_raise", late)
    if into_model:
        report = amc.load_model(nn.Linear(32, 64), saved, rules=[])
    else:
        report = amc.load_state_dict(saved, rules=[]).report
    timeline = check(report)
    assert timeline.seconds_of(SEND) >= 0.02
    assert timeline.seconds_of(RANKS) >= 0.02


def test_loading_code_that_runs_is_a_span(tmp_path):
    save_file({"a": torch.ones(8)}, tmp_path / "model.safetensors")
    model = nn.Module()
    model.register_buffer("sum", torch.zeros(8))

    def load_weights(pairs):
        for _, tensor in pairs:
            if not tensor.is_meta:
                time.sleep(0.02)
            model.sum.copy_(tensor.exp())

    report = amc.load_with(load_weights, tmp_path, model)
    assert set(report.computed) == {"sum"}
    assert report.timeline.seconds_of(CODE) >= 0.02


def test_reports_that_differ_in_the_timeline_only_are_equal_and_look_alike(saved):
    report = amc.load_state_dict(saved, rules=[]).report
    other = replace(report, timeline=Timeline())
    assert report.timeline != Timeline()
    assert report == other
    assert repr(report) == repr(other)
    assert str(report) == str(other)


@pytest.mark.parametrize("as_path", [str, Path])
def test_page_replaces_a_file_and_has_the_picture_and_the_rows(saved, tmp_path, as_path):
    report = amc.load_state_dict(saved, rules=[]).report
    file = tmp_path / "load.html"
    file.write_text("x" * 1_000_000)
    report.to_html(as_path(file))
    page = file.read_text(encoding="utf-8")
    assert page.startswith("<!DOCTYPE html>")
    assert "<title>load of 8.4 kB in " in page
    assert "thread 1 read 8.4 kB in " in page
    assert "bound the load" in page
    assert ">threads, at most</td>" in page
    report.to_html(file, title="<b>mine</b>")
    assert "<title>&lt;b&gt;mine&lt;/b&gt;</title>" in file.read_text(encoding="utf-8")


def test_page_that_cannot_be_written_is_an_error_of_the_system(saved, tmp_path):
    report = amc.load_state_dict(saved, rules=[]).report
    with pytest.raises(OSError, match="absent"):
        report.to_html(tmp_path / "absent" / "load.html")


def test_names_of_tensors_cannot_inject_into_the_page(saved, tmp_path):
    wild = "<img src=x onerror=alert(1)>\x1b[2J"
    report = replace(amc.load_state_dict(saved, rules=[]).report, missing_keys=(wild,) * 50)
    report.to_html(tmp_path / "load.html")
    page = (tmp_path / "load.html").read_text(encoding="utf-8")
    assert "<img" not in page
    assert "\x1b" not in page
    assert page.count("onerror") == 3
    assert "... and 47 more" in page


def test_notebook_shows_the_rows_and_the_picture(saved):
    html = amc.load_state_dict(saved, rules=[]).report._repr_html_()
    assert html.startswith("<table>")
    assert "threads, at most" in html
    assert html.count("<iframe ") == 1
    assert "&lt;svg " in html
