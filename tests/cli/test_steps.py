"""Tests of the line with the current step: shown after a while, replaced on a terminal, and never if disabled."""

import io
import sys
import threading
import time

import pytest

from automodel_conv.cli.steps import step_line

ERASE = "\r\x1b[2K"


class Terminal(io.StringIO):
    def isatty(self):
        return True


def wait_for(stream, text):
    """Wait until a line was written, for as long as a busy machine needs."""
    stop = time.monotonic() + 30
    while text not in stream.getvalue():
        assert time.monotonic() < stop
        time.sleep(0.001)


def terminal_of(monkeypatch):
    """Return a terminal that is standard error for the rest of the test."""
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    return stream


def test_line_names_the_current_step_and_is_erased_at_the_end(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    terminal = terminal_of(monkeypatch)
    with step_line(True, seconds=0.01) as step:
        step("planning")
        wait_for(terminal, "planning")
        step("rank 1 of 8")
    assert terminal.getvalue() == f"{ERASE}planning ...{ERASE}rank 1 of 8 ...{ERASE}"


def test_terminal_that_cannot_erase_gets_lines(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    terminal = terminal_of(monkeypatch)
    with step_line(True, seconds=0.01) as step:
        step("planning")
        wait_for(terminal, "planning")
        step("rank 1 of 8")
    assert terminal.getvalue() == "planning ...\nrank 1 of 8 ...\n"


def test_quick_commands_and_disabled_lines_show_nothing(monkeypatch):
    terminal = terminal_of(monkeypatch)
    with step_line(True, seconds=600) as step:
        step("planning")
    with step_line(False, seconds=0) as step:
        step("planning")
    assert terminal.getvalue() == ""
    assert not [thread for thread in threading.enumerate() if isinstance(thread, threading.Timer)]


def test_steps_are_lines_of_their_own_in_a_log(monkeypatch):
    log = io.StringIO()
    monkeypatch.setattr(sys, "stderr", log)
    with step_line(True, seconds=0.01) as step:
        step("planning")
        wait_for(log, "planning")
        step("rank 1 of 8")
    assert log.getvalue() == "planning ...\nrank 1 of 8 ...\n"


def test_an_error_erases_the_line(monkeypatch):
    terminal = terminal_of(monkeypatch)

    def fail():
        with step_line(True, seconds=0.01) as step:
            step("planning")
            wait_for(terminal, "planning")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert terminal.getvalue().endswith(f"planning ...{ERASE}")
