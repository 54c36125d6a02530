"""Tests of benchmarks.vllm: load formats are timed in processes of their own, and compared by what they load."""

import json

import pytest

pytest.importorskip("vllm")

from benchmarks import measure, vllm
from benchmarks.vllm_worker import RANKS

METHODS = ["auto", "ours-traced", "ours"]
SMALL = ["--size", "small", "--repetitions", "1", "--memory", "ready", "--cache", "warm", "--parallel", "EP"]


def arguments(directory):
    return [*SMALL, *(word for method in METHODS for word in ("--method", method)), "--directory", str(directory)]


def test_load_formats_fill_the_same_parameters(tmp_path, capsys):
    file = tmp_path / "result.json"
    vllm.main([*arguments(tmp_path), "--json", str(file)])
    shown = capsys.readouterr().out
    assert "vLLM's default loader" in shown
    result = json.loads(file.read_text())
    runs = {row["method"]: row["runs"] for row in result["rows"]}
    assert set(runs) == {"preadv", "preadv-small", *METHODS}
    assert all(0 < run["seconds"] < run["process_seconds"] for of in runs.values() for run in of)
    assert len({runs[method][0]["digest"] for method in METHODS}) == 1
    assert [runs[method][0]["traces"] for method in ("ours-traced", "ours")] == [1, 0]
    ranks = result["ranks"]["EP"]
    assert [rank["digest"] for rank in ranks["ours"]] == [rank["digest"] for rank in ranks["auto"]]
    assert len({rank["digest"] for rank in ranks["ours"]}) == RANKS  # each rank has other experts
    assert all(rank["owned_bytes"] < runs["ours"][0]["owned_bytes"] for rank in ranks["ours"])
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]
    vllm.main(["--from", str(file)])
    assert capsys.readouterr().out == vllm.markdown(result)


def test_parameters_that_differ_give_no_result(tmp_path, capsys, monkeypatch):
    def run_worker(command, *_, **__):
        job = json.loads(command[-1])
        one = {"digest": job["method"], "seconds": 1.0, "traces": 0}
        return one if job["parallel"] is None else {"ranks": [one] * RANKS}

    monkeypatch.setattr(measure, "run_worker", run_worker)
    with pytest.raises(RuntimeError, match="do not produce the same tensors"):
        vllm.main(arguments(tmp_path))
    assert capsys.readouterr().out == ""
