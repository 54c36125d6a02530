"""Tests that run every benchmark at a small size and check that it measures what it reports."""

import json
import os
import subprocess
import sys

import pytest
import torch

from automodel_conv import open_checkpoint
from automodel_conv.upstream.registry import transformers_available
from benchmarks import (
    dequant,
    executing,
    executing_worker,
    from_pretrained,
    integrity,
    mapping,
    measure,
    memory,
    planning,
    saving,
    shapes,
    sharded,
    tracing,
)

pytestmark = pytest.mark.skipif(not transformers_available(), reason="benchmarks build transformers models")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("small")
    shapes.write_checkpoint(shapes.SMALL, str(directory))
    return str(directory)


def test_planning_times_every_stage_and_writes_it(tmp_path, capsys):
    file = tmp_path / "result.json"
    arguments = ["--size", "small", "--repetitions", "2", "--json", str(file)]
    before = os.environ.get("HF_DEACTIVATE_ASYNC_LOAD")
    planning.main([*arguments, "--directory", str(tmp_path)])
    assert os.environ.get("HF_DEACTIVATE_ASYNC_LOAD") == before
    assert "open + plan" in capsys.readouterr().out
    result = json.loads(file.read_text())
    assert result["environment"]["versions"]["torch"] == torch.__version__
    [small] = result["results"]
    assert all(len(times) == 2 and min(times) > 0 for times in small["wall_seconds"].values())
    assert set(small["wall_seconds"]) == {"open", "rules", "plan", "upstream open", "upstream plan"}
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]


def test_tracing_times_every_stage_of_every_loader(tmp_path, capsys):
    file = tmp_path / "result.json"
    tracing.main(["--size", "small", "--repetitions", "2", "--json", str(file), "--directory", str(tmp_path)])
    assert "microseconds per tensor" in capsys.readouterr().out
    [small] = json.loads(file.read_text())["results"]
    assert set(small["seconds"]) == {"engine", "adapter"}
    for timed in small["seconds"].values():
        assert set(timed) == {"loader", "trace", "kept"}
        assert all(len(times) == 2 and min(times) > 0 for times in timed.values())
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]


def test_executing_is_timed_here_and_in_another_checkout(tmp_path, capsys):
    file, case = tmp_path / "result.json", "grouped, transposed"
    arguments = ["--size", "small", "--case", case, "--repetitions", "1", "--rounds", "2", "--json", str(file)]
    executing.main([*arguments, "--against", str(measure.REPOSITORY), "--directory", str(tmp_path)])
    shown = capsys.readouterr().out
    assert "above the floor" in shown
    assert "here / against" in shown
    [(name, results)] = json.loads(file.read_text())["results"].items()
    assert name == case
    assert set(results) == {"here", "against"}
    for [one] in results.values():
        assert one["tensors"] == 384
        assert all(len(times) == 2 and min(times) > 0 for times in one["seconds"].values())
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]


@pytest.mark.parametrize("case", executing_worker.CASES)
def test_floor_of_executing_writes_the_same_bytes(tmp_path, case, monkeypatch):
    path = str(tmp_path / "model.safetensors")
    executing_worker.write_file(path, 2)
    times_by_part = executing_worker.work(case, path, 2, 1)["seconds"]
    assert all(len(times) == 1 for times in times_by_part.values())
    monkeypatch.setattr(executing_worker.Floor, "_read", lambda floor, into, first: into)
    with pytest.raises(RuntimeError, match="is not what the floor makes"):
        executing_worker.work(case, path, 2, 1)


def test_times_missing_in_another_checkout_are_left_out():
    runs = [
        {"tensors": 2, "seconds": {"load": [4.0, 6.0, 5.0], "schedule": times, "floor": [1.0]}} for times in ([2.0], [])
    ]
    with_parts, without_parts = (executing.per_tensor([one]) for one in runs)
    assert with_parts == {"load": [2.5], "schedule": [1.0], "floor": [0.5], "execute": [1.5], "above": [2.0]}
    assert without_parts == {"load": [2.5], "floor": [0.5], "above": [2.0]}


