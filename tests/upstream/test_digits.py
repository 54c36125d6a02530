"""Tests of rules that read numbers, against the rules themselves over names with other numbers."""

import itertools
import re

import pytest

pytest.importorskip("transformers", reason="rules are objects of transformers")

from transformers.core_model_loading import WeightRenaming

from automodel_conv.upstream.digits import ANY_NAME, digit_pattern
from automodel_conv.upstream.rules import RuleSet

NUMBERS = ("0", "1", "3", "7", "9", "01", "10", "12", "30")
REPRESENTATIVE = "9700000"
"""Names are asked for with numbers of this length; see ``planning/resolve.py``."""
BLIND = [
    ("old", "new"),
    (r"layers\.(\d+)\.w", r"blocks.\1.w"),
    (r"\.w1\.", ".gate."),
    (r"layers\.\d*\.experts", "experts"),
]
LOOKING = [
    r"layers\.0\.",
    r"layers\.10\.",
    r"^layers\.0",
    r"layers\.1\d?\.",
    r"layers\.[0-3]\.",
    r"layers\.[13]0?\.",
    r"layers\.(?!0\.)",
    r"(?<=layers\.3)\.",
    r"layers\.0\.|experts\.7",
    r"layers\.0+1\.",
    r"layers\.0*1\.",
    r"layers\.[01]+\.",
    r"layers\.[01]{2}\.",
    r"layers\.(?:0|1)+\.",
    r"layers\.(?!(?:0|1)\.)",
    r"layers\.\x30\.",
]
LENGTHS = [r"layers\.\d\.", r"layers\.\d{2}\."]


def names(end):
    return [f"layers.{layer}.experts.{expert}.{end}" for layer, expert in itertools.product(NUMBERS, NUMBERS)]


def outcome(rule, name):
    """Return the renamed name, with every number of the name itself replaced."""
    return re.sub(r"(?<![A-Za-z_\d])\d+", lambda match: "#" * len(match[0]), RuleSet([rule]).rename(name)[0])


def treats_numbers_differently(rule, end):
    """Return whether names that differ only in numbers of the same length are renamed differently."""
    outcomes = {}
    for name in names(end):
        outcomes.setdefault(tuple(map(len, name.split("."))), set()).add(outcome(rule, name))
    return any(len(results) > 1 for results in outcomes.values())


@pytest.mark.parametrize(("source", "target"), BLIND)
def test_rules_that_treat_all_numbers_as_one_have_no_pattern(source, target):
    rule = WeightRenaming(source, target)
    assert digit_pattern(rule) is None
    assert not any(treats_numbers_differently(rule, end) for end in ("w", "w1.b", "old"))


@pytest.mark.parametrize("source", LOOKING)
def test_rules_that_read_a_number_match_every_number_in_its_place(source):
    rule = WeightRenaming(source, "renamed.")
    assert treats_numbers_differently(rule, "w")
    pattern = digit_pattern(rule)
    assert pattern.search(f"layers.{REPRESENTATIVE}.experts.{REPRESENTATIVE}.w")


@pytest.mark.parametrize("source", LENGTHS)
def test_rules_that_read_the_length_of_a_number_match_every_length(source):
    assert digit_pattern(WeightRenaming(source, "renamed.")).search(f"layers.{REPRESENTATIVE}.w")


@pytest.mark.parametrize("optional", ["0?", "0*", r"\d?", r"\d{0,2}", r"\d{,2}", "[0-3]?", "[^1]*", "0{0,1}"])
def test_a_number_that_may_be_absent_stays_optional(optional):
    pattern = digit_pattern(WeightRenaming(rf"block\.e{optional}\.0\.", "renamed."))
    assert pattern.search(f"block.e.{REPRESENTATIVE}.w")


@pytest.mark.parametrize("source", [r"layers\.[01]+\.", r"layers\.[0-9a-f]+\.", r"layers\.0+0+\.", r"layers\.(0|1)+\."])
def test_long_number_needs_no_exponential_time(source):
    pattern = digit_pattern(WeightRenaming(source, "renamed."))
    assert pattern is ANY_NAME or not pattern.search(f"layers.{'1' * 1000}x")


def test_pattern_widens_no_words():
    pattern = digit_pattern(WeightRenaming(r"layers\.0\.w1", "first"))
    assert pattern.search("layers.17.w1.b")
    assert not pattern.search("layers.17.w2.b")
    assert not pattern.search("blocks.0.w1")


def test_pattern_matches_behind_a_prefix():
    assert digit_pattern(WeightRenaming(r"^layers\.0", "first")).search("model.layers.7.w")


def test_rules_of_an_unknown_class_may_read_anything():
    class Own(WeightRenaming):
        def rename_source_key(self, name):
            return name, None

    assert digit_pattern(Own("a", "b")) is ANY_NAME
    assert digit_pattern(object()) is ANY_NAME


@pytest.mark.parametrize(("scope", "pattern"), [("model.layers.0", ANY_NAME), ("model.layers", None), ("", None)])
def test_scope_with_a_number_may_concern_any_name(scope, pattern):
    rule = WeightRenaming("a", "b")
    rule.scope_prefix = scope
    assert digit_pattern(rule) is pattern
