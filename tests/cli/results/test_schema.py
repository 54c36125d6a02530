"""Tests of the envelope and of its JSON Schema."""

import json

import jsonschema
import msgspec
import pytest

from automodel_conv.cli.results.failures import interruption
from automodel_conv.cli.results.loads import ComparedWithChecksums
from automodel_conv.cli.results.plans import Constant
from automodel_conv.cli.results.result import Result
from automodel_conv.cli.results.schema import RESULTS, envelope, schema, schema_text

SCHEMA = schema()
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)
GOOD = {
    "schema_version": 1,
    "command": "verify",
    "automodel_conv": "1",
    "result": {"kind": "checksums", "tensors": 1, "nbytes": 2},
}


def test_schema_is_valid():
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    assert json.loads(schema_text()) == SCHEMA


def test_envelopes_follow_it():
    for text in (envelope("verify", result=ComparedWithChecksums(1, 2)), envelope(None, error=interruption())):
        VALIDATOR.validate(json.loads(text))
    VALIDATOR.validate(GOOD)


def test_fields_of_later_releases_are_allowed():
    VALIDATOR.validate({**GOOD, "more": 1, "result": {**GOOD["result"], "more": 2}})


@pytest.mark.parametrize(
    "change",
    [
        {"schema_version": 2},
        {"command": "load"},
        {"command": None},
        {"result": {**GOOD["result"], "kind": "another"}},
        {"result": {**GOOD["result"], "tensors": "1"}},
        {"result": {"kind": "checksums", "tensors": 1}},
        {"automodel_conv": None},
    ],
    ids=str,
)
def test_other_objects_do_not_follow_it(change):
    assert not VALIDATOR.is_valid({**GOOD, **change})


def test_each_field_has_a_description_that_is_a_sentence():
    for name, part in SCHEMA["$defs"].items():
        for field, form in part["properties"].items():
            text = form.get("description", "")
            assert field == "kind" or ((text[:1].isupper() or text[:1].isdigit()) and text.endswith(".")), (
                f"{name}.{field}"
            )


def test_no_field_may_be_left_out():
    for name, part in SCHEMA["$defs"].items():
        assert {*part["required"]} == {*part["properties"]}, name


def test_envelope_is_one_line_of_ascii():
    class Named(Result, frozen=True):
        """A result."""

        name: str
        by_number: dict[int, int]

    text = envelope("plan", result=Named("é\n\udce9", {1: 2}))
    assert text.isascii()
    assert "\n" not in text
    assert json.loads(text)["result"] == {"name": "é\n\udce9", "by_number": {"1": 2}}


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_envelope_refuses_numbers_that_json_does_not_have(value):
    constant = Constant(value=value, shape=(), strides=(), offset=0)
    with pytest.raises(ValueError, match="not JSON compliant"):
        envelope("plan", result=constant)


def test_results_of_a_command_are_told_apart():
    for command, kinds in RESULTS.items():
        tags = [kind.__struct_config__.tag for kind in kinds]
        assert len(kinds) == 1 or (len({*tags}) == len(tags) and None not in tags), command
        assert all(issubclass(kind, msgspec.Struct) for kind in kinds)
