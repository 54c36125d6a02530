"""Progress bars: off by default, and one bar for tasks that run at the same time."""

import os
import select
import sys
import threading

import pytest

from automodel_conv.progress import SharedBar, bytes_progress, shared_progress


class Bar:
    """A bar that remembers what it was told; ``total`` and ``done`` race if two threads are in it at once."""

    def __init__(self):
        self.total, self.done, self.refreshed = 0, 0, 0

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
        first(4)
        second(5)
    assert bar.done == 9


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
