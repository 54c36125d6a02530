"""Tests of the rules of the house: each is broken once, in a small tree of its own, and reports the place."""

import pytest

from tests.house import rules
from tests.house.rules import Storeys
from tests.house.source_tree import SourceTree

TABLE = """
| level | components | what | depends on |
|---|---|---|---|
| 6 | `cli/` | the command line | all |
| 5 | `__init__.py` | names | all |
| 4 | `loading.py`, `saving.py` | public functions (doors): arguments | plans |
| 3 | `schedule/`, `upstream/` | plans | shapes |
| 2 | `planning/` | plans | shapes |
| 1 | `files/` | files | bytes |
| 0 | `errors.py` | errors | nothing |

| another | table | of | no | concern |
"""
STOREYS = Storeys.read(TABLE)
SOUND = {
    "__init__.py": "from house.loading import load",
    "cli/app.py": "import house\nfrom house.loading import load",
    "loading.py": "from house.planning.plan import Plan\nfrom .files import system",
    "saving.py": "from house.schedule.host import schedule",
    "schedule/host.py": "import numpy\nfrom ..files import system\nfrom house.planning import plan\nsystem.IOV_MAX",
    "planning/plan.py": "import torch\nfrom house.files.checkpoint import Checkpoint",
    "planning/lower.py": "from .plan import Plan",
    "upstream/rules.py": "def ask():\n    import transformers\n\nfrom house.planning import plan",
    "files/system.py": "import os\nfrom house.errors import Error",
    "files/checkpoint.py": "from house.files import system",
    "errors.py": "",
}
PURE = {"planning/": set(), "schedule/": {"planning/"}}


def planted(folder, **files):
    """Return a sound tree with other text in some files, with ``__`` for ``/`` in their names."""
    changed = {f"{name.replace('__', '/')}.py": text for name, text in files.items()}
    for name, text in {**SOUND, **changed}.items():
        path = folder / "house" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return SourceTree(folder, "house")


def breaches(tree):
    """Return all breaches, by rule."""
    return {
        "circle of modules": rules.circles_of_modules(tree),
        "circle of rooms": rules.circles_of_rooms(tree),
        "table": rules.rooms_off_the_table(tree, STOREYS),
        "arrow": rules.arrows_up_or_across(tree, STOREYS),
        "door": rules.doors_on_doors(tree, STOREYS),
        "impure": rules.impure(tree, PURE, PURE),
        "transformers": rules.asks_transformers(tree, ["upstream/"]),
    }


def broken(tree):
    """Return the one breach of each broken rule."""
    errors = {rule: texts for rule, texts in breaches(tree).items() if texts}
    assert all(len(texts) == 1 for texts in errors.values()), errors
    return {rule: text for rule, (text,) in errors.items()}


def test_sound_tree_breaks_no_rule(tmp_path):
    assert broken(planted(tmp_path)) == {}


def test_table_is_read_from_the_top_down():
    assert STOREYS.levels[:3] == [["cli/"], ["__init__.py"], ["loading.py", "saving.py"]]
    assert STOREYS.levels[3:] == [["schedule/", "upstream/"], ["planning/"], ["files/"], ["errors.py"]]
    assert STOREYS.doors == ["loading.py", "saving.py"]
    with pytest.raises(ValueError, match="no table that begins with"):
        Storeys.read("| another | table |")


def test_circle_in_a_room_is_reported_with_all_imports(tmp_path):
    errors = broken(planted(tmp_path, planning__plan="import torch\nfrom house.planning.lower import lower"))
    assert errors.keys() == {"circle of modules"}
    error = errors["circle of modules"]
    assert "house.planning.lower -> house.planning.plan -> house.planning.lower" in error
    assert "house/planning/lower.py:1 imports house.planning.plan (Plan)" in error
    assert "house/planning/plan.py:2 imports house.planning.lower (lower)" in error
    assert "do: move what both need" in error


@pytest.mark.parametrize(
    "hidden",
    [
        "def late():\n    from house.planning.lower import lower",
        "def late():\n    from .lower import lower",
        "def late():\n    from . import lower",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import house.planning.lower",
        "import importlib\nimportlib.import_module('house.planning.lower')",
    ],
    ids=["in a function", "relative", "relative to the room", "for type checkers", "by name"],
)
def test_circle_is_found_with_every_kind_of_import(tmp_path, hidden):
    assert broken(planted(tmp_path, planning__plan=hidden)).keys() == {"circle of modules"}


