"""Tests of the table of recipes."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers", reason="recipes return transformers' rule objects")

import transformers

import automodel_conv as amc
from automodel_conv import recipes
from automodel_conv.recipes import RECIPES


@pytest.mark.parametrize("model_type", RECIPES)
def test_recipes_are_for_types_that_transformers_does_not_have(model_type):
    assert model_type not in transformers.CONFIG_MAPPING, f"do: remove {model_type} if transformers loads it"


def test_every_recipe_has_a_type_and_a_public_name():
    assert {recipe.__name__ for recipe in RECIPES.values()} == {*recipes.__all__} - {"RECIPES", "grouped_experts"}
    assert all(getattr(amc.recipes, recipe.__name__) is recipe for recipe in RECIPES.values())


@pytest.mark.parametrize("recipe", dict.fromkeys(RECIPES.values()), ids=lambda recipe: recipe.__name__)
def test_each_call_returns_rules_of_its_own(recipe):
    first, second = recipe(), recipe()
    assert len(first) == len(second)
    assert not {id(rule) for rule in first} & {id(rule) for rule in second}
