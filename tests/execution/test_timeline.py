"""Tests of timelines: spans follow each other, sums stay exact when spans are merged, and waits have their names."""

from __future__ import annotations

import json
import random
import time
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from automodel_conv import compile_plan
from automodel_conv.execution import device as streaming
from automodel_conv.execution import host, timeline
from automodel_conv.execution.buffers import allocate
from automodel_conv.execution.host import load_to_host
from automodel_conv.execution.timeline import (
    ANSWER,
    COMPILE,
    COPY,
    DECODE,
    DEVICE,
    KERNELS,
    LAUNCH,
    MEMORY,
    MOST_SPANS,
    READ,
    SCHEDULE,
    SLOT,
    UPLOAD,
    UPSTREAM,
    WINDOW,
    Lane,
    Recorder,
    Span,
    Spans,
    Timeline,
    merged_in_cells,
    merged_to,
    timeline_of,
)
from automodel_conv.execution.window_copies import WindowCopies
from automodel_conv.files import waits
from automodel_conv.files.checkpoint import open_checkpoint
from automodel_conv.planning.copies import Fallback, Target
from automodel_conv.planning.plan import CopyPlan
from tests.execution import simulated
from tests.execution.device_loads import Case, load
from tests.execution.host_loads import check_load
from tests.execution.simulated import SimulatedDevice
from tests.execution.support import LAYOUTS, columns, moe, naive, plan_of, target, write_checkpoint
from tests.loopback_faults import RESET, Faults
from tests.loopback_store import serve

NEARLY = 1e-9
"""Seconds by which sums of times may differ."""


@pytest.fixture
def clock(monkeypatch):
    """Return an object whose ``now`` is the time of timelines."""
    at = SimpleNamespace(now=10.0)
    monkeypatch.setattr(timeline, "perf_counter", lambda: at.now)
    return at


def spans_of(stats):
    return [Span._make(fields) for fields in stats.spans.spans]


def by_lane(spans):
    lanes: dict[str, list[Span]] = {}
    for span in spans:
        lanes.setdefault(span.lane, []).append(span)
    return lanes


def check(spans):
    """Check that the spans of each lane stand together, in order, and do not overlap."""
    lanes = by_lane(spans)
    assert [span for lane in lanes.values() for span in lane] == list(spans)
    for lane in lanes.values():
        assert all(span.begin <= span.end for span in lane)
        assert all(before.end <= after.begin + NEARLY for before, after in pairwise(lane))
    return lanes


def sums(spans):
    """Return seconds and bytes by lane and kind."""
    totals: dict[tuple[str, str], tuple[float, int]] = {}
    for span in spans:
        seconds, nbytes = totals.get((span.lane, span.kind), (0.0, 0))
        totals[span.lane, span.kind] = seconds + span.seconds, nbytes + span.nbytes
    return totals


def assert_same_sums(spans, others):
    ours, theirs = sums(spans), sums(others)
    assert ours.keys() == theirs.keys()
    for key, (seconds, nbytes) in ours.items():
        assert seconds == pytest.approx(theirs[key][0], abs=1e-6)
        assert nbytes == theirs[key][1]


def random_spans(seed, lanes=3, number=200):
    rng, spans = random.Random(seed), []
    for lane in range(lanes):
        at = rng.random()
        for _ in range(number):
            at += rng.choice([0.0, rng.random()])
            end = at + rng.choice([0.0, 1e-6, rng.random(), 5 * rng.random()])
            spans.append(Span(f"lane {lane}", rng.choice([READ, COPY, SLOT]), at, end, rng.randrange(100)))
            at = end
    return spans


def bytes_of(stats, kind=READ):
    return sum(span.nbytes for span in spans_of(stats) if span.kind == kind)


def seconds_of(stats, kind):
    return sum(span.seconds for span in spans_of(stats) if span.kind == kind)


# Recording.


def test_each_lap_begins_where_the_one_before_it_ended(clock):
    lane = Lane("a")
    for clock.now, kind, nbytes in ((11.0, READ, 5), (11.5, COPY, 0), (14.0, READ, 7)):
        lane.lap(kind, nbytes)
    expected = [("a", READ, 10.0, 11.0, 5), ("a", COPY, 11.0, 11.5, 0), ("a", READ, 11.5, 14.0, 7)]
    assert lane.spans() == expected


