"""Tests of the installed transformers, of any release: its rules are lowered, or reported as what a release adds."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("transformers", reason="reads the registry of transformers")

import transformers
from transformers import core_model_loading as core

from automodel_conv.planning.operations import OPERATIONS, NotLowerable
from automodel_conv.upstream.rules import RuleSet
from tests.planning import oracles

ROOT = Path(__file__).parents[2]
PINNED = re.findall(r"^transformers==(\S+)", (ROOT / "requirements-dev.txt").read_text(), re.MULTILINE)
OTHERS = re.findall(r"^OTHER_TRANSFORMERS := (.+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
TESTED = [*PINNED, *" ".join(OTHERS).split()]


class AnyConfig:
    """A config that has a value for every attribute."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return 4

    def get_text_config(self):
        return self


def unknown_operations():
    """Yield the operations of the installed release that are not lowered, whether or not a rule has them."""
    for name, value in vars(core).items():
        is_operation = isinstance(value, type) and issubclass(value, core.ConversionOps)
        if is_operation and value is not core.ConversionOps and name not in OPERATIONS:
            yield f"the operation {name} is not lowered"


def rules_left_to_transformers():
    """Yield the rules of the installed release that are not lowered, on loading or on saving, with the reasons."""
    for model_type, rules in oracles.registry().items():
        for rule in rules:
            for reverse in (False, True) if hasattr(rule, "operations") else ():
                try:
                    RuleSet([rule], SimpleNamespace(config=AnyConfig()), reverse=reverse).operations(0)
                except (NotLowerable, NotImplementedError) as error:
                    yield f"{model_type}, {'saving' if reverse else 'loading'}: {rule}: {error!r}"


def report(version):
    """Warn about all that is not lowered; raise AssertionError instead if the release is a tested one."""
    left = [*unknown_operations(), *rules_left_to_transformers()]
    assert not left or version not in TESTED
    for text in left:
        warnings.warn(f"transformers {version}: {text}", stacklevel=2)


def test_every_rule_of_the_installed_release_is_lowered_or_reported():
    report(transformers.__version__)


def test_new_release_is_reported_and_a_tested_one_fails(monkeypatch):
    class NewOperation(core.ConversionOps):
        def convert(self, *args, **kwargs):
            raise NotImplementedError

        @property
        def reverse_op(self):
            return self

    rule = core.WeightConverter("a", "b", operations=[NewOperation()])
    monkeypatch.setattr(oracles, "registry", lambda: {"toy": [rule]})
    monkeypatch.setattr(core, "NewOperation", NewOperation, raising=False)
    with pytest.warns(UserWarning, match="is not lowered|not a stock") as caught:
        report("99.0")
    texts = [str(warning.message) for warning in caught]
    assert texts[0] == "transformers 99.0: the operation NewOperation is not lowered"
    assert [text.partition(":")[2].split(":")[0] for text in texts[1:]] == [" toy, loading", " toy, saving"]
    with pytest.raises(AssertionError):
        report(TESTED[0])


def test_pages_name_the_tested_releases():
    for page in ("reliability.md", "how-it-works.md"):
        text = (ROOT / "docs" / page).read_text()
        assert [release for release in TESTED if release not in text] == [], page
