"""Tests of two ranks that save one model to S3."""

from __future__ import annotations

import json

import pytest

from tests.crash_safety.support import files as files_below
from tests.distributed.starting import results, run_suite
from tests.stores import serve_s3

pytest.importorskip("transformers", reason="builds a transformers model")

VARIANTS = ("fsdp", "experts", "nodes", "refused")


@pytest.fixture(scope="module")
def server():
    pytest.importorskip("s3fs", reason="it writes s3://")
    pytest.importorskip("moto", reason="it is the server")
    with serve_s3() as server:
        yield server


@pytest.fixture(scope="module")
def saved(server, tmp_path_factory):
    directory = tmp_path_factory.mktemp("ranks")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UPLOAD_OPTIONS", json.dumps(server.options))
        ended = run_suite("uploads", 2, directory, VARIANTS)
    found = {variant: [lines[-1] for lines in results(ranks)] for variant, ranks in ended.items()}
    return found, files_below(directory / "fsdp" / "alone")


@pytest.mark.parametrize("variant", ["fsdp", "experts"])
def test_ranks_of_one_node_write_each_file_together_and_the_first_uploads_it(saved, server, variant):
    found, alone = saved
    first, second = found[variant]
    assert [first["error"], second["error"]] == [None, None]
    assert server.files(variant) == alone
    shards = sum(name.endswith(".safetensors") for name in alone)
    assert shards >= 3
    assert (first["uploads"], second["uploads"]) == (shards, 0)
    assert first["most"] <= 2, "one file is uploaded while the next one is written"
    assert first["left"] == second["left"] == []


def test_ranks_of_several_nodes_are_refused_with_advice(saved, server):
    found, _ = saved
    for rank in found["nodes"]:
        kind, text = rank["error"]
        assert kind == "UnsupportedError"
        assert "ranks on several nodes cannot upload one checkpoint" in text
        assert "set XDG_CACHE_HOME" in text
        assert rank["left"] == []
    assert server.files("nodes") == {}
    assert server.open_uploads("nodes") == []


def test_all_ranks_learn_that_the_store_cannot_be_reached(saved):
    found, _ = saved
    first, second = (rank["error"] for rank in found["refused"])
    assert first[0] == "WriteError"
    assert "Could not connect" in first[1]
    assert second[0] == "RankError"
    assert "rank 0: WriteError" in second[1]
