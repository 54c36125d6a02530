"""Tests of the text of reports: aligned rows, and the first names of each kind."""

from automodel_conv.execution.report_text import Row, cost_rows, count_row, memory_row, text_of


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
