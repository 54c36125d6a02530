"""Tests of docstrings: every public name has an example, and every first line is a sentence that stands alone."""

import ast
import inspect
import re
from pathlib import Path

import pytest

import automodel_conv
from automodel_conv import conversion_mapping
from tests.house.public_api import VERBS, public_names
from tests.house.source_tree import SourceTree

PACKAGE = Path(automodel_conv.__file__).parent

CLAUSES = ("Of", "By", "What", "Whatever", "Whose")
"""Words that begin a clause that only makes sense with the sentence after it."""
# Code and these words contain periods that end no sentence.
_NO_END = re.compile(r"``[^`]*``|\.\.\.|\b(?:e\.g|i\.e|vs|etc)\.")
_END_OF_SENTENCE = re.compile(r"[.!?]\s")


def public():
    """Return every public function and class, by its import name."""
    names = {f"{automodel_conv.__name__}.{name}": getattr(automodel_conv, name) for name in automodel_conv.__all__}
    for name in public_names(conversion_mapping):
        if inspect.isfunction(value := getattr(conversion_mapping, name)):
            names[f"{conversion_mapping.__name__}.{name}"] = value
    return names


def breaches_of(text, name, path):
    """Yield the problems of the docstrings in a module."""
    tree = ast.parse(text)
    if tree.body and ast.get_docstring(tree) is None:
        yield f"{path}:1: the module has no docstring"
    for node in ast.walk(tree):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        docstring = ast.get_docstring(node)
        if docstring is None:
            continue
        line = docstring.partition("\n")[0]
        where = f"{path}:{node.body[0].lineno}: {getattr(node, 'name', name)}: {line}"
        if not line.endswith("."):
            yield f"{where}\n  do: end the first line with a period"
        elif _END_OF_SENTENCE.search(_NO_END.sub("", line)):
            yield f"{where}\n  do: one sentence in the first line, the others below an empty line"
        if line.partition(" ")[0] in CLAUSES:
            yield f"{where}\n  do: begin with a verb or a noun"


@pytest.mark.parametrize("name", public())
def test_every_public_name_has_an_example(name):
    docstring = inspect.getdoc(public()[name])
    assert docstring, f"{name} has no docstring"
    assert ">>> " in docstring, f"the docstring of {name} has no example. do: add a doctest of a few lines"


@pytest.fixture(scope="module")
def kernels():
    """Return the docstring of every function in the kernel modules, read as text; importing them needs Triton."""
    bodies = [ast.parse(path.read_text(encoding="utf-8")).body for path in (PACKAGE / "kernels").glob("*.py")]
    return {node.name: ast.get_docstring(node) for body in bodies for node in body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("verb", [verb for verbs in VERBS.values() for verb in verbs])
def test_every_verb_of_the_kernels_has_an_example(kernels, verb):
    assert kernels[verb], f"{verb} has no docstring"
    assert ">>> " in kernels[verb], f"the docstring of {verb} has no example. do: add a doctest of a few lines"


def test_first_lines_are_sentences_that_stand_alone():
    breaches = []
    for name, path in SourceTree(PACKAGE.parent, PACKAGE.name).modules.items():
        breaches += breaches_of(path.read_text(encoding="utf-8"), name, path.relative_to(PACKAGE.parent))
    assert not breaches, "\n".join([f"{len(breaches)} docstrings:", *breaches])


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("x = 1", "no docstring"),
        ('"""Of a plan."""', "begin with a verb"),
        ('"""Whatever it holds."""', "begin with a verb"),
        ('"""Read a file"""', "end the first line"),
        ('"""Read a file.\n\nMore.\n"""\nclass A:\n    """What it is."""', "A: What it is."),
        ('"""Read a file. Then close it."""', "one sentence"),
    ],
)
def test_breach_is_reported(text, problem):
    [breach] = breaches_of(text, "module", "module.py")
    assert problem in breach


@pytest.mark.parametrize(
    "text", ["", '"""Read ``model.safetensors`` (``a . b``) in 0.5 s, i.e. fast."""', '"""Offsets."""\ndef f(): pass']
)
def test_correct_docstring_passes(text):
    assert list(breaches_of(text, "module", "module.py")) == []
