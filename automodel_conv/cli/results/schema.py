"""The envelope of all results, and its JSON Schema."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

import automodel_conv
from automodel_conv.cli.results.adapters import AdapterConverted, Inspected
from automodel_conv.cli.results.benches import Demo, LocalBench, RemoteBenchResult
from automodel_conv.cli.results.conversions import Converted, DryRun
from automodel_conv.cli.results.failures import Failure
from automodel_conv.cli.results.loads import ComparedWithChecksums, ComparedWithSource, LoadResult
from automodel_conv.cli.results.plans import PlanResult
from automodel_conv.cli.results.refits import RefitPlanned
from automodel_conv.cli.results.result import Result
from automodel_conv.doors import key_docs
from automodel_conv.errors import DOCUMENTATION

SCHEMA_VERSION = 1
"""Version of the schema. It changes if a field is removed, or gets another type or meaning."""
RESULTS: Mapping[str, tuple[type[Result], ...]] = {
    "plan": (PlanResult,),
    "load": (LoadResult,),
    "convert": (Converted, DryRun),
    "verify": (ComparedWithSource, ComparedWithChecksums),
    "adapter convert": (AdapterConverted,),
    "adapter merge": (Converted,),
    "adapter inspect": (Inspected,),
    "refit-plan": (RefitPlanned,),
    "bench": (LocalBench, RemoteBenchResult),
    "demo": (Demo,),
}
"""The results that each command may have."""

_REFERENCE = "#/$defs/{name}"


def envelope(command: str | None, **content: Any) -> str:
    """Return one line of JSON with a result or an error, in ASCII.

    Args:
        command: name of the command; None if the arguments name none.
        **content: ``result``, a ``Result``, or ``error``, a ``Failure``.
    """
    value = {
        "schema_version": SCHEMA_VERSION,
        "command": command,
        "automodel_conv": automodel_conv.__version__,
        **content,
    }
    # Not ``msgspec.json.encode``: it refuses names of files that are not UTF-8.
    return json.dumps(msgspec.to_builtins(value, str_keys=True), allow_nan=False)


def schema() -> dict[str, Any]:
    """Return the JSON Schema of what commands print with ``--json``."""
    kinds = [*dict.fromkeys(kind for kinds in RESULTS.values() for kind in kinds), Failure]
    _, components = msgspec.json.schema_components(kinds, ref_template=_REFERENCE)
    for kind in _with_parts(kinds):
        texts = key_docs(kind)
        for name, field in components[kind.__name__]["properties"].items():
            if name in texts:
                field["description"] = texts[name]
    answers = [_answer({"const": command}, "result", _one_of(kinds)) for command, kinds in RESULTS.items()]
    answers.append(_answer({"enum": [*RESULTS, None]}, "error", _one_of((Failure,))))
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": f"{DOCUMENTATION}cli-schema.json",
        "title": "What automodel-conv prints with --json",
        "oneOf": answers,
        "$defs": dict(sorted(components.items())),
    }


def schema_text() -> str:
    """Return the schema as it is in ``docs/cli-schema.json``."""
    return json.dumps(schema(), indent=2) + "\n"


def _with_parts(kinds: list[Any]) -> Iterator[Any]:
    """Yield classes and the classes of their fields."""
    for info in msgspec.inspect.multi_type_info(kinds):
        yield from _structs(info)


def _structs(info: Any) -> Iterator[Any]:
    if isinstance(info, msgspec.inspect.StructType):
        yield info.cls
        for field in info.fields:
            yield from _structs(field.type)
    for name in ("item_type", "key_type", "value_type"):
        if hasattr(info, name):
            yield from _structs(getattr(info, name))
    for part in getattr(info, "types", ()):
        yield from _structs(part)


def _one_of(kinds: tuple[type[msgspec.Struct], ...]) -> dict[str, Any]:
    references = [{"$ref": _REFERENCE.format(name=kind.__name__)} for kind in kinds]
    return references[0] if len(references) == 1 else {"oneOf": references}


def _answer(command: dict[str, Any], key: str, content: dict[str, Any]) -> dict[str, Any]:
    properties = {
        "schema_version": {"const": SCHEMA_VERSION},
        "command": command,
        "automodel_conv": {"type": "string"},
        key: content,
    }
    return {"type": "object", "properties": properties, "required": [*properties]}
