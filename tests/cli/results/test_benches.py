"""Tests of the results of ``bench`` and ``demo``."""

from dataclasses import fields

import pytest

from automodel_conv.cli import remote_bench
from automodel_conv.cli.bench import Bench
from automodel_conv.cli.demo import DemoLoad, DemoResult
from automodel_conv.cli.remote_bench import RemoteBench
from automodel_conv.cli.results.benches import Demo, LocalBench, RemoteBenchResult, demo_result
from tests.cli.answers import answer
from tests.cli.support import run
from tests.loopback_store import serve


def names_of(report):
    return {field.name for field in fields(report)}


def test_results_have_the_fields_of_the_measurements():
    assert {*LocalBench.__struct_fields__} == names_of(Bench) | {"threads", "share_of_roof", "advice"}
    assert {*RemoteBenchResult.__struct_fields__} == names_of(RemoteBench) | {"load_gb_per_s", "bound", "advice"}
    assert {*Demo.__struct_fields__} == names_of(DemoResult) | {"runs"}


def test_numbers_of_threads_are_keys(plain):
    result = answer(run("bench", plain, "--no-model", "--threads", "2", "--json").stdout)["result"]
    assert result["kind"] == "local"
    assert {"1", "2"} <= result["load_seconds"].keys() == result["roof_seconds"].keys()
    assert str(result["threads"]) in result["load_seconds"]
    assert (result["nbytes"], result["tensors"], result["files"]) == (32, 2, 1)
    assert result["advice"]


def test_files_of_a_server_have_a_result_of_their_own(plain, monkeypatch):
    monkeypatch.setattr(remote_bench, "SECONDS", 0.02)
    with serve(plain) as server:
        result = answer(run("bench", server.url, "--no-model", "--threads", "2", "--json").stdout)["result"]
    assert result["kind"] == "remote"
    assert {*result["gb_per_s"]} == {"1", "2"}
    assert result["bound"] in ("machine", "latency", "link")
    assert len(result["advice"]) == 1


@pytest.mark.parametrize(("different", "status"), [((), 0), (("a",), 1)])
def test_demo_has_status_1_if_tensors_differ(different, status):
    load = DemoLoad(0.5, None, 7, {"a": "digest"})
    result = demo_result(DemoResult({"transformers": "5"}, 10, {"transformers": load}, different))
    assert result.status == status
    assert result.different == different
    assert result.runs >= 1
    assert (result.loads["transformers"].seconds, result.loads["transformers"].anonymous_bytes) == (0.5, None)
