"""Tests of the stages of ``python -m benchmarks.gpu`` without a GPU: all is verified; a fault affects only itself."""

import itertools
import json
import time
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from benchmarks import measure, operations
from benchmarks.gpu import (
    candidates,
    checkpoints,
    environment,
    kernels,
    loading,
    round_trip,
    stages,
    sweep,
    testing,
    transfers,
)
from benchmarks.gpu.listening import Limits
from benchmarks.gpu.record import left_out, problems
from benchmarks.gpu.worker import SILENT, Channel
from benchmarks.quantized import QUANTIZED

CPU = torch.device("cpu")


@pytest.mark.parametrize("way", ["kernel", "twin", "idiom", "loop", "foreach"])
@pytest.mark.parametrize("operation", operations.OPERATIONS)
def test_every_variant_is_verified_and_poisoned_output_is_detected(operation, way):
    pytest.importorskip("triton")
    size = operations.Experts("", 2, 6, 10, phase_bytes=8)
    case = operations.OPERATIONS[operation](size, torch.float32, torch.bfloat16, CPU)
    run = getattr(case, way)() if way in ("loop", "foreach") else getattr(case, way)
    case.verify(way, run)
    assert case.bytes_moved == case.out.nbytes * 3 // 2
    case.verify("zeros written", lambda: case.out.copy_(torch.stack([case.expected(0), case.expected(1)])))
    with pytest.raises(operations.Mismatch, match="expert 0"):
        case.verify("nothing written", lambda: case.out)


@pytest.mark.parametrize("name", QUANTIZED)
def test_every_dequantize_variant_is_verified_and_poisoned_output_is_detected(name):
    pytest.importorskip("triton")
    case = QUANTIZED[name](operations.Experts("", 2, 40, 64, phase_bytes=8), CPU)
    for way, run in (case.ways() | {"twin": case.twin}).items():
        case.verify(way, run)
    with pytest.raises(operations.Mismatch, match="expert 0"):
        case.verify("nothing written", lambda: case.out)


class FakeCuda:
    """The part of torch.cuda that times a load. Most of it fails before CUDA is initialized."""

    def __init__(self):
        self.is_initialized = False
        self.calls = []

    def install(self, monkeypatch):
        for name in ("empty_cache", "max_memory_allocated", "reset_peak_memory_stats", "synchronize"):
            monkeypatch.setattr(torch.cuda, name, partial(self._call, name))
        monkeypatch.setattr(loading, "pinned", lambda nbytes, device: self._call("pin"))

    def _call(self, name, device=None):
        if name in ("synchronize", "pin"):
            self.is_initialized = True
        elif name == "reset_peak_memory_stats" and not self.is_initialized:
            raise RuntimeError("Invalid device argument 0: did you call init?")
        self.calls.append(name)
        return 5

    def load(self, directory, device):
        self.is_initialized = True
        self.calls.append(f"load {directory}")
        return {"a": torch.ones(4, dtype=torch.bfloat16)}, {}


@pytest.mark.parametrize("is_cold", [False, True])
def test_cold_load_is_the_first_of_its_process_on_the_device(monkeypatch, is_cold):
    cuda = FakeCuda()
    cuda.install(monkeypatch)
    row = loading.timed(
        loading.Loading("short", cuda.load, scratch_bytes=64, is_cold=is_cold), "root", torch.device("cuda:0")
    )
    assert row["peak_device_bytes"] == 5
    loads = ["load root/short"] if is_cold else ["load root/warm-up", *3 * ["load root/short"]]
    assert [call for call in cuda.calls if call.startswith("load")] == loads
    assert ("reset_peak_memory_stats" in cuda.calls) != is_cold
    assert (row["pinned_s"] is None) == is_cold


def test_cold_load_has_kernels_to_compile():
    """Only transposed tensors need a kernel."""
    cold = [one for one in loading.loadings(smoke=False).values() if one.is_cold]
    assert [one.transposed for one in cold] == [True]


def test_truncated_checkpoint_is_written_again(tmp_path, needs_both):
    checkpoint = checkpoints.checkpoints(3, smoke=True)[checkpoints.SHORT]
    checkpoints.write(checkpoint, str(tmp_path / "whole"))
    cut_off = tmp_path / "cut off"
    cut_off.mkdir()
    (cut_off / "model-00009-of-00009.safetensors").write_bytes(b"half a file")
    checkpoints.write(checkpoint, str(cut_off))
    whole, again = ({path.name: path.read_bytes() for path in root.iterdir()} for root in (tmp_path / "whole", cut_off))
    assert whole == again


class Workers:
    """A replacement for all workers: planted functions for some modules, and plain cells for the others."""

    def __init__(self, monkeypatch, **planted):
        self.planted = planted
        self.started = []
        monkeypatch.setattr(stages, "run_task", self._run_task)

    def _run_task(self, task, stage, record, place, limits):
        module = task.module.rpartition(".")[2]
        todo = [cell for cell in task.cells or () if cell not in record.done(stage)]
        if todo:
            self.started.append((module, *todo))
        for cell in todo:
            row = self.planted.get(module, lambda cell: {})(cell)
            if row is None:
                record.leave_out(stage, [cell])
            else:
                record.add(stage, {"cell": cell, **row})


