"""Tests of the text of reports: aligned rows, and the first names of each kind."""

from io import StringIO

import pytest
from rich.console import Console

from automodel_conv.execution.report_text import (
    Report,
    Row,
    cost_rows,
    count_row,
    memory_row,
    short_text,
    text_of,
)


class Example(Report):
    """A report with a name that rich would read as a style, and that HTML would read as a tag."""

    def _rows(self):
        names = ["[red]a", "<b>c", "d\x1b[2Je"]
        return [Row("read", "1.0 GB"), count_row("left out", names), Row("new memory", "small pages for 100%")]


def test_values_are_aligned_and_few_names_are_listed():
    names = [f"layers.{layer}.w" for layer in range(30)]
    rows = [Row("read", "1.000 GB"), count_row("left out", names), count_row("missing", [])]
    assert text_of(rows).splitlines() == [
        "read      1.000 GB",
        "left out  30",
        "    layers.0.w",
        "    layers.1.w",
        "    layers.2.w",
        "    ... and 27 more",
        "missing   0",
    ]


def test_names_cannot_move_the_cursor_of_a_terminal():
    text = text_of([count_row("left out", ["a\x1b[2Jb", "x" * 5000])])
    assert "a\\x1b[2Jb" in text
    assert max(map(len, text.splitlines())) < 2100


def test_bytes_speed_and_memory_have_their_units():
    rows = [*cost_rows("written", 1_500_000_000, 2.345), memory_row(3 << 19)]
    assert [row.value for row in rows] == ["1.5 GB", "2.35 GB/s", "1.6 MB"]


def test_a_report_is_printed_whole_and_is_one_line_in_a_shell():
    assert str(Example()) == text_of(Example()._rows())
    assert (
        repr(Example()) == "<Example: read: 1.0 GB, left out: 3, new memory: small pages for 100%; print() shows all>"
    )


@pytest.mark.parametrize("length", [1, 50, 5000])
def test_short_text_ends_before_rows_that_do_not_fit(length):
    text = short_text("LoadReport", [Row("first", "1"), Row("l" * length, "x"), *[Row("more", "3")] * 100])
    assert text.startswith("<LoadReport: first: 1, " if length < 100 else "<LoadReport: first: 1;")
    assert text.endswith("; print() shows all>")
    assert len(text) <= 200


def test_short_text_without_rows_that_fit_has_the_name():
    assert short_text("Report", []) == "<Report; print() shows all>"
    assert short_text("Report", [Row("l" * 500, "x")]) == "<Report; print() shows all>"


def test_rich_shows_a_report_as_a_table():
    out = StringIO()
    Console(file=out, width=60).print(Example())
    lines = [" ".join(line.replace("│", " ").split()) for line in out.getvalue().splitlines()]
    assert [line for line in lines if line[:1].isalnum() or line[:1] in "[<"] == [
        *("read 1.0 GB", "left out 3", "[red]a", "<b>c", "d\\x1b[2Je", "new memory small pages for 100%"),
    ]


def test_a_notebook_shows_a_report_as_a_table():
    html = Example()._repr_html_()
    assert html.startswith("<table>")
    assert html.count("<tr>") == 3
    assert "&lt;b&gt;c" in html
    assert "\x1b" not in html
