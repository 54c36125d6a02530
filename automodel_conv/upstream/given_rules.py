"""Read the rules that a caller gives: rule objects of transformers, and nothing that only looks like their name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from automodel_conv.errors import UnsupportedError, kind_of, message
from automodel_conv.recipes import RECIPES
from automodel_conv.upstream.registry import transformers_available


def given_rules(rules: Iterable[Any] | None) -> list[Any] | None:
    """Return the rules as a list; None as it is.

    Raises:
        UnsupportedError: something else is given, such as the name of a model type; advises the rules of a similar one.
    """
    if rules is None:
        return None
    is_list = isinstance(rules, Iterable) and not isinstance(rules, str | bytes | Mapping)
    listed = list(rules) if is_list else []
    others = [rule for rule in listed if not hasattr(rule, "source_patterns")]
    if is_list and not others:
        return listed
    wrong = others[0] if others else rules
    raise UnsupportedError(
        message(
            "rules= are not rules of transformers",
            expected="a list of WeightRenaming and WeightConverter objects; [] to keep all names; None for the model's",
            found=repr(wrong) if isinstance(wrong, str) else kind_of(wrong),
            do=_advice(wrong),
        )
    )


def _advice(given: object) -> str | None:
    """Return the advice for a name, or for names that are to be replaced; None for anything else."""
    if isinstance(given, Mapping):
        return "pass {key_mapping=}, which takes a dict of patterns and replacements"
    if not isinstance(given, str):
        return None
    similar = difflib.get_close_matches(given.lower().replace("-", "_"), [*RECIPES, *_types_with_rules()], 1)
    if not similar:
        return None
    [name] = similar
    if name in RECIPES:
        return f"pass {{rules=automodel_conv.recipes.{RECIPES[name].__name__}()}}"
    return f'pass {{rules=automodel_conv.get_checkpoint_conversion_mapping("{name}")}}'


def _types_with_rules() -> list[str]:
    """Return the model types that transformers has rules for."""
    if not transformers_available():
        return []
    from transformers import CONFIG_MAPPING
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    return [name for name in CONFIG_MAPPING if get_checkpoint_conversion_mapping(name)]
