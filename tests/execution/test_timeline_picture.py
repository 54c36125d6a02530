"""Tests of the picture of a timeline: bars where the spans are, few enough of them, and texts that cannot inject."""

import random
import re
from html import unescape
from itertools import pairwise

import pytest

from automodel_conv.execution.timeline import Span, Timeline
from automodel_conv.execution.timeline_picture import MOST_RECTANGLES, picture, timeline_page
from automodel_conv.execution.timeline_words import KINDS, span_text

LEFT, WIDTH = 130, 1050
RECTANGLE = re.compile(
    r'<rect x="([\d.]+)" y="([\d.]+)" width="([\d.]+)" height="(\d+)" fill="var\(--(\w+)\)"><title>(.*?)</title></rect>'
)


def bars(svg):
    """Return the bars of a picture: x, y, width, height, kind and title."""
    return [(*map(float, bar[:4]), bar[4], unescape(bar[5])) for bar in RECTANGLE.findall(svg)]


SPANS = (
    Span("phases", "open", 0.0, 1.0),
    Span("phases", "fill", 1.0, 4.0),
    Span("thread 1", "read", 1.0, 2.5, 3_000_000_000),
    Span("thread 1", "slot", 2.5, 4.0),
)


def test_bars_stand_where_the_spans_are_and_say_what_they_are():
    unit = WIDTH / 4
    assert bars(picture(Timeline(SPANS, 4.0))) == [
        (LEFT, 3, unit, 16, "open", "phases: opened the checkpoint in 1 s"),
        (LEFT + unit, 3, 3 * unit, 16, "fill", "phases: filled the tensors in 3 s"),
        (LEFT, 61, WIDTH / 2, 16, "read", "thread 1 read 3.0 GB in 1.5 s (2.00 GB/s)"),
        (LEFT + WIDTH / 2, 66, WIDTH / 2, 6, "slot", span_text(SPANS[3])),
    ]


def test_lanes_of_threads_are_enlarged_and_lines_show_which_part_they_are():
    spans = (Span("phases", "plan", 0.0, 9.0), Span("phases", "fill", 9.0, 10.0))
    spans += (Span("thread 1", "read", 9.5, 9.75, 1), Span("thread 2", "read", 9.625, 10.0, 1))
    svg = picture(Timeline(spans, 10.0))
    assert [(x, width) for x, _, width, _, kind, _ in bars(svg) if kind == "read"] == [
        (LEFT, WIDTH / 2),
        (LEFT + WIDTH / 4, 3 * WIDTH / 4),
    ]
    assert f'class="zoom" d="M{LEFT + 0.95 * WIDTH:.2f} 22L{LEFT} 58M{LEFT + WIDTH:.2f} 22L{LEFT + WIDTH} 58"' in svg
    seconds = re.findall(r'<text class="seconds"[^>]*>([^<]*)<', svg)
    assert seconds == [*(f"{n} s" for n in (0, 2, 4, 6, 8, 10)), "9.5 s", "9.6 s", "9.7 s", "9.8 s", "9.9 s", "10 s"]


def test_phases_have_their_words_where_they_fit():
    spans = (Span("phases", "open", 0.0, 0.5), Span("phases", "fill", 0.5, 10.0), Span("thread 1", "read", 0.5, 10.0))
    assert re.findall(r'<text class="phase" [^>]*>([^<]*)<', picture(Timeline(spans, 10.0))) == ["filled the tensors"]


@pytest.mark.parametrize("kept", [["phases"], ["thread 1"], []])
def test_picture_without_phases_or_without_threads_has_the_others(kept):
    spans = tuple(span for span in SPANS if span.lane in kept)
    svg = picture(Timeline(spans, 4.0))
    assert len(bars(svg)) == len(spans)
    assert "zoom" not in svg


def test_threads_that_took_no_time_have_a_picture():
    assert len(bars(picture(Timeline((Span("thread 1", "read", 5.0, 5.0, 1),), 5.0)))) == 1