def test_loads_of_a_missing_checkpoint_wait_until_it_is_written(run, monkeypatch):
    plants = {"checkpoints": lambda cell: None if cell == checkpoints.SHORT else {}}
    workers = Workers(monkeypatch, **plants)
    limits = Limits(time.monotonic() + 60, 60)
    stages.measure_transfers(run, limits)
    assert set(run.record.done("transfers")) == {*transfers.cells("", False, CPU)} - {*transfers.READS}
    stages.measure_loads(run, limits)
    known = loading.loadings(smoke=False)
    short = {name for name, one in known.items() if one.checkpoint == checkpoints.SHORT}
    assert set(run.record.done("loads")) == {name for name in known if name not in short}
    assert problems(run.record.result) == []
    assert left_out(run.record.result).count("checkpoints: short") == 1
    assert {*left_out(run.record.result)} >= {f"loads: {name}" for name in short}
    workers.planted = {}
    stages.finish(run, limits)
    assert set(run.record.done("round trip")) == set(round_trip.CELLS)
    assert "checkpoints: short" not in left_out(run.record.result)


def test_unwritable_checkpoint_is_tried_once_and_reported_once(run, monkeypatch):
    workers = Workers(monkeypatch, checkpoints=lambda cell: {"error": "the disk is full"})
    stages.measure_loads(run, Limits(time.monotonic() + 60, 60))
    tried = [cell for module, *cells in workers.started for cell in cells if module == "checkpoints"]
    assert sorted(tried) == sorted(checkpoints.checkpoints(3, smoke=False))
    assert len(problems(run.record.result)) == len(tried)
    assert run.record.done("loads") == []
    assert len(left_out(run.record.result)) == len(loading.loadings(smoke=False))


@pytest.mark.parametrize("change", ["a bit", "two rows", "a name"])
def test_digest_sees_every_bit_and_its_place(change):
    tensors = {"a": torch.arange(64, dtype=torch.bfloat16).view(8, 8)}
    before = loading.digest(tensors)
    assert loading.digest({"a": tensors["a"].clone()}) == before
    if change == "a bit":
        tensors["a"].view(torch.int16)[7, 7] ^= 1
    elif change == "two rows":
        tensors["a"] = tensors["a"][[1, 0, 2, 3, 4, 5, 6, 7]]
    else:
        tensors = {"b": tensors["a"]}
    assert loading.digest(tensors) != before


def test_round_trip_that_changes_a_byte_is_wrong(tmp_path, needs_both):
    root = str(tmp_path)
    checkpoint = checkpoints.checkpoints(3, smoke=True)[checkpoints.SHORT]
    checkpoints.write(checkpoint, f"{root}/{checkpoints.SHORT}")
    saved = round_trip.save(root, CPU)
    assert saved["nbytes"] > 0
    assert 0 < saved["sync_s"]
    checkpoints.write(checkpoint, f"{root}/other")
    file = sorted((tmp_path / "other").glob("*.safetensors"))[-1]
    file.write_bytes(file.read_bytes()[:-1] + b"\0")
    with pytest.raises(operations.Mismatch, match="is not what was loaded"):
        round_trip.compare(f"{root}/other", f"{root}/{checkpoints.SHORT}")


@pytest.mark.parametrize("candidate", candidates.CANDIDATES, ids=lambda candidate: candidate.name)
def test_candidate_changes_constants_and_restores_them(candidate):
    pytest.importorskip("triton")
    before = [patch.found() for patch in candidate.patches]
    with candidates.patched(candidate):
        during = [patch.found() for patch in candidate.patches]
    assert [patch.found() for patch in candidate.patches] == before
    if candidate.name not in candidates.DECODERS:
        assert list(map(type, during)) == list(map(type, before))
    assert set(candidate.operations) <= {*kernels.MEASURED, *QUANTIZED}


def test_candidates_that_need_a_process_of_their_own_are_tried_on_one_layer_and_decoders_first():
    cells = sweep.cells(smoke=False).values()
    apart = {cell.layer for cell in cells if cell.candidate.own_process}
    assert len({cell.layer for cell in cells}) == 2
    assert len(apart) == 1
    names = [*dict.fromkeys(cell.operation for cell in cells)]
    assert sorted(names, key=lambda name: not name.startswith("dequantize")) == names


@pytest.mark.parametrize("count", [0, 5, 12, 1000])
def test_neighbours_of_the_tests_are_run_by_one_of_eight_processes(count):
    items = [SimpleNamespace(nodeid=f"test[{number}]") for number in range(count)]
    shares = []
    for share in range(8):
        mine = items.copy()
        order = {"share": [share, 8], "cells": None, "done": []}
        testing.Reporter(order, SILENT).pytest_collection_modifyitems(None, mine)
        shares.append([items.index(item) for item in mine])
    assert sorted(itertools.chain.from_iterable(shares)) == list(range(count))
    # If a share skips tests of other shares, at least 12 of its own must come first.
    jumps = sum(after != before + 1 for share in shares for before, after in itertools.pairwise(share))
    assert jumps <= count / 12
    assert max(map(len, shares)) - min(map(len, shares)) <= 12


