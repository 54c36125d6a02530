"""Tests of the page of errors: an entry for each class, and titles that are the words of real messages."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

import pytest

from automodel_conv import errors
from tests.docs.running import ROOT

PAGE = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
CLASSES = [c.__name__ for c in vars(errors).values() if isinstance(c, type) and issubclass(c, Exception)]
_CODE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
VARIABLE = "..."
"""Any value, in a title and in the text of a message."""


def titles_by_section(page: str) -> dict[str, list[str]]:
    """Return the titles of the third level, by the title of the second level above them."""
    sections: dict[str, list[str]] = {}
    for level, title in re.findall(r"^(##|###) (.*)$", _CODE.sub("", page), re.MULTILINE):
        if level == "##":
            sections[title] = []
        else:
            sections[next(reversed(sections))].append(title)
    return sections


SECTIONS = titles_by_section(PAGE)


def messages() -> list[str]:
    """Return all texts in the code of the package, with ``VARIABLE`` for each expression in them."""
    files = sorted((ROOT / "automodel_conv").rglob("*.py"))
    return [text for file in files for text in _texts(ast.parse(file.read_text(encoding="utf-8")))]


def _texts(tree: ast.AST) -> Iterator[str]:
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(p.value) if isinstance(p, ast.Constant) else VARIABLE for p in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.value


def begins(message: str, title: str) -> bool:
    """Return whether a message begins with the words of a title."""
    return message.startswith(title) and not message[len(title) :][:1].isalnum()


@pytest.mark.parametrize("name", CLASSES)
def test_each_class_has_an_entry_at_the_address_that_its_errors_print(name):
    assert name in SECTIONS, f"docs/errors.md has no section {name}"
    assert SECTIONS[name], f"the section {name} has no message"


def test_each_title_of_a_class_is_the_beginning_of_a_message_of_the_package():
    texts = messages()
    titles = [title for name in CLASSES for title in SECTIONS.get(name, [])]
    unknown = [title for title in titles if not any(begins(text, title) for text in texts)]
    assert not unknown, f"no error of the package begins so: {unknown}"


def test_no_message_has_two_entries():
    titles = [title for section in SECTIONS.values() for title in section]
    assert len(titles) == len(set(titles))


@pytest.mark.parametrize(
    ("message", "title", "is_its_title"),
    [
        ("a file is truncated", "a file is truncated", True),
        ("... of ... files are missing", "... of ... files", True),
        ("unknown layout ...", "unknown layout", True),
        ("unknown layouts", "unknown layout", False),
        ("there is an unknown layout", "unknown layout", False),
        ("a file is truncated", "a file was truncated", False),
    ],
)
def test_title_is_compared_with_the_beginning_of_a_message(message, title, is_its_title):
    assert begins(message, title) is is_its_title