def test_short_lap_without_bytes_is_part_of_the_next_one(clock):
    lane = Lane("a")
    for clock.now, kind, nbytes in ((10.0 + 1e-6, MEMORY, 0), (12.0, READ, 5), (12.0 + 1e-6, READ, 3)):
        lane.lap(kind, nbytes)
    assert lane.spans() == [("a", READ, 10.0, 12.0, 5), ("a", READ, 12.0, 12.0 + 1e-6, 3)]


def test_time_before_a_restart_belongs_to_no_span(clock):
    lane = Lane("a")
    clock.now = 12.0
    lane.restart()
    clock.now = 13.0
    lane.lap(UPSTREAM)
    assert lane.spans() == [("a", UPSTREAM, 12.0, 13.0, 0)]


def test_wait_for_an_answer_is_a_span_before_the_read(clock, monkeypatch):
    lane = Lane("a", is_remote=True)
    monkeypatch.setattr(timeline, "seconds_waited", lambda: 0.75)
    lane._waited = 0.5
    clock.now = 12.0
    lane.read_lap(100)
    clock.now = 13.0
    lane.read_lap(200)
    assert lane.spans() == [
        ("a", ANSWER, 10.0, 10.25, 0),
        ("a", READ, 10.25, 12.0, 100),
        ("a", READ, 12.0, 13.0, 200),
    ]


def test_wait_before_a_restart_is_not_one_of_the_read(clock):
    lane = Lane("a", is_remote=True)
    with waits.waiting():
        time.sleep(0.001)
    lane.restart()
    clock.now = 12.0
    lane.read_lap(1)
    assert [span[1] for span in lane.spans()] == [READ]


def test_lanes_of_threads_are_numbered_and_others_are_named():
    recorder = Recorder()
    names = [lane.name for lane in (recorder.lane(), recorder.lane("compiler"), recorder.lane())]
    assert [recorder.main.name, *names] == ["main", "thread 1", "compiler", "thread 2"]


def test_lane_of_a_long_load_is_bounded_and_its_sums_are_exact(clock):
    recorder = Recorder()
    lane, expected = recorder.lane(), []
    for number in range(30_000):
        before, clock.now = clock.now, clock.now + 0.001 * (1 + number % 3)
        kind = (MEMORY, READ, COPY)[number % 3]
        if kind == READ:
            lane.read_lap(number)
        else:
            lane.lap(kind, number)
        expected.append(Span("thread 1", kind, before, clock.now, number))
    fields, merged_seconds = recorder.recorded()
    spans = [Span._make(one) for one in fields]
    assert len(spans) <= 2 * timeline._MOST_LAPS
    assert merged_seconds > 0
    check(spans)
    assert_same_sums(spans, expected)
    assert (spans[0].begin, spans[-1].end) == (10.0, pytest.approx(clock.now))


def test_lane_that_was_merged_says_so_even_if_few_spans_follow(clock):
    lane = Lane("a")
    for _ in range(2 * timeline._MOST_LAPS):
        clock.now += 1
        lane.lap(MEMORY)
        lane.read_lap(1)
    cell = lane.cell
    assert cell > 0
    for _ in range(timeline._MOST_LAPS):
        lane.lap(MEMORY)  # takes no time, so it is in no span
    clock.now += 1
    lane.read_lap(1)
    assert lane.cell >= cell


def test_short_load_is_not_merged(clock):
    recorder = Recorder()
    lane = recorder.lane()
    for _ in range(timeline._MOST_LAPS - 1):
        clock.now += 1
        lane.read_lap(1)
    assert len(recorder.recorded().spans) == timeline._MOST_LAPS - 1
    assert recorder.recorded().merged_seconds == 0


# Merging.


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("cell", [1e-9, 0.1, 1.0, 7.0, 1e6])
def test_merged_spans_have_the_sums_of_each_lane_and_kind_and_do_not_overlap(seed, cell):
    spans = random_spans(seed)
    merged = merged_in_cells(spans, cell)
    check(merged)
    assert_same_sums(merged, spans)
    assert len(merged) <= len(spans)


def test_cell_that_holds_a_whole_lane_has_one_span_of_each_kind():
    merged = merged_in_cells(random_spans(0), 1e6)
    assert len(merged) == len({(span.lane, span.kind) for span in merged}) == 9


