"""Tests of the results of ``adapter convert`` and ``adapter inspect``."""

from dataclasses import asdict, fields

import msgspec
import pytest

from automodel_conv.adapters import AdapterReport
from automodel_conv.cli.results.adapters import AdapterConverted, Inspected, Modules, adapter_converted, inspected
from automodel_conv.lora.inspecting import AdapterRow, AdapterSummary

ROW = AdapterRow("layers.*.down_proj", (0, 1), (), 2, 0, 4, 2.0, None)


@pytest.mark.parametrize(
    ("result", "report"), [(AdapterConverted, AdapterReport), (Inspected, AdapterSummary), (Modules, AdapterRow)]
)
def test_results_have_the_fields_of_the_reports(result, report):
    assert {*result.__struct_fields__} == {field.name for field in fields(report)}


def test_values_are_those_of_the_report():
    report = AdapterReport(("a.safetensors",), ("m",), ("z[3]",), ("l",), ("s",), 5, ("README.md",), 0.5)
    assert msgspec.structs.asdict(adapter_converted(report)) == asdict(report)


@pytest.mark.parametrize(("problems", "status"), [((), 0), (("x: not in the base",), 1)])
def test_status_is_1_if_a_part_would_have_no_effect(problems, status):
    summary = AdapterSummary("adapter", "base", "per_expert", 2, problems, None, (ROW,))
    result = inspected(summary)
    assert result.status == status
    assert msgspec.to_builtins(result) == msgspec.to_builtins(asdict(summary))