def test_calls_of_verbs_are_timed_by_phase(tmp_path, capsys):
    pytest.importorskip("triton", reason="the launches need Triton")
    from benchmarks import launching

    file = tmp_path / "result.json"
    launching.main(["--size", "small", "--repetitions", "2", "--json", str(file)])
    assert "deinterleave columns" in capsys.readouterr().out
    calls = json.loads(file.read_text())["calls"]
    assert calls["concatenate"]["tensors"] == 16
    assert calls["interleave columns"]["tensors"] == 12
    for measured in calls.values():
        seconds = measured["seconds"]
        assert {"as_matrices", "plan", "upload", "start", "call"} <= set(seconds)
        assert all(len(times) == 2 and min(times) > 0 for times in seconds.values())


def test_stacks_that_are_timed_are_the_destinations_of_the_lists():
    pytest.importorskip("triton", reason="the launches need Triton")
    from automodel_conv.kernels.address_table import as_matrices
    from benchmarks import launching, operations

    for name, make in operations.OPERATIONS.items():
        case = make(launching._LAYERS["small"], torch.bfloat16, torch.bfloat16, torch.device("cpu"))
        for stack, listed in zip(launching._STACKS[name](case.out), case.operands, strict=False):
            actual, expected = as_matrices("stack", stack), as_matrices("list", listed)
            assert actual[1:] == expected[1:], name
            assert actual.addresses.tolist() == expected.addresses.tolist(), name


def test_transformers_is_stopped_once_it_has_every_tensor(checkpoint, monkeypatch):
    from transformers import core_model_loading as core

    collected = []
    for cls in (core.WeightRenaming, core.WeightConverter):
        stock = cls.add_tensor
        monkeypatch.setattr(cls, "add_tensor", lambda *a, stock=stock: (collected.append(a[2]), stock(*a)))
    stock = core.WeightConverter.convert
    model = shapes.meta_model(shapes.SMALL)
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")
    slices = planning.upstream_open(checkpoint)
    planning.upstream_plan(model, slices, planning.upstream_load_config(model))
    assert sorted(collected) == sorted(slices)
    assert len(slices) == shapes.SMALL.keys
    assert core.WeightConverter.convert is stock
    assert all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.long
def test_from_pretrained_is_timed_with_the_hook_and_without(tmp_path, capsys):
    file = tmp_path / "result.json"
    arguments = ["--size", "small", "--repetitions", "1", "--directory", str(tmp_path), "--json", str(file)]
    from_pretrained.main(arguments)
    assert "with the hook" in capsys.readouterr().out
    result = json.loads(file.read_text())
    for kind in ("load", "reach"):
        assert all(runs[0]["seconds"] > 0 for runs in result["runs"][kind].values())
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]


def test_all_methods_of_saving_and_converting_write_the_same_tensors(tmp_path):
    saving.write_checkpoints(shapes.SMALL, str(tmp_path), 2, saving.TINY_SHARD)
    results = {m: saving.work(m, str(tmp_path), 2, saving.TINY_SHARD, "as-found", 0) for m in saving.METHODS}
    wanted = {form: saving.digest_of(str(tmp_path / "big" / form)) for form in (saving.PER_EXPERT, saving.GROUPED)}
    assert len(set(wanted.values())) == 2
    for name, method in saving.METHODS.items():
        assert results[name]["digest"] == wanted[method.makes], name
        assert results[name]["seconds"] > 0
        assert (results[name]["anonymous_bytes"] is None) == ("cp" in name)
    assert {path.name for path in tmp_path.iterdir()} == {"big", "tiny"}


@pytest.mark.long
def test_saving_runs_its_workers_and_prints_a_table_now_and_later(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(memory, "RETURN_SECONDS", 0.0)
    file = tmp_path / "result.json"
    methods = ["--method", "group: cp, fsync", "--method", "group: ours"]
    arguments = ["--smoke", "--repetitions", "1", "--threads", "1", "--json", str(file)]
    saving.main([*arguments, *methods, "--directory", str(tmp_path)])
    shown = capsys.readouterr().out
    assert "group: ours" in shown
    result = json.loads(file.read_text())
    assert set(result["runs"]) == {"ready", "as-found"}
    assert all(set(runs) == {"group: cp, fsync", "group: ours"} for runs in result["runs"].values())
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]
    saving.main(["--table", str(file)])
    assert capsys.readouterr().out == shown