def test_no_two_candidates_of_an_operation_have_one_name():
    pairs = [(operation, each.name) for each in candidates.CANDIDATES for operation in each.operations]
    assert len(set(pairs)) == len(pairs)


def test_candidates_with_compiled_constants_run_in_their_own_process():
    pytest.importorskip("triton")
    for candidate in candidates.CANDIDATES:
        compiled_in = [patch for patch in candidate.patches if type(patch.found()).__name__ == "constexpr"]
        assert candidate.own_process == bool(compiled_in), candidate.name


def test_wrong_candidate_affects_only_itself(monkeypatch):
    pytest.importorskip("triton")
    missing = candidates.Patch("automodel_conv.kernels.transpose", "_NO_SUCH_CONSTANT", 1)
    zeroed = candidates.Patch("automodel_conv.kernels.strided_copy", "start", lambda work: None)
    planted = (
        candidates.Candidate("no such constant", ("concatenate",), (missing,)),
        candidates.Candidate("writes nothing", ("concatenate",), (zeroed,)),
        candidates.Candidate("as it is", ("concatenate",)),
    )
    monkeypatch.setattr(sweep, "CANDIDATES", planted)
    lines = []
    order = {"device": "cpu", "smoke": True, "compiles_only": False, "without": {}, "cells": [*sweep.cells(smoke=True)]}
    sweep.work(order, Channel(lambda line: lines.append(json.loads(line))))
    rows = {line["row"]["candidate"]: line["row"] for line in lines if "row" in line}
    assert "_NO_SUCH_CONSTANT" in rows["no such constant"]["failed"]["ours"]
    assert "expert 0" in rows["writes nothing"]["wrong"]["ours"]
    assert [name for name, row in rows.items() if "ours" in row["ms"]] == ["as it is"]


H100 = {"name": "H100", "capability": [9, 0], "memory_bytes": 80 << 30, "devices": 1}


def test_results_of_two_devices_are_not_mixed_in_one_file(run, monkeypatch):
    def on(device):
        Workers(monkeypatch, environment=lambda cell: {"found": device})
        stages.look_around(run)

    on(H100)
    on(H100 | {"memory_bytes": 79 << 30, "devices": 8})  # another machine with the same device
    for other in ("H200", [10, 0]):
        with pytest.raises(SystemExit, match=r"another device, .*'H100'"):
            on(H100 | {"name" if isinstance(other, str) else "capability": other})
    rows = {row["cell"]: row for row in measure.read_json(str(run.record.path))["rows"]["environment"]}
    assert rows["device"]["found"]["name"] == "H100"


@pytest.mark.parametrize("slow", [(environment.IMPORTS,), ("device",), ("device", "environment", environment.IMPORTS)])
def test_slow_environment_does_not_block_the_stages(run, monkeypatch, slow):
    Workers(monkeypatch, environment=lambda cell: None if cell in slow else {"found": H100})
    stages.look_around(run)
    cells = {cell for cells in environment.TASKS for cell in cells}
    assert set(run.record.done("environment")) == cells - set(slow)
    assert {*left_out(run.record.result)} == {f"environment: {cell}" for cell in slow}


def test_imports_are_timed_in_a_process_of_their_own(run, monkeypatch):
    workers = Workers(monkeypatch, environment=lambda cell: {"found": H100})
    stages.look_around(run)
    assert [started for started in workers.started if environment.IMPORTS in started] == [("environment", "imports")]
    assert workers.started[0][:2] == ("environment", "device")


def test_missing_device_ends_the_command(run, monkeypatch):
    Workers(monkeypatch, environment=lambda cell: {"error": "no driver"} if cell == "device" else {"found": H100})
    with pytest.raises(SystemExit, match=r"no device cuda:0: no driver"):
        stages.look_around(run)


def test_stage_that_fails_in_the_command_is_reported_and_the_next_begins(run, monkeypatch):
    done = []
    planted = {
        "broken": stages.Stage(1, 1, lambda *_: 1 / 0),
        "next": stages.Stage(3, 1, lambda _, limits: done.append(limits.deadline - time.monotonic())),
    }
    monkeypatch.setattr(stages, "STAGES", planted)
    monkeypatch.setattr(stages, "look_around", lambda _: None)
    stages.run_all(run, 60.0, lambda text: None)
    assert "ZeroDivisionError" in problems(run.record.result)[0]
    assert 59 < done[0] <= 60  # the time that the first left


def test_longest_checkpoint_is_as_long_as_the_disk_allows():
    assert checkpoints.layers_that_fit(13, 64e9) == 13
    assert 1 <= checkpoints.layers_that_fit(13, 10e9) < 4
    assert checkpoints.layers_that_fit(13, 1e9) == 1
