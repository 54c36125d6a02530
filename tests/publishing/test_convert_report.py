"""Tests of the report of a conversion and of its text."""

import pytest

from automodel_conv.publishing.convert_report import ConvertReport, converted_rows

REPORT = ConvertReport(
    files=("model.safetensors",),
    bytes_written=3_000_000_000,
    files_resumed=2,
    carried=("extra",),
    left_out=(),
    unindexed=(),
    files_copied=("a", "b/c"),
    seconds=2.0,
    peak_extra_bytes=1 << 20,
)


def with_values(**values):
    return ConvertReport(**vars(REPORT) | values)


def test_speed_is_that_of_written_bytes():
    assert REPORT.gb_per_s == 1.5
    assert with_values(seconds=9.0, phases={"plan": 6.0, "write": 2.0, "verify": 1.0}).gb_per_s == 1.5


def test_phases_have_a_row_each():
    lines = str(with_values(phases={"plan": 6.0, "write": 2.0})).splitlines()
    assert [line.split()[-1] for line in lines if line.startswith("seconds")] == ["2.000", "6.000", "2.000"]
    assert "seconds: plan, with imports" in str(with_values(phases={"plan": 6.0}))


def test_text_has_a_line_for_each_row():
    lines = str(REPORT).splitlines()
    assert [line.split("  ")[0] for line in lines if not line.startswith(" ")] == [
        row.label for row in converted_rows(REPORT)
    ]
    assert "1.50 GB/s" in str(REPORT)


@pytest.mark.parametrize(
    ("values", "label"),
    [
        ({"was_complete": True}, "complete already"),
        ({"kept_codes": ("w",)}, "kept as codes"),
        ({"unindexed": (("w", "file"),)}, "unindexed"),
        ({"adapted": ("q_proj.weight",)}, "changed by the adapter"),
    ],
)
def test_rare_rows_are_there_only_if_they_apply(values, label):
    assert label not in str(REPORT)
    assert label in str(with_values(**values))
    assert all(name in str(with_values(**values)) for name in values.get("adapted", ()))
