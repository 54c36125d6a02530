"""Tests of tables and lists of names on the terminal."""

import sys

import pytest

from automodel_conv.cli.printing import print_names, print_table
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
