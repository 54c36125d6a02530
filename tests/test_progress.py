"""Progress bars: off by default, and one bar for tasks that run at the same time."""

import os
import select
import sys
import threading

import pytest

from automodel_conv.progress import SharedBar, bytes_progress, phases, shared_progress


class Bar:
    """A bar that remembers what it was told; ``total`` and ``done`` race if two threads are in it at once."""

    n, start_t = 0, 1.0

    def __init__(self):
        self.total, self.done, self.refreshed = 0, 0, 0

    def reset(self, total):
        self.total, self.n, self.start_t = total, 0, 2.0
        self.refreshed += 1

    def refresh(self):
        self.refreshed += 1

    def update(self, nbytes):
        done = self.done
        threading.Event().wait(0.0002)
        self.done = done + nbytes


def test_without_a_bar_nothing_is_drawn_and_tqdm_is_not_imported(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with shared_progress("loading", False) as bar, bytes_progress(10, "loading", bar) as advance:
        advance(10)
    assert bar is False
    assert capsys.readouterr() == ("", "")


def test_bar_of_its_own_counts_its_bytes_on_standard_error(capsys):
    pytest.importorskip("tqdm")
    with bytes_progress(3_000_000, "loading", True) as advance:
        advance(1_000_000)
        advance(2_000_000)
    out, err = capsys.readouterr()
    assert out == ""
    assert "loading" in err
    assert "3.00M/3.00M" in err


@pytest.mark.skipif(sys.platform != "linux", reason="opens a terminal")
def test_bar_is_drawn_on_a_terminal_that_reports_no_size(monkeypatch):
    pytest.importorskip("tqdm")
    ours, theirs = os.openpty()
    assert os.get_terminal_size(theirs).columns == 0
    with open(theirs, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        with bytes_progress(3_000_000, "loading", True) as advance:
            advance(3_000_000)
        drawn = ""
        while "3.00M/3.00M" not in drawn and select.select([ours], [], [], 10)[0]:
            drawn += os.read(ours, 4096).decode()
    os.close(ours)
    assert "3.00M/3.00M" in drawn


def test_tasks_that_share_a_bar_add_their_sizes_to_its_total():
    bar = Bar()
    with bytes_progress(10, "a", SharedBar(bar)) as first, bytes_progress(5, "b", SharedBar(bar)) as second:
        assert (bar.total, bar.refreshed) == (15, 2)
        assert bar.start_t == 1.0
        first(4)
        second(5)
    assert bar.done == 9


def test_a_task_that_joins_later_changes_only_the_total(capsys):
    pytest.importorskip("tqdm")
    with shared_progress("all", True) as bar:
        with bytes_progress(400, "first", bar) as advance:
            advance(400)
        start = bar._bar.start_t
        with bytes_progress(600, "second", bar) as advance:
            assert (bar._bar.n, bar._bar.total, bar._bar.start_t) == (400, 1000, start)
            advance(600)
    assert "1.00k/1.00k" in capsys.readouterr().err


def test_a_notebook_shows_a_widget_with_the_total(monkeypatch):
    """The widgets are of ipywidgets; the bar of tqdm for notebooks is used without a notebook."""
    pytest.importorskip("ipywidgets")
    notebook = pytest.importorskip("tqdm.notebook")
    monkeypatch.setattr("tqdm.auto.tqdm", notebook.tqdm)
    with shared_progress("loading", True) as bar:
        _, widget, _ = bar._bar.container.children
        with bytes_progress(1000, "loading", bar) as advance:
            advance(400)
            bar._bar.refresh()
            assert (widget.max, widget.value, widget.bar_style) == (1000, 400, "")
            assert widget.layout.width is None
            advance(600)


def test_shared_bar_is_drawn_once(capsys):
    pytest.importorskip("tqdm")
    with shared_progress("all", True) as bar:
        for size in (400, 600):
            with bytes_progress(size, "part", bar) as advance:
                advance(size)
    err = capsys.readouterr().err
    assert "1.00k/1.00k" in err
    assert "part" not in err


def test_any_thread_may_advance_a_bar():
    bar = Bar()
    shared = SharedBar(bar)
    threads = [threading.Thread(target=lambda: [shared.advance(1) for _ in range(20)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert bar.done == 80


def test_note_follows_the_numbers(capsys):
    pytest.importorskip("tqdm")
    notes = iter(["1 connection", "2 connections"])
    with shared_progress("loading", True, lambda: next(notes)) as bar, bytes_progress(2, "loading", bar) as advance:
        advance(1)
        advance(1)
    assert "2 connections" in capsys.readouterr().err


def test_phases_alternate_and_each_has_a_line_at_the_end(capsys):
    pytest.importorskip("tqdm")
    with phases({"writing": 4000, "verifying": 2000, "uploading": 0}, True) as running:
        for part in (1000, 3000):
            with running.begin("writing") as advance:
                advance(part)
            with running.begin("verifying") as advance:
                advance(1000)
            with running.begin("uploading") as advance:
                advance(5)
    lines = [line.split("\r")[-1] for line in capsys.readouterr().err.splitlines() if line]
    assert [line.split(":")[0] for line in lines[-2:]] == ["writing", "verifying"]
    assert "4.00k/4.00k" in lines[-2]
    assert "2.00k/2.00k" in lines[-1]
    assert set(running.seconds) == {"writing", "verifying", "uploading"}
    assert all(seconds > 0 for seconds in running.seconds.values())


def test_speed_of_a_phase_does_not_include_other_phases(monkeypatch):
    clock = [1000.0]
    monkeypatch.setattr("automodel_conv.progress.time.time", lambda: clock[0])

    class Timed(Bar):
        start_t = last_print_t = 1000.0

    bar = Timed()
    shared = SharedBar(bar)
    clock[0] += 2
    shared.pause()
    clock[0] += 60
    shared.resume()
    assert (clock[0] - bar.start_t, bar.refreshed) == (2.0, 1)


def test_bars_end_if_the_work_fails(capsys):
    pytest.importorskip("tqdm")

    def fail():
        with phases({"writing": 4000}, True) as running, running.begin("writing"):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert capsys.readouterr().err.endswith("\n")


def test_phases_without_bars_are_timed(capsys):
    with phases({"writing": 4000}, False) as running, running.begin("writing") as advance:
        advance(4000)
    assert running.seconds["writing"] > 0
    assert capsys.readouterr() == ("", "")