def test_no_spans_are_merged_to_none():
    assert merged_in_cells([], 1.0) == []
    assert merged_to([], 0) == ([], 0.0)


@pytest.mark.parametrize("most", [9, 10, 100, 599, 600])
def test_no_more_spans_are_left_than_asked_for(most):
    spans = random_spans(1)
    merged, cell = merged_to(spans, most)
    assert len(merged) <= most
    assert (cell == 0) == (most >= len(spans))
    assert_same_sums(map(Span._make, merged), spans)


def test_spans_at_one_moment_can_be_merged():
    spans = [Span("a", READ, 5.0, 5.0, 1)] * 10
    assert merged_to(spans, 5)[0] == [Span("a", READ, 5.0, 5.0, 10)]


# Timelines.


def test_timeline_begins_at_zero_and_short_phases_are_left_out():
    phases = [Span("phases", "open", 100.0, 101.0), Span("phases", "map", 101.0, 101.00001)]
    spans = Spans((Span("thread 1", READ, 101.5, 102.0, 8),), 0.25)
    made = timeline_of(phases, {"cpu": spans}, 100.0, 103.0)
    assert made == Timeline((Span("phases", "open", 0.0, 1.0), Span("thread 1", READ, 1.5, 2.0, 8)), 3.0, 0.25)


def test_lanes_of_several_devices_have_their_names():
    spans = Spans((Span("thread 1", READ, 1.0, 2.0, 8),))
    made = timeline_of([], {"cpu": spans, "cuda:1": spans}, 1.0, 2.0)
    assert made.lanes == ("cpu thread 1", "cuda:1 thread 1")
    assert made.bytes_of(READ) == 16


def test_timeline_of_many_threads_is_bounded_and_says_so():
    one = tuple(Span("thread 1", READ, float(n), n + 0.5, 3) for n in range(1500))
    made = timeline_of([], {f"cuda:{n}": Spans(one) for n in range(20)}, 0.0, 1500.0)
    assert len(made.spans) <= MOST_SPANS < 30_000
    assert made.merged_seconds > 0
    check(made.spans)
    assert made.bytes_of(READ) == 90_000


def test_load_of_nothing_has_an_empty_timeline():
    assert timeline_of([], {}, 5.0, 5.0) == Timeline()
    assert Timeline().lanes == ()
    assert Timeline().seconds_of(READ) == 0


# Loads to the host.


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_reads_of_a_load_to_the_host_have_all_bytes(tmp_path, small_portions, threads, layout):
    tensors, checkpoint, plan = moe(tmp_path, *LAYOUTS[layout])
    stats = check_load(plan, checkpoint, naive(plan, tensors), threads=threads)
    lanes = check(spans_of(stats))
    assert bytes_of(stats) == stats.bytes_read + stats.gap_bytes == plan.bytes_read
    assert len([lane for lane in lanes if lane.startswith("thread")]) <= threads
    assert seconds_of(stats, SCHEDULE) > 0


def test_bytes_of_gaps_are_read_too(tmp_path):
    tensors = {name: torch.full((64,), float(n)) for n, name in enumerate("abc")}
    checkpoint = write_checkpoint(tmp_path, {"a.safetensors": tensors})
    sources = columns(checkpoint)
    plan = plan_of(sources, *(target(sources, name, "F32", [[name]]) for name in "ac"))
    stats = check_load(plan, checkpoint, {name: tensors[name] for name in "ac"}, threads=1)
    assert stats.gap_bytes == 256
    assert bytes_of(stats) == 256 * 3


def test_slow_file_shows_as_reading(tmp_path, calls):
    tensors, checkpoint, plan = moe(tmp_path, *LAYOUTS["rows"])
    before = calls.reads
    calls.delay = lambda number: time.sleep(0.05)
    stats = check_load(plan, checkpoint, naive(plan, tensors), threads=1)
    assert seconds_of(stats, READ) >= 0.05 * (calls.reads - before) > 0


def test_copies_are_spans_of_their_own(tmp_path, monkeypatch):
    _, checkpoint, plan = moe(tmp_path, *LAYOUTS["transposed"])
    monkeypatch.setattr("automodel_conv.execution.host._copy", lambda *arguments: time.sleep(0.02))
    buffers = allocate(plan.targets)
    stats = load_to_host(plan, checkpoint, buffers, threads=1)
    assert 0.02 <= seconds_of(stats, COPY) < 2


