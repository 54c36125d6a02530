"""Tests of the tests: every module has a test file of its name, or is in a short table of exceptions.

``automodel_conv/<room>/<module>.py`` is tested by ``test_<module>.py`` in ``tests/<room>`` or a folder in it. Modules
outside of rooms have their file anywhere in ``tests``.
"""

from pathlib import Path, PurePosixPath

import pytest

import automodel_conv

PACKAGE = Path(automodel_conv.__file__).parent
TESTS = Path(__file__).parent.parent

ELSEWHERE = {
    "compiling/options": "doors/test_load_options.py",
    "planning/methods/awq": "planning/test_methods.py",
    "planning/methods/compressed_tensors": "planning/test_methods.py",
    "planning/methods/fbgemm_fp8": "planning/test_methods.py",
    "planning/methods/fp8": "planning/test_methods.py",
    "planning/methods/fp8_with_modelopt": "planning/test_methods.py",
    "planning/methods/gptq": "planning/test_methods.py",
    "planning/methods/inkling2_loop": "quantized/test_inkling2_loop.py",
    "planning/methods/method": "planning/test_methods.py",
    "planning/methods/modelopt": "planning/test_methods.py",
    "planning/methods/mxfp4": "planning/test_methods.py",
    "planning/methods/quark": "planning/test_methods.py",
    "planning/methods/table": "planning/test_methods.py",
    "planning/rules": "upstream/test_rules.py",
    "planning/wanted": "planning/test_compiler.py",
}
"""Test file of each module without its own: modules of types, tables and data."""


def modules():
    """Return the names of all modules, such as ``planning/axes``; the folder of the kernels is a link."""
    files = [*PACKAGE.rglob("*.py"), *(PACKAGE / "kernels").glob("*.py")]
    names = {file.relative_to(PACKAGE).with_suffix("").as_posix() for file in files}
    return sorted(name for name in names if not name.endswith("__"))


def tested(all_modules, files):
    """Return the modules that have a test file of their own among ``files``, which are relative to the tests folder."""
    own = {(room, PurePosixPath(file).stem) for file in files for room in (file.partition("/")[0], "")}
    return {module for module in all_modules if (_room(module), f"test_{PurePosixPath(module).name}") in own}


def _room(module):
    return module.partition("/")[0] if "/" in module else ""


def own_files():
    return [file.relative_to(TESTS).as_posix() for file in TESTS.rglob("test_*.py")]


def test_all_rooms_are_seen():
    assert {"loading", "planning/axes", "planning/methods/fp8", "kernels/transpose"} <= set(modules())


def test_every_module_has_a_test_file_of_its_name():
    missing = sorted({*modules()} - tested(modules(), own_files()) - ELSEWHERE.keys())
    assert not missing, f"modules without a test file: {missing}. do: add test_<module>.py to the folder of the room"


def test_exceptions_are_modules_without_a_file_of_their_own():
    needless = sorted(ELSEWHERE.keys() & tested(modules(), own_files()) | ELSEWHERE.keys() - {*modules()})
    assert not needless, f"exceptions that are not needed: {needless}. do: remove them from ELSEWHERE"


@pytest.mark.parametrize(("module", "file"), ELSEWHERE.items())
def test_exceptions_are_tested_where_the_table_says(module, file):
    text = (TESTS / file).read_text(encoding="utf-8")
    assert "def test_" in text, f"{file} has no tests, and should have those of {module}"


@pytest.mark.parametrize(
    ("all_modules", "files", "missing"),
    [
        (["a/one"], ["a/test_one.py"], set()),
        (["a/b/one"], ["a/c/test_one.py"], set()),
        (["one"], ["test_one.py"], set()),
        (["one"], ["doors/test_one.py"], set()),
        (["a/one"], ["a/test_ones.py"], {"a/one"}),
        (["a/one"], ["b/test_one.py"], {"a/one"}),
        (["a/one"], ["test_one.py"], {"a/one"}),
        (["a/one", "b/one"], ["a/test_one.py"], {"b/one"}),
    ],
    ids=str,
)
def test_file_counts_for_the_module_of_its_name_and_room(all_modules, files, missing):
    assert {*all_modules} - tested(all_modules, files) == missing
