"""Write the JSON Schema of what commands print with ``--json``; tables of its fields for the site.

    python -m docs.extend.cli_schema

``tests/docs/test_cli_schema.py`` compares the committed file with it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FILE = Path(__file__).parents[1] / "cli-schema.json"
_REFERENCE = "#/$defs/"


def fields_of(name: str) -> str:
    """Return a table of the fields of an object, in Markdown.

    The environment of the site has not what the package needs, so it is the committed file that is read.

    Args:
        name: its name in the schema, such as "LoadResult".
    """
    schema = json.loads(FILE.read_text(encoding="utf-8"))
    lines = ["| field | type | meaning |", "|---|---|---|"]
    for field, form in schema["$defs"][name]["properties"].items():
        lines.append(f"| `{field}` | {_type_of(form)} | {form.get('description', 'Names this form of the result.')} |")
    return "\n".join(lines)


def _type_of(form: dict[str, Any]) -> str:
    """Return the type of a value as a phrase, with links to the tables of other objects."""
    if "$ref" in form:
        name = form["$ref"].removeprefix(_REFERENCE)
        return f"[{name}](#{name.lower()})"
    if "anyOf" in form:
        return " or ".join(_type_of(kind) for kind in form["anyOf"])
    if "enum" in form:
        return " or ".join(f'`"{value}"`' for value in form["enum"])
    if form["type"] == "array":
        return f"list of {_type_of(form['items'])}"
    if form["type"] == "object":
        return f"object: string to {_type_of(form['additionalProperties'])}"
    return form["type"]


def main() -> None:
    """Write the schema."""
    from automodel_conv.cli.results.schema import schema_text

    FILE.write_text(schema_text(), encoding="utf-8")


if __name__ == "__main__":
    main()
