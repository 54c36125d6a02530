"""Helpers that read what commands print with ``--json``, and compare it with the committed schema."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema

import automodel_conv

ROOT = Path(automodel_conv.__file__).parent.parent
SCHEMA = json.loads((ROOT / "docs" / "cli-schema.json").read_text(encoding="utf-8"))
PROGRAM = ("-m", "automodel_conv")


def closed(part: Any) -> Any:
    """Return a schema that refuses fields that it does not name, which programs only ignore."""
    if isinstance(part, list):
        return [closed(item) for item in part]
    if not isinstance(part, dict):
        return part
    value = {name: closed(item) for name, item in part.items()}
    return {**value, "additionalProperties": False} if part.get("type") == "object" and "properties" in part else value


VALIDATOR = jsonschema.Draft202012Validator(closed(SCHEMA))


def answer(stdout: str) -> dict[str, Any]:
    """Return the object that a command printed: one line, as the schema states, and nothing else."""
    assert stdout.endswith("\n")
    assert stdout.count("\n") == 1
    assert stdout.isascii()
    value = json.loads(stdout, parse_constant=lambda name: {"not in JSON": name})
    VALIDATOR.validate(value)
    return value


def process(*arguments: object, program: tuple[str, ...] = PROGRAM, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own."""
    command = [sys.executable, *program, *map(str, arguments)]
    return subprocess.run(command, **{"capture_output": True, "text": True, "cwd": ROOT, **options})