def test_saved_tensors_that_differ_give_no_result(tmp_path, capsys, monkeypatch):
    def run_interleaved(commands, repetitions, before):
        return {m: [{"digest": "another", "seconds": 1.0}] for m in commands}

    monkeypatch.setattr(measure, "run_interleaved", run_interleaved)
    with pytest.raises(RuntimeError, match="do not produce the same tensors"):
        saving.main(["--smoke", "--method", "save: ours", "--directory", str(tmp_path)])
    assert capsys.readouterr().out == ""


def test_all_methods_of_dequantizing_return_the_same_values(tmp_path):
    for name in ("layer", "tiny"):
        dequant.write_checkpoint(dequant.TINY_LAYER, str(tmp_path / name))
    threads = torch.get_num_threads()
    # nemo is an overlay that is only on the path of its own tests
    methods = [method for method in dequant.METHODS if method != "fp8: nemo"]
    try:
        results = {m: [dequant.work(m, str(tmp_path), dequant.TINY_MATRIX, 2, 0)] for m in methods}
    finally:
        torch.set_num_threads(threads)
    for case in dequant.CASES:
        of_case = {method: runs for method, runs in results.items() if method.startswith(case)}
        dequant.check(of_case)
        assert len({runs[0]["output_bytes"] for runs in of_case.values()}) == 1
    assert all(runs[0]["seconds"] > 0 for runs in results.values())


def test_dequantizing_runs_its_workers_and_prints_a_table_now_and_later(tmp_path, capsys):
    file = tmp_path / "result.json"
    methods = ["--method", "fp8: ours", "--method", "fp8: plain torch", "--method", "fp8: nemo"]
    arguments = ["--smoke", "--repetitions", "1", "--json", str(file), *methods, "--directory", str(tmp_path)]
    dequant.main(arguments)
    shown = capsys.readouterr().out
    assert "fp8: ours, faster than fp8: " in shown
    result = json.loads(file.read_text())
    assert {*result["runs"], *result["left_out"]} == {"fp8: ours", "fp8: plain torch", "fp8: nemo"}
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]
    dequant.main(["--table", str(file)])
    assert capsys.readouterr().out == shown


def test_different_values_are_counted_and_give_no_result():
    ours = torch.tensor([1.0, -1.0, 0.0, 2.0], dtype=torch.bfloat16)
    others = torch.tensor([1.0, -1.0, -0.0, 2.0], dtype=torch.bfloat16)
    assert dequant.compared({"": others}, {"": ours})["differing"] == 1
    assert dequant.compared({"": others}, {"": ours})["most_ulp"] == 0
    others.view(torch.int16)[1] += 2
    comparison = dequant.compared({"": others}, {"": ours})
    assert (comparison["elements"], comparison["differing"], comparison["most_ulp"]) == (4, 2, 2)
    many = {"elements": 10**6, "digest": "same"}
    dequant.check({"a": [many | {"differing": 100, "most_ulp": 1}]})
    for wrong in ({"differing": 101, "most_ulp": 1}, {"differing": 1, "most_ulp": 2}):
        with pytest.raises(RuntimeError, match="does not produce our values"):
            dequant.check({"a": [many | wrong]})
    same = {"elements": 1, "differing": 0, "most_ulp": 0}
    with pytest.raises(RuntimeError, match="same values each time"):
        dequant.check({"a": [same | {"digest": "one"}], "b": [same | {"digest": "another"}]})


@pytest.mark.long
def test_ranks_load_the_same_parts_with_all_methods(tmp_path, capsys):
    file = tmp_path / "result.json"
    sharded.main(["--smoke", "--repetitions", "1", "--directory", str(tmp_path), "--json", str(file)])
    shown = capsys.readouterr().out
    result = json.loads(file.read_text())
    runs = result["loads"]["runs"]
    assert set(runs) == set(sharded.METHODS)
    ranks = {method: run["ranks"] for method, [run] in runs.items()}
    digests = {tuple(rank["digest"] for rank in of) for of in ranks.values()}
    assert len(digests) == 1
    assert len(set(digests.pop())) == sharded.RANKS  # each rank has other experts
    config = shapes.SMALL.config
    experts = config["num_hidden_layers"] * 3 * config["moe_intermediate_size"] * config["hidden_size"] * 2
    for method, of in ranks.items():
        for rank in of:
            assert rank["owned_bytes"] == of[0]["owned_bytes"] > experts
            assert (rank["counted_bytes"] is None) == ("ours" not in method)
            assert rank["seconds"] > 0
    # The sizes are so small that the gaps between wanted tensors are also read: all but the experts at the ends.
    whole = sum(p.nbytes for p in shapes.meta_model(shapes.SMALL).state_dict().values())
    for rank in ranks["ours"] + ranks["ours, dcp"]:
        assert rank["owned_bytes"] <= rank["counted_bytes"] <= whole
    assert all(min(laps) > 0 for laps in result["planning"]["seconds"].values())
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]
    sharded.main(["--table", str(file)])
    assert capsys.readouterr().out == shown


