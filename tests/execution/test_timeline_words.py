"""Tests of the words of timelines: what a span says, and sentences about waits and about what bound a load."""

import re

import pytest

from automodel_conv.execution import timeline
from automodel_conv.execution.timeline import Span, Timeline
from automodel_conv.execution.timeline_words import KINDS, is_reader, seconds_text, sentences, span_text
from tests.docs.running import ROOT

OWN = {name: kind for name, kind in vars(timeline).items() if name[0].isupper() and isinstance(kind, str)}
del OWN["PHASES"]  # a lane


def reading(seconds, lane="thread 1", begin=0.0, kind="read", nbytes=0):
    return Span(lane, kind, begin, begin + seconds, nbytes)


def test_every_kind_that_is_recorded_has_words():
    assert sorted(KINDS) == sorted(OWN.values())
    assert all(name.lower() == kind for name, kind in OWN.items())


def test_every_kind_has_its_own_label_and_is_in_the_reference():
    labels = [kind.label for kind in KINDS.values()]
    assert len(labels) == len(set(labels))
    page = (ROOT / "docs" / "reference" / "reports.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `(\w+)` \| (.*?) \|", page, re.MULTILINE) == [
        (name, kind.label) for name, kind in KINDS.items()
    ]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 us"),
        (1e-9, "0.001 us"),
        (999.4e-6, "999 us"),
        (999.6e-6, "1 ms"),
        (0.0996, "99.6 ms"),
        (0.09996, "100 ms"),
        (0.9994, "999 ms"),
        (0.9996, "1 s"),
        (12.345, "12.3 s"),
        (123.45, "123 s"),
        (12345.6, "12346 s"),
    ],
)
def test_seconds_have_three_digits_and_a_unit(seconds, text):
    assert seconds_text(seconds) == text


@pytest.mark.parametrize(
    ("span", "text"),
    [
        (reading(0.012, "thread 3", 5.0, nbytes=16_800_000), "thread 3 read 16.8 MB in 12 ms (1.40 GB/s)"),
        (reading(0.5, "cuda:1 thread 2", kind="copy"), "cuda:1 thread 2 copied in 500 ms"),
        (reading(0.25, kind="slot"), "thread 1 waited 250 ms for uploads out of its pinned memory"),
        (reading(2.0, "phases", kind="open"), "phases: opened the checkpoint in 2 s"),
        (reading(2.0, "phases", kind="ranks"), "phases waited 2 s for other ranks"),
        (reading(0.0, nbytes=8), "thread 1 read 8 bytes in 0 us (8.00 GB/s)"),
    ],
)
def test_span_says_who_did_what_in_how_long(span, text):
    assert span_text(span) == text


@pytest.mark.parametrize(
    ("lane", "is_one"),
    [("thread 1", True), ("cuda:0 thread 12", True), ("main", False), ("cuda:0 main", False), ("compiler", False)],
)
def test_threads_that_read_are_known_by_the_names_of_their_lanes(lane, is_one):
    assert is_reader(lane) is is_one


def test_what_took_most_of_the_time_bound_the_load():
    spans = (reading(1.0, "phases", kind="open"), reading(4.0, "phases", 1.0, "fill"))
    spans += (reading(3.0, begin=1.0), reading(0.5, begin=4.0, kind="copy"))
    assert sentences(Timeline(spans, 5.0)) == ["Reading bound the load: it took 3 s of 5 s."]


def test_phase_that_took_longer_than_the_threads_bound_the_load():
    spans = (reading(3.5, "phases", kind="open"), reading(4.0, "phases", 3.5, "fill"))
    spans += (reading(3.0, begin=3.5), reading(3.0, "thread 2", 3.5))
    first, *_ = sentences(Timeline(spans, 8.0))
    assert first == "Nothing alone bound the load. Opening the checkpoint took longest: 3.5 s of 8 s."
    assert sentences(Timeline(spans, 7.0))[0] == "Opening the checkpoint bound the load: it took 3.5 s of 7 s."


def test_time_of_threads_is_their_average():
    spans = tuple(reading(2.0 + n, f"thread {n}", kind="memory") for n in range(3))
    first, *_ = sentences(Timeline(spans, 5.0))
    assert first == "Creating new memory bound the load: it took 3 s of 5 s, as an average of 3 threads."


@pytest.mark.parametrize("kind", [name for name, kind in KINDS.items() if kind.is_wait])
def test_each_kind_of_wait_has_a_sentence_with_the_seconds_of_all_threads(kind):
    spans = (reading(1.5, "thread 1", kind=kind), reading(1.0, "thread 2", kind=kind), reading(0.5, "thread 2", 1.0))
    texts = sentences(Timeline(spans, 2.0))
    assert f"Threads waited 2.5 s in all for {KINDS[kind].did}." in texts
    assert len(texts) == 2


def test_threads_that_have_nothing_left_to_do_wait_for_the_last_one():
    spans = (reading(1.0), reading(3.0, "thread 2"), reading(2.5, "thread 3"), reading(9.0, "main", kind="upstream"))
    *_, last = sentences(Timeline(spans, 9.0))
    assert last == "Threads waited 2.5 s in all for the last one to end."


def test_load_that_did_nothing_has_no_sentences():
    assert sentences(Timeline()) == []
    assert sentences(Timeline((reading(1.0, "phases", kind="fill"),), 1.0)) == []
