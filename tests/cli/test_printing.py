"""Tests of tables and lists of names on the terminal."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import automodel_conv
from automodel_conv.cli.printing import errors_of_output, print_names, print_table
from automodel_conv.cli.tables import two_columns


@pytest.mark.parametrize(
    ("carried", "left_out", "lines"),
    [
        ((), (), []),
        (("a", "b"), (), ["carried as they are, since the model has no place for them:", "    a", "    b"]),
        ((), ("c",), ["left out:", "    c"]),
    ],
    ids=["nothing", "carried", "left out"],
)
def test_names_have_a_line_each_and_no_heading_without_names(capsys, carried, left_out, lines):
    print_names(carried, left_out)
    assert capsys.readouterr().out.splitlines() == lines


def test_carried_names_come_before_those_left_out_and_long_lists_are_cut(capsys):
    print_names(("a",), tuple("b" * n for n in range(1, 31)))
    out = capsys.readouterr().out
    assert out.index("    a\n") < out.index("left out")
    assert "... and 10 more" in out


def widest(capsys, monkeypatch, columns, *, is_terminal):
    """Return the length of the longest line of a table with a long cell."""
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: is_terminal)
    table = two_columns()
    table.add_row("name", "word " * 60)
    print_table(table)
    return max(map(len, capsys.readouterr().out.splitlines()))


def test_a_table_is_100_columns_wide_in_a_file_and_as_wide_as_a_terminal_there(capsys, monkeypatch):
    assert widest(capsys, monkeypatch, 60, is_terminal=False) == 100
    assert widest(capsys, monkeypatch, 60, is_terminal=True) == 60


@pytest.mark.parametrize("columns", [40, 80])
def test_no_name_is_cut_in_few_columns(capsys, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    name = "model.layers.0.mlp.experts.gate_and_up_projs_of_a_very_long_name"
    table = two_columns()
    table.add_row(name, "1.5 GB")
    print_table(table)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= columns
    assert "".join(line.split("│")[1].strip() for line in lines[1:-1]) == name


def in_terminal(plain, **variables):
    """Return what a command prints on a terminal of 80 columns."""
    pty = pytest.importorskip("pty", reason="opens a pseudo terminal")
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "automodel_conv", "plan", str(plain), "--no-model", "--mesh", "ep=1"]
    root = Path(automodel_conv.__file__).parent.parent
    environment = {**os.environ, "COLUMNS": "80", **variables}
    process = subprocess.Popen(command, stdout=theirs, stderr=theirs, cwd=root, env=environment)
    os.close(theirs)
    parts = []
    while True:
        try:
            part = os.read(ours, 1 << 16)
        except OSError:  # the other end is closed
            part = b""
        if not part:
            break
        parts.append(part)
    os.close(ours)
    assert process.wait() == 0
    return b"".join(parts).decode()


def test_dumb_terminal_gets_no_escape_codes(plain):
    assert "\x1b[" in in_terminal(plain, TERM="xterm")
    assert "\x1b" not in in_terminal(plain, TERM="dumb")


def test_terminal_without_colour_gets_none(plain):
    assert not re.search(r"\x1b\[(3[0-7]|38|9[0-7])", in_terminal(plain, TERM="xterm-256color", NO_COLOR="1"))


def plan_into(stdout, plain):
    command = [sys.executable, "-m", "automodel_conv", "plan", str(plain), "--no-model", "--mesh", "ep=1"]
    root = Path(automodel_conv.__file__).parent.parent
    return subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, text=True, cwd=root)


def test_command_ends_quietly_if_the_reader_of_its_pipe_has_ended(plain):
    read, write = os.pipe()
    os.close(read)
    with open(write, "w") as stdout:
        done = plan_into(stdout, plain)
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is full")
def test_command_says_that_its_output_cannot_be_written(plain):
    with open("/dev/full", "w") as stdout:
        done = plan_into(stdout, plain)
    expected = "error: the output cannot be written: No space left on device\n"
    assert (done.returncode, done.stderr) == (1, expected)


def test_error_of_another_file_keeps_its_traceback():
    with pytest.raises(OSError, match="another"), errors_of_output():
        raise OSError(28, "another")


def test_command_runs_without_stdout(plain):
    command = f'"{sys.executable}" -m automodel_conv plan "{plain}" --no-model --mesh ep=1 >&-'
    root = Path(automodel_conv.__file__).parent.parent
    done = subprocess.run(command, shell=True, stderr=subprocess.PIPE, text=True, cwd=root)
    assert (done.returncode, done.stderr) == (0, "")