def test_parts_of_ranks_that_differ_give_no_result(tmp_path, capsys, monkeypatch):
    def run_interleaved(commands, repetitions, before):
        return {m: [{"ranks": [{"digest": "same"}, {"digest": m}], "seconds": 1.0}] for m in commands}

    monkeypatch.setattr(measure, "run_interleaved", run_interleaved)
    with pytest.raises(RuntimeError, match="do not produce the same tensors"):
        sharded.main(["--smoke", "--directory", str(tmp_path)])
    assert capsys.readouterr().out == ""


def test_rank_that_fails_is_reported_and_the_others_are_ended():
    done = subprocess.run(
        [sys.executable, "-c", FAILING_RANK], cwd=measure.REPOSITORY, capture_output=True, text=True, timeout=120
    )
    assert "RuntimeError: rank 2 failed:" in done.stderr
    assert "ZeroDivisionError: this one" in done.stderr


FAILING_RANK = """
import torch.distributed as dist
from benchmarks import sharded

def job():
    if dist.get_rank() == 2:
        raise ZeroDivisionError("this one")
    dist.barrier()

sharded.divided(job)
"""


def test_worker_that_fails_is_reported_with_its_error():
    with pytest.raises(RuntimeError, match="No module named"):
        measure.run_worker(["-m", "benchmarks.nothing"], 0)


def test_sparse_checkpoints_have_the_size_without_the_blocks(tmp_path):
    shapes.write_sparse_checkpoint(shapes.SMALL, str(tmp_path))
    opened = open_checkpoint(tmp_path)
    assert len(opened.names) == shapes.SMALL.keys
    assert len(opened.files) == shapes.SMALL.files
    model = shapes.meta_model(shapes.SMALL)
    assert sum(opened.nbytes) == sum(p.nbytes for p in model.state_dict().values())


@pytest.mark.parametrize("shape", [shapes.QWEN3_235B, shapes.DEEPSEEK_V3], ids=lambda s: s.name)
def test_shapes_have_as_many_tensors_as_the_published_checkpoints(shape):
    assert len(shapes.checkpoint_tensors(shape, shapes.meta_model(shape))) == shape.keys


def test_integrity_times_loads_and_plans_with_and_without(tmp_path, capsys):
    file = tmp_path / "result.json"
    arguments = ["--size", "small", "--repetitions", "2", "--directory", str(tmp_path), "--json", str(file)]
    integrity.main(arguments)
    assert "checksums verified" in capsys.readouterr().out
    seconds = json.loads(file.read_text())["seconds"]
    assert set(seconds) == {"load", "load, checksums verified", "plan", "plan, not proved"}
    assert all(len(times) == 2 and min(times) > 0 for times in seconds.values())


@pytest.mark.skipif(sys.platform != "linux", reason="files are mapped only on Linux")
def test_mapped_load_reads_nothing_and_returns_the_same_tensors(tmp_path):
    shapes.write_checkpoint(shapes.SMALL, str(tmp_path / "published"))
    mapping.amc.convert_checkpoint(tmp_path / "published", tmp_path / "own")
    results = {
        method: mapping.work(method, str(tmp_path), "small", 2)
        for method in ("load_model(memory_map=True)", "load_state_dict", "from_pretrained, published files")
    }
    measure.check_digests({method: result["digest"] for method, result in results.items()})
    assert results["load_model(memory_map=True)"]["bytes_read"] == results["load_state_dict"]["bytes_mapped"] == 0
    assert results["load_model(memory_map=True)"]["bytes_mapped"] == results["load_state_dict"]["bytes_read"] > 0
