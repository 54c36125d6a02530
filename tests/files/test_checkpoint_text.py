"""Tests of checkpoints as text: one line in a shell, and rows in a notebook."""

import pytest

from automodel_conv.files.checkpoint_text import line_of, rows_of


def test_line_has_counts_size_and_path():
    assert line_of("/models/a", ["1", "2"], [24, 976]) == "<Checkpoint: 2 tensors, 1.0 kB in 2 files, /models/a>"


@pytest.mark.parametrize("path", ["/a" * 500, "\x1b[2J" * 50, "a\nb"])
def test_line_is_short_and_safe_to_print(path):
    line = line_of(path, [""] * 1000, [1 << 50] * 100_000)
    assert len(line) <= 200
    assert line.isprintable()
    assert (".../a/a" in line) == (len(path) == 1000)


def test_rows_have_the_tensors_of_each_dtype_largest_first():
    rows = rows_of("/models/a", ["1"], ["F32", "BF16", "BF16"], [4, 100, 20], ["nemo"], 3)
    assert rows == [
        ("path", "/models/a"),
        ("files", "1"),
        ("tensors", "3"),
        ("size", "124 bytes"),
        ("tensors of BF16", "2, 120 bytes"),
        ("tensors of F32", "1, 4 bytes"),
        ("layout of experts", "nemo"),
        ("tensors that the index leaves out", "3"),
    ]


def test_rows_of_nothing_are_counts():
    assert rows_of("/a", [], [], [], [], 0) == [("path", "/a"), ("files", "0"), ("tensors", "0"), ("size", "0 bytes")]
