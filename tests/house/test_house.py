"""Tests of the house: no circles, each storey imports only those below it, and pure rooms stay pure.

``CONTRIBUTING.md`` has the table of the storeys, which is read here. All imports count: relative ones, those inside
functions, and those for type checkers.
"""

import re
from pathlib import Path

import pytest

import automodel_conv
from tests.house import rules
from tests.house.rules import Storeys
from tests.house.source_tree import SourceTree

PACKAGE = Path(automodel_conv.__file__).parent
ROOT = PACKAGE.parent
CONTRIBUTING = Path(__file__).parent.parent.parent / "CONTRIBUTING.md"

LOWEST = {"errors.py", "dtypes.py"}
PURE = {"planning/": {"pictures/", *LOWEST}, "schedule/": {"planning/", *LOWEST}}
# Recipes and rule queries return transformers' own objects, and the demo compares with its loader.
ASK_TRANSFORMERS = ("upstream/", "integrations/", "recipes/", "conversion_mapping.py", "cli/")


@pytest.fixture(scope="module")
def tree():
    return SourceTree(ROOT, PACKAGE.name)


@pytest.fixture(scope="module")
def storeys():
    return Storeys.read(CONTRIBUTING.read_text(encoding="utf-8"))


def refuse(breaches):
    assert not breaches, "\n\n".join(["", *breaches])


def test_all_modules_are_seen_with_the_kernels(tree):
    assert {"automodel_conv", "automodel_conv.loading", "automodel_conv.kernels.transpose"} <= tree.modules.keys()
    assert {"__init__.py", "loading.py", "planning/", "kernels/"} <= tree.rooms
    assert len(tree.inside) > len(tree.modules)


def test_no_circle_among_modules(tree):
    refuse(rules.circles_of_modules(tree))


def test_no_circle_among_rooms(tree):
    refuse(rules.circles_of_rooms(tree))


def test_every_room_is_in_the_table(tree, storeys):
    refuse(rules.rooms_off_the_table(tree, storeys))


def test_room_uses_rooms_below_it_only(tree, storeys):
    refuse(rules.arrows_up_or_across(tree, storeys))


def test_no_door_uses_a_door(tree, storeys):
    public = {home.removeprefix("automodel_conv.") for home in automodel_conv._DEFINED_IN}
    assert {f"{home}.py" for home in public if "." not in home} - {"errors.py"} == {*storeys.doors}
    refuse(rules.doors_on_doors(tree, storeys))


def test_planning_and_schedules_open_no_files_and_use_no_models(tree):
    refuse(rules.impure(tree, PURE, PURE))


def test_schedules_are_built_without_torch(tree):
    refuse(rules.impure(tree, ["schedule/"], PURE, more=["torch"]))


def test_transformers_is_imported_in_few_rooms(tree):
    refuse(rules.asks_transformers(tree, ASK_TRANSFORMERS))


def test_drawings_name_existing_modules():
    named = re.findall(r"--([a-z_]+(?:/[a-z_]+)*)-+>", CONTRIBUTING.read_text(encoding="utf-8"))
    assert len(named) > 10
    absent = [name for name in named if not (PACKAGE / f"{name}.py").is_file()]
    assert not absent, f"CONTRIBUTING's drawings name modules that do not exist: {absent}. do: correct the names"