def test_each_circle_is_reported_once(tmp_path):
    files = {
        "planning__plan": "from house.planning import lower",
        "files__system": "from house.files import checkpoint",
    }
    assert len(rules.circles_of_modules(planted(tmp_path, **files))) == 2


def test_circle_of_rooms_needs_no_circle_of_modules(tmp_path):
    errors = broken(planted(tmp_path, files__room="from house.planning import lower"))
    assert errors.keys() == {"circle of rooms", "arrow"}
    assert "files/ -> planning/ -> files/" in errors["circle of rooms"]
    assert "house/files/room.py:1 imports house.planning.lower" in errors["circle of rooms"]


def test_arrow_up_is_reported(tmp_path):
    errors = broken(planted(tmp_path, errors="x = 1\n\ndef late():\n    from house.upstream.rules import ask"))
    assert "an arrow from errors.py up to upstream/" in errors["arrow"]
    assert "house/errors.py:4 imports house.upstream.rules (ask)" in errors["arrow"]
    assert "do: move what it imports below errors.py" in errors["arrow"]


def test_arrow_between_rooms_of_one_level_is_reported(tmp_path):
    errors = broken(planted(tmp_path, upstream__late="def late():\n    from ..schedule import host"))
    assert errors.keys() == {"arrow"}
    assert "an arrow from upstream/ across to schedule/" in errors["arrow"]
    assert "house/upstream/late.py:2 imports house.schedule.host" in errors["arrow"]


def test_door_that_imports_a_door_is_reported(tmp_path):
    errors = broken(planted(tmp_path, saving="def save():\n    from house.loading import load"))
    assert errors.keys() == {"arrow", "door"}
    assert "house/saving.py:2 imports house.loading (load)" in errors["door"]


def test_unlisted_room_and_missing_room_are_reported(tmp_path):
    tree = planted(tmp_path, attic__box="")
    (tmp_path / "house" / "saving.py").unlink()
    absent, gone = rules.rooms_off_the_table(SourceTree(tmp_path, "house"), STOREYS)
    assert tree.room("house.attic.box") == "attic/"
    assert absent.startswith("attic/ is not in CONTRIBUTING's levels")
    assert gone.startswith("saving.py of CONTRIBUTING's levels does not exist")
    again = STOREYS._replace(levels=[*STOREYS.levels, ["files/", "attic/", "saving.py"]])
    assert [text.split(" is ")[0] for text in rules.rooms_off_the_table(tree, again)] == ["files/", "saving.py"]


@pytest.mark.parametrize(
    ("text", "text_of_import"),
    [
        ("import os", "imports os"),
        ("from os import path", "imports os (path)"),
        ("def late():\n    from safetensors import safe_open", "imports safetensors (safe_open)"),
        ("from house.files import system\nsystem.open_readonly('a')", "imports house.files.system (open_readonly)"),
        ("from house.files.system import preadv", "imports house.files.system (preadv)"),
        ("text = open('a').read()", "house/planning/late.py:1"),
    ],
)
def test_file_access_in_a_pure_room_is_reported(tmp_path, text, text_of_import):
    errors = broken(planted(tmp_path, planning__late=text))
    assert errors.keys() == {"impure"}
    assert text_of_import in errors["impure"]


def test_pure_room_uses_only_the_rooms_that_it_may(tmp_path):
    tree = planted(tmp_path, schedule__late="from house.errors import Error")
    assert "house/schedule/late.py:1 imports house.errors (Error)" in broken(tree)["impure"]
    assert rules.impure(tree, PURE, {**PURE, "schedule/": {"planning/", "errors.py"}}) == []


def test_extra_refused_package_in_a_pure_room_is_reported(tmp_path):
    [error] = rules.impure(planted(tmp_path), ["schedule/"], PURE, more=["numpy"])
    assert "house/schedule/host.py:1 imports numpy" in error


def test_import_of_transformers_elsewhere_is_reported(tmp_path):
    errors = broken(planted(tmp_path, saving="def save():\n    from transformers.core import convert"))
    assert errors.keys() == {"transformers"}
    assert "house/saving.py:2 imports transformers.core (convert)" in errors["transformers"]
