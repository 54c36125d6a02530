"""Tests of the documentation as a whole: each public name has an entry, each page is in the navigation."""

import re
from importlib import import_module

import pytest
import yaml

import automodel_conv
from tests.docs.running import ROOT
from tests.house.public_api import MODULES, VERBS, public_names

DOCS = ROOT / "docs"
README_WORDS = 900
# Types that public functions accept or return, but that callers do not import.
TYPES = {
    "automodel_conv.execution.page_policy.PageUse",
    "automodel_conv.execution.report.LoadedStateDict",
    "automodel_conv.execution.timeline.Span",
    "automodel_conv.execution.timeline.Timeline",
    "automodel_conv.files.remote.connections.Traffic",
    "automodel_conv.in_memory.ConvertedStateDict",
    "automodel_conv.in_memory.StateDictReport",
    "automodel_conv.integrations.hooked_load.HookedLoad",
    "automodel_conv.integrations.transformers.Acceleration",
    "automodel_conv.kernels.address_table.Matrices",
    "automodel_conv.kernels.address_table.Operand",
}
# A function that a page uses and that has no public name.
HELPERS = {"automodel_conv.planning.sharding.placed"}
_ENTRY = re.compile(r"^::: ([\w.]+)$", re.MULTILINE)
_LINK = re.compile(r"\]\(([^)\s]+)|\b(?:src|srcset|href)=\"([^\"]+)")


class _Tolerant(yaml.SafeLoader):
    """A loader that reads ``!ENV`` and ``!!python`` tags of mkdocs.yml as None."""


_Tolerant.add_multi_constructor("", lambda loader, suffix, node: None)


def public():
    """Return every public name, as callers import it."""
    names = {f"automodel_conv.{name}" for name in automodel_conv.__all__}
    for module, verbs in VERBS.items():
        names |= {f"automodel_conv.kernels.{module}.{verb}" for verb in verbs}
    for module in MODULES:
        own = {f"{module}.{name}" for name in public_names(import_module(module))}
        names |= own - {f"{module}.{name}" for name in automodel_conv.__all__ if module.endswith("conversion_mapping")}
    return sorted(names)


def entries():
    return {name for page in (DOCS / "reference").glob("*.md") for name in _ENTRY.findall(page.read_text("utf-8"))}


@pytest.mark.parametrize("name", public())
def test_public_name_has_an_entry_in_the_reference(name):
    assert name in entries(), f"do: add '::: {name}' to a page of docs/reference"


def test_entries_of_the_reference_are_public_names_their_types_and_helpers():
    assert entries() == {*public()} | TYPES | HELPERS


def pages_in(nav):
    """Yield the pages of a navigation, which may be nested."""
    for entry in nav:
        values = entry.values() if isinstance(entry, dict) else [entry]
        for value in values:
            yield from [value] if isinstance(value, str) else pages_in(value)


def test_every_page_is_in_the_navigation_once():
    nav = yaml.load((ROOT / "mkdocs.yml").read_text("utf-8"), _Tolerant)["nav"]
    assert sorted(pages_in(nav)) == sorted(page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md"))


def test_glossary_defines_each_word_once():
    rows = re.findall(r"^\| (.+?) \| (.+) \|$", (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8"), re.M)
    words = [word for word, meaning in rows if meaning != "meaning"]
    assert sorted(words) == sorted(set(words))


def test_readme_is_short():
    words = len((ROOT / "README.md").read_text("utf-8").split())
    assert words <= README_WORDS, f"README.md has {words} words. do: move text to docs/"


def test_links_of_the_readme_work_on_pypi():
    """PyPI shows README.md without the other files of the repository."""
    links = [link[1] or link[2] for link in _LINK.finditer((ROOT / "README.md").read_text("utf-8"))]
    relative = [link for link in links if not link.startswith(("https://", "#"))]
    assert links
    assert not relative, "do: write absolute links"