def test_load_of_nothing_records_no_reads(tmp_path):
    checkpoint = write_checkpoint(tmp_path, {"a.safetensors": {"a": torch.ones(0, 3)}})
    sources = columns(checkpoint)
    stats = check_load(plan_of(sources, target(sources, "a", "F32", [["a"]])), checkpoint, {"a": torch.ones(0, 3)})
    assert bytes_of(stats) == seconds_of(stats, READ) == 0


def test_transformers_own_code_and_its_reads_are_spans_of_the_main_thread(tmp_path):
    tensors = {"a": torch.arange(4.0), "b": torch.arange(6.0)}
    checkpoint = write_checkpoint(tmp_path, {"a.safetensors": tensors})
    sources = columns(checkpoint)

    def convert(found):
        time.sleep(0.02)
        return {"b": found[1] + 1}

    own = Target("b", "F32", (6,), -1, (1,), (), Fallback("a test", convert))
    plan = plan_of(sources, target(sources, "a", "F32", [["a"]]), own)
    stats = check_load(plan, checkpoint, {"a": tensors["a"], "b": tensors["b"] + 1}, threads=1)
    check(spans_of(stats))
    assert {span.lane for span in spans_of(stats) if span.kind == UPSTREAM} == {"main"}
    assert seconds_of(stats, UPSTREAM) >= 0.02
    assert bytes_of(stats) == stats.bytes_read == 40


@pytest.mark.parametrize("threads", [1, 2])
def test_decoding_is_a_span_after_the_read_of_all_bytes(tmp_path, monkeypatch, threads):
    codes = {"w.weight": torch.ones(256, 128).to(torch.float8_e4m3fn), "w.weight_scale_inv": torch.full((2, 1), 2.0)}
    save_file(codes, tmp_path / "model.safetensors")
    method = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3_moe", "quantization_config": method}))
    decode = host.decode_codes

    def slow(rectangles, memory):
        time.sleep(0.02)
        decode(rectangles, memory)

    monkeypatch.setattr(host, "decode_codes", slow)
    checkpoint = open_checkpoint(tmp_path)
    plan = compile_plan(checkpoint, rules=[], dtype=torch.float32)
    stats = check_load(plan, checkpoint, {"w.weight": torch.full((256, 128), 2.0)}, threads=threads)
    check(spans_of(stats))
    assert seconds_of(stats, DECODE) >= 0.02
    assert bytes_of(stats) == stats.bytes_read + stats.gap_bytes


# Loads from a server.


def remote_case(tmp_path, url):
    tensors, _, plan = moe(tmp_path, *LAYOUTS["rows"], shape=(4, 64, 96))
    checkpoint = open_checkpoint(url)
    places = {name: row for row, name in enumerate(checkpoint.names)}
    assert [places[name] for name in plan.sources.names] == list(range(len(places)))
    return tensors, checkpoint, plan


@pytest.mark.parametrize("threads", [1, 4])
def test_slow_server_shows_as_a_wait_for_answers(tmp_path, threads):
    moe(tmp_path, *LAYOUTS["rows"], shape=(4, 64, 96))
    with serve(tmp_path, latency=0.1) as server:
        tensors, checkpoint, plan = remote_case(tmp_path, server.url)
        stats = check_load(plan, checkpoint, naive(plan, tensors), threads=threads)
    check(spans_of(stats))
    assert bytes_of(stats) == stats.bytes_read + stats.gap_bytes
    assert seconds_of(stats, ANSWER) >= 0.1


def test_pause_before_a_request_is_repeated_is_a_wait_for_an_answer(tmp_path, monkeypatch):
    moe(tmp_path, *LAYOUTS["rows"], shape=(4, 64, 96))
    monkeypatch.setattr("automodel_conv.files.remote.requests.wait_seconds", lambda *arguments: 0.2)
    with serve(tmp_path) as server:
        open_checkpoint(server.url)
        to_open = len(server.requests)
    with serve(tmp_path, faults=Faults({to_open: RESET})) as server:
        tensors, checkpoint, plan = remote_case(tmp_path, server.url)
        stats = check_load(plan, checkpoint, naive(plan, tensors), threads=1)
        assert checkpoint.traffic.retries == 1
    assert seconds_of(stats, ANSWER) >= 0.2


