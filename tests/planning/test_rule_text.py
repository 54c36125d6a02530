"""Tests of the text of rules on several lines."""

import re

import pytest

from automodel_conv.planning.rule_text import rule_lines

COMPOSED = (
    "inverse of mlp.experts.*.gate_proj.weight + mlp.experts.*.up_proj.weight -> mlp.experts.gate_up_proj: "
    "MergeModulelist(dim=0), Concatenate(dim=1), then experts.gate_up_proj -> experts.gate_and_up_projs: "
    "E (g i) h -> E h (g i)"
)


def test_rule_that_fits_is_one_line():
    assert rule_lines(COMPOSED, len(COMPOSED)) == [COMPOSED]
    assert rule_lines("(name only)", 5) == ["(name only)"]


def test_sources_targets_and_operations_have_lines_of_their_own():
    assert rule_lines(COMPOSED, 60) == [
        "inverse of mlp.experts.*.gate_proj.weight",
        "  + mlp.experts.*.up_proj.weight",
        "  -> mlp.experts.gate_up_proj:",
        "     MergeModulelist(dim=0), Concatenate(dim=1)",
        "then experts.gate_up_proj",
        "  -> experts.gate_and_up_projs:",
        "     E (g i) h -> E h (g i)",
    ]


def test_operations_that_do_not_fit_have_lines_of_their_own():
    assert rule_lines(COMPOSED, 40)[3:5] == ["     MergeModulelist(dim=0),", "     Concatenate(dim=1)"]


def test_step_that_fits_is_one_line():
    assert rule_lines(COMPOSED, 90)[-1] == COMPOSED.split(", ")[-1]


@pytest.mark.parametrize("width", [1, 30, 60, 90])
def test_no_name_and_no_operation_is_left_out(width):
    def words(text):
        return re.split(r"[\s,]+", text)

    assert words(" ".join(rule_lines(COMPOSED, width))) == words(COMPOSED)
