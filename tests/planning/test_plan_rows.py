"""Tests of the rows of a plan's summary."""

from automodel_conv.planning.copies import Target
from automodel_conv.planning.plan_rows import RuleRow, rows_by_rule


def target(name, rule, sources=(0,), numel=1):
    return Target(name, "F32", (numel,), rule, sources, ())


def test_targets_are_counted_by_rule_and_by_execution_and_most_bytes_come_first():
    targets = [
        target("a", -1),
        target("b", 0, (0, 1), 5),
        target("c", 0, (1,), 7),
        target("d", 0, (2,), 100),
        target("e", 1, ()),
        target("f", -1, (3,), 0),
    ]
    rows = rows_by_rule(targets, ["x -> y", "z"], lambda target: "cast" if target.name == "d" else "read")
    assert rows == [
        RuleRow("x -> y", "cast", 1, 1, 400),
        RuleRow("x -> y", "read", 2, 3, 48),
        RuleRow(None, "read", 2, 2, 4),
        RuleRow("z", "read", 1, 0, 4),
    ]


def test_plan_without_targets_has_no_rows():
    assert rows_by_rule([], ["x"], lambda target: "read") == []
