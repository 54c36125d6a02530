"""Rules that look at numbers, against the rules themselves over names with other numbers."""

import itertools
import re

import pytest

pytest.importorskip("transformers", reason="rules are transformers' own objects")

from transformers.core_model_loading import WeightRenaming

from automodel_conv.upstream.digits import ANY_NAME, digit_pattern
from automodel_conv.upstream.rules import RuleSet

NUMBERS = ("0", "1", "3", "7", "9", "10", "12", "30")
RENAMES = [
    ("old", "new"),
    (r"layers\.(\d+)\.w", r"blocks.\1.w"),
    (r"\.w1\.", ".gate."),
    (r"layers\.0\.", "first."),
    (r"layers\.10\.", "tenth."),
    (r"^layers\.0", "first"),
    (r"layers\.\d\.", "digit."),
    (r"layers\.[0-3]\.", "low."),
    (r"layers\.[13]0?\.", "odd."),
    (r"layers\.\d{2}\.", "two."),
    (r"layers\.(?!0\.)", "later."),
    (r"(?<=layers\.3)\.", ".third."),
    (r"layers\.0\.|experts\.7", "either"),
]


def outcome(rule, name):
    """The renamed name with every number of the name itself replaced."""
    return re.sub(r"(?<![A-Za-z_\d])\d+", lambda match: "#" * len(match[0]), RuleSet([rule]).rename(name)[0])


@pytest.mark.parametrize(("source", "target"), RENAMES)
def test_names_that_the_pattern_does_not_match_are_treated_as_one(source, target):
    rule = WeightRenaming(source, target)
    pattern = digit_pattern(rule)
    outcomes = {}
    for layer, expert, end in itertools.product(NUMBERS, NUMBERS, ("w", "w1.b", "old")):
        name = f"layers.{layer}.experts.{expert}.{end}"
        if pattern is None or not pattern.search(name):
            outcomes.setdefault((len(layer), len(expert), end), set()).add(outcome(rule, name))
    assert all(len(results) == 1 for results in outcomes.values()), outcomes


@pytest.mark.parametrize("number", range(3))
def test_rules_that_look_at_no_number_have_no_pattern(number):
    assert digit_pattern(WeightRenaming(*RENAMES[number])) is None


@pytest.mark.parametrize("number", range(3, len(RENAMES)))
def test_rules_that_look_at_a_number_match_every_other_number_there(number):
    pattern = digit_pattern(WeightRenaming(*RENAMES[number]))
    assert pattern is not None
    assert all(pattern.search(f"layers.{layer}.experts.{layer}.w") for layer in ("0", "3", "9"))


def test_a_pattern_widens_no_words():
    pattern = digit_pattern(WeightRenaming(r"layers\.0\.w1", "first"))
    assert pattern.search("layers.17.w1.b")
    assert not pattern.search("layers.17.w2.b")
    assert not pattern.search("blocks.0.w1")


def test_rules_of_an_unknown_class_may_look_at_anything():
    class Own(WeightRenaming):
        def rename_source_key(self, name):
            return name, None

    assert digit_pattern(Own("a", "b")) is ANY_NAME
    assert digit_pattern(object()) is ANY_NAME


@pytest.mark.parametrize(("scope", "pattern"), [("model.layers.0", ANY_NAME), ("model.layers", None), ("", None)])
def test_a_scope_with_a_number_may_concern_any_name(scope, pattern):
    rule = WeightRenaming("a", "b")
    rule.scope_prefix = scope
    assert digit_pattern(rule) is pattern