@pytest.mark.parametrize(
    ("seconds", "ticks"),
    [
        (4.0, ["0 s", "0.5 s", "1 s", "1.5 s", "2 s", "2.5 s", "3 s", "3.5 s", "4 s"]),
        (0.0031, ["0 s", "0.0005 s", "0.001 s", "0.0015 s", "0.002 s", "0.0025 s", "0.003 s"]),
        (170.0, ["0 s", "50 s", "100 s", "150 s"]),
    ],
)
def test_axis_has_round_numbers_of_seconds(seconds, ticks):
    spans = (Span("thread 1", "read", 0.0, seconds, 1),)
    assert re.findall(r'<text class="seconds"[^>]*>([^<]*)<', picture(Timeline(spans, seconds))) == ticks


def many(lanes, number):
    rng, spans = random.Random(0), []
    for lane in range(lanes):
        at = 0.0
        for _ in range(number):
            end = at + rng.random()
            spans.append(Span(f"thread {lane}", rng.choice(["memory", "read", "copy"]), at, end, 1))
            at = end
    return Timeline(tuple(spans), max(span.end for span in spans))


@pytest.mark.parametrize(("lanes", "number"), [(1, 20_000), (4, 5000), (32, 600)])
def test_picture_has_few_bars_and_they_do_not_overlap(lanes, number):
    drawn = bars(picture(many(lanes, number)))
    assert lanes < len(drawn) <= MOST_RECTANGLES
    assert {bar[4] for bar in drawn} == {"memory", "read", "copy"}
    for y in {bar[1] for bar in drawn}:
        lane = [bar for bar in drawn if bar[1] == y]
        assert all(one[0] + one[2] <= other[0] + 0.12 for one, other in pairwise(lane))


def test_picture_of_few_long_spans_merges_none():
    timeline = many(2, 40)
    assert len(bars(picture(timeline))) == 80


def test_page_has_the_legend_the_sentences_and_the_rows():
    page = timeline_page(Timeline(SPANS, 4.0), "a load", [("read", "3.0 GB")])
    assert "<title>a load</title>" in page
    assert "<h1>a load</h1>" in page
    assert [re.sub("<.*?>", "", item).strip() for item in re.findall(r"<li>(.*?)</li>", page)] == [
        "opened the checkpoint 1 s",
        "filled the tensors 3 s",
        "read 1.5 s, 3.0 GB",
        "waited for uploads out of its pinned memory 1.5 s",
    ]
    assert "<p>Threads waited 1.5 s in all for uploads out of its pinned memory.</p>" in page
    assert ">3.0 GB</td>" in page


def test_page_says_that_spans_were_merged():
    assert "Spans of a thread within 250 ms are merged by kind." in timeline_page(Timeline(SPANS, 4.0, 0.25), "a", [])
    assert "are merged by kind" not in timeline_page(Timeline(SPANS, 4.0), "a", [])


def test_page_of_an_empty_timeline_has_a_picture_without_bars():
    page = timeline_page(Timeline(), "nothing", [])
    assert bars(page) == []
    assert "<svg" in page


def test_title_that_is_not_utf_8_can_be_written():
    assert "<h1>caf\\udce9</h1>" in timeline_page(Timeline(SPANS, 4.0), "caf\udce9", [])


def test_texts_cannot_inject():
    wild = '<img src=x onerror="alert(1)"></title></svg>'
    page = timeline_page(Timeline((Span(wild, "read", 0.0, 1.0, 1),), 1.0), wild, [(wild, wild)])
    assert "<img" not in page
    assert page.count("</svg>") == 1


def test_every_kind_has_a_colour():
    spans = tuple(Span("thread 1", kind, float(n), n + 1.0) for n, kind in enumerate(KINDS))
    page = timeline_page(Timeline(spans, float(len(spans))), "all kinds", [])
    defined = set(re.findall(r"--(\w+): light-dark\(#\w{6}, #\w{6}\);", page))
    assert {bar[4] for bar in bars(page)} == {*KINDS} <= defined


def test_page_loads_nothing_from_anywhere():
    page = timeline_page(Timeline(SPANS, 4.0), "a", [])
    assert not re.search(r"https?:|<script|<link|url\(|src=", page)