def test_slow_server_shows_in_a_load_to_a_device_too(tmp_path):
    moe(tmp_path, *LAYOUTS["rows"], shape=(4, 64, 96))
    with serve(tmp_path, latency=0.1) as server:
        tensors, checkpoint, plan = remote_case(tmp_path, server.url)
        case = Case(checkpoint, plan, naive(plan, tensors))
        stats = load(case, SimulatedDevice(), threads=2, scratch_bytes=1 << 20, device_scratch_bytes=1 << 20)
    check(spans_of(stats))
    assert bytes_of(stats) == stats.bytes_read + stats.gap_bytes
    assert seconds_of(stats, ANSWER) >= 0.1


def test_local_files_wait_for_no_answers(tmp_path):
    tensors, checkpoint, plan = moe(tmp_path, *LAYOUTS["rows"])
    assert seconds_of(check_load(plan, checkpoint, naive(plan, tensors)), ANSWER) == 0


# Loads to a device.


@pytest.mark.parametrize("threads", [1, 3])
def test_reads_of_a_load_to_a_device_have_all_bytes(cases, threads):
    for case in cases:
        stats = load(case, SimulatedDevice(), threads=threads, scratch_bytes=30000, device_scratch_bytes=20000)
        lanes = check(spans_of(stats))
        assert bytes_of(stats) == stats.bytes_read + stats.gap_bytes
        assert {"thread 1"} <= lanes.keys() <= {"main", "compiler", "thread 1", "thread 2", "thread 3"}


def test_slow_device_shows_as_a_wait_for_uploads(cases, monkeypatch):
    done = simulated.Event.synchronize

    def late(event):
        time.sleep(0.01)
        done(event)

    monkeypatch.setattr(simulated.Event, "synchronize", late)
    stats = load(cases[0], SimulatedDevice(), threads=1)
    waits_for_slots = [span for span in spans_of(stats) if span.kind == SLOT]
    assert len(waits_for_slots) > 1
    assert all(span.seconds >= 0.01 for span in waits_for_slots)
    assert seconds_of(stats, DEVICE) >= 0.02  # one for each stream
    assert {span.lane for span in spans_of(stats) if span.kind == DEVICE} == {"main"}


def test_slow_copies_out_of_windows_show_as_a_wait_for_a_window(cases, monkeypatch):
    run = WindowCopies.run

    def slow(self, number, chosen):
        time.sleep(0.05)
        return run(self, number, chosen)

    monkeypatch.setattr(WindowCopies, "run", slow)
    stats = load(cases[2], SimulatedDevice(eagerness=1.0), threads=3, scratch_bytes=3 * 8192)
    assert seconds_of(stats, WINDOW) > 0.02
    assert seconds_of(stats, LAUNCH) >= 0.05
    assert seconds_of(stats, UPLOAD) > 0


def test_slow_compilation_shows_as_a_wait_for_kernels(cases, monkeypatch):
    def late(*arguments):
        time.sleep(0.2)
        return False

    monkeypatch.setattr(streaming, "why_not", lambda device: None)
    monkeypatch.setattr(streaming, "uses_kernels", late)
    stats = load(cases[2], SimulatedDevice(), threads=2, backend="auto")
    assert seconds_of(stats, KERNELS) > 0.05
    assert [span.lane for span in spans_of(stats) if span.kind == COMPILE] == ["compiler"]


def test_plan_without_sources_loads_and_has_a_timeline(tmp_path):
    checkpoint = write_checkpoint(tmp_path, {"a.safetensors": {"a": torch.ones(2)}})
    plan = CopyPlan(columns(checkpoint), ())
    stats = load_to_host(plan, checkpoint, {})
    check(spans_of(stats))
    assert bytes_of(stats) == 0


def test_check_of_spans_can_fail():
    overlapping = (Span("a", READ, 0.0, 1.0), Span("a", READ, 0.5, 2.0))
    with pytest.raises(AssertionError):
        check(overlapping)
    with pytest.raises(AssertionError):
        check((Span("a", READ, 0.0, 1.0), Span("b", READ, 0.0, 1.0), Span("a", READ, 1.0, 2.0)))
    with pytest.raises(AssertionError):
        assert_same_sums(overlapping, overlapping[:1])
