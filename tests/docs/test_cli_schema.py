"""Tests of the page about JSON: the committed schema is current, and each object and exit code has its place."""

import json
import re

import pytest

from automodel_conv.cli.results.schema import RESULTS, schema, schema_text
from docs.extend.cli_schema import FILE, fields_of
from tests.docs.running import ROOT

PAGE = (ROOT / "docs" / "cli-json.md").read_text(encoding="utf-8")
OBJECTS = schema()["$defs"]


def test_committed_schema_is_the_one_of_the_code():
    assert FILE.read_text(encoding="utf-8") == schema_text(), "do: python -m docs.extend.cli_schema"


def test_each_object_has_a_section_with_its_fields():
    named = re.findall(r"^### (\w+)\n\n.*?\n\n<!-- fields of (\w+) -->$", PAGE, re.MULTILINE | re.DOTALL)
    assert all(title == name for title, name in named)
    assert sorted(name for _, name in named) == sorted(OBJECTS)


def test_each_command_names_its_results():
    rows = dict(
        re.findall(r"^\| `([\w -]+)` \| (.*\[\w+\]\(#\w+\).*) \|$", PAGE.partition("## Results")[2], re.MULTILINE)
    )
    assert rows.keys() == RESULTS.keys()
    for command, kinds in RESULTS.items():
        assert re.findall(r"\[(\w+)\]", rows[command]) == [kind.__name__ for kind in kinds], command


@pytest.mark.parametrize("name", OBJECTS)
def test_table_has_a_row_for_each_field(name):
    rows = fields_of(name).splitlines()[2:]
    assert [row.split("`")[1] for row in rows] == [*OBJECTS[name]["properties"]]
    for link in re.findall(r"\(#(\w+)\)", fields_of(name)):
        assert link in {other.lower() for other in OBJECTS}


def test_types_are_phrases():
    table = fields_of("LoadResult")
    assert "| `tensors` | integer | Number of tensors that were loaded. |" in table
    assert "| `seconds` | object: string to number |" in table
    assert "| `pages` | [Pages](#pages) or null |" in table
    assert "| `mismatched_keys` | list of [Mismatch](#mismatch) |" in table
    assert '| `bound` | `"latency"` or `"link"` or `"machine"` |' in fields_of("RemoteBenchResult")


def test_filters_of_the_examples_name_fields_of_the_schema():
    fields = {field for part in OBJECTS.values() for field in part["properties"]} | {"result", "error", "command"}
    filters = re.findall(r"jq (?:-r )?'(.*)'", PAGE)
    assert len(filters) > 5
    phases = {"read"}
    for text in filters:
        assert {*re.findall(r"\.([a-z_]+)", text)} <= fields | phases, text


def test_schema_is_json():
    assert json.loads(FILE.read_text(encoding="utf-8"))["$id"].endswith("/cli-schema.json")
