"""``python -m benchmarks.gpu`` without a GPU: all of it runs, and whatever goes wrong costs only itself."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from automodel_conv.upstream.registry import transformers_available
from benchmarks import measure, operations
from benchmarks.gpu import __main__ as command
from benchmarks.gpu import (
    candidates,
    checkpoints,
    environment,
    kernels,
    loading,
    round_trip,
    stages,
    sweep,
    tables,
    testing,
    transfers,
)
from benchmarks.gpu.listening import Limits, Place
from benchmarks.gpu.record import Record, is_wrong, left_out, problems
from benchmarks.gpu.worker import SILENT, Channel
from benchmarks.quantized import QUANTIZED

HIDE = Path(__file__).parents[1] / "hide"
CPU = torch.device("cpu")


@pytest.fixture
def needs_both():
    pytest.importorskip("triton")
    if not transformers_available():
        pytest.skip("the command builds models of transformers")


class Command:
    """The command in a process of its own, with a test in place of tests/gpu, which runs beside these tests."""

    def __init__(self, root):
        self.out = root / "out"
        self.tests = root / "planted"
        self.tests.mkdir()
        (self.tests / "test_right.py").write_text("def test_right():\n    pass\n")

    def start(self, *arguments, planted=""):
        """Args:
        planted: what each process does before anything else, as text.
        """
        (self.tests / "sitecustomize.py").write_text(planted)
        line = [sys.executable, "-m", "benchmarks.gpu", str(self.out), "--smoke", "--tests", str(self.tests)]
        return subprocess.Popen(
            [*line, "--directory", str(self.tests.parent), *arguments],
            cwd=measure.REPOSITORY,
            env=os.environ | {"PYTHONPATH": str(self.tests), "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *arguments, planted=""):
        """The exit code, and what was said on standard output and elsewhere."""
        process = self.start(*arguments, planted=planted)
        said, told = process.communicate()
        return process.returncode, said, told

    def result(self):
        return json.loads((self.out / "gpu.json").read_text())

    def rows(self, stage):
        return {row["cell"]: row for row in self.result()["rows"].get(stage, [])}


@pytest.fixture
def gpu(tmp_path):
    return Command(tmp_path)


def test_the_whole_command_runs_and_writes_what_it_measured(gpu, needs_both):
    code, said, told = gpu.run("--commit", "0123abc")
    assert code == 0, said + told
    result = gpu.result()
    assert problems(result) == []
    assert result["left_out"] == {}
    assert set(result["stages_s"]) == set(stages.STAGES)
    assert gpu.rows("environment")["environment"]["found"]["versions"]["torch"] == torch.__version__
    assert set(gpu.rows("environment")) == {cell for cells in environment.TASKS for cell in cells}
    assert [Path(test).name for test in gpu.rows("tests")] == ["test_right.py::test_right"]
    measured = gpu.rows("kernels")
    assert set(measured) == set(kernels.cells(smoke=True))
    assert all(min(row["ms"].values()) > 0 for row in measured.values())
    assert set(gpu.rows("sweep")) == set(gpu.rows("compilation")) == set(sweep.cells(smoke=True))
    assert all(row["ms"]["ours"] > 0 for row in gpu.rows("sweep").values())
    assert set(gpu.rows("loads")) == set(loading.loadings(smoke=True))
    assert all(row["seconds"] > 0 for row in gpu.rows("loads").values())
    digests = {cell: row["digest"] for cell, row in gpu.rows("loads").items()}
    assert digests["ours"] == digests["from_pretrained"] == digests["load_file, stack, cat"]
    assert len({digests[name] for name in ("ours", "ours, nemo", "ours, long", "fp8: ours")}) == 4
    assert set(gpu.rows("round trip")) == set(round_trip.CELLS)
    assert said == f"{tables.markdown(result)}\n{tables.ending(result)}"
    assert "0123abc" in said
    assert sorted(path.name for path in gpu.out.iterdir()) == ["gpu.json", "gpu.log"]
    assert [path.name for path in gpu.out.parent.iterdir() if path.name.startswith("benchmark-gpu")] == []


# One wrong byte in ours, a baseline that raises, one that leaves the device broken, one that kills its process, and a
# case that does.
FAULTS = """
import os, signal, sys
if "benchmarks.gpu.kernels" in sys.orig_argv:
    import torch
    from benchmarks import operations, quantized
    from benchmarks.gpu import timing

    broken = []

    def wrong(dst, src, right=operations.KERNELS["transpose"]):
        right(dst, src)
        if isinstance(dst, list):
            dst[-1].view(torch.uint8)[-1, -1] ^= 1

    def foreach(case, right=operations.Case.foreach):
        if case.out.dtype == torch.float32 and case.operands[1][0].data_ptr() % 16 == 0:
            os.kill(os.getpid(), signal.SIGSEGV)
        return right(case)

    def loop(case, right=operations.Case.loop):
        if case.verb == "interleave":
            raise ValueError("a broken baseline")
        if case.verb == "deinterleave":
            broken.append("an illegal memory access was encountered")
            raise RuntimeError("from now on nothing works")
        return right(case)

    operations.KERNELS["transpose"] = wrong
    timing.why_broken = lambda device: broken[0] if broken else None
    operations.Case.foreach = foreach
    operations.Case.loop = loop
    quantized.QUANTIZED["dequantize mxfp4"] = lambda layer, device: os._exit(7)
"""
TESTS = """
import os, signal
import pytest
from benchmarks.gpu import timing

def test_wrong():
    assert 1 == 2

def test_sticky():
    timing.why_broken = lambda device: "sticky"
    assert 3 == 4

def test_deadly():
    os.kill(os.getpid(), signal.SIGSEGV)

@pytest.mark.parametrize("number", range(3))
def test_after(number):
    assert "sticky" not in timing.why_broken.__code__.co_consts
"""


def killed_after(process, has_enough):
    try:
        for _ in range(1200):
            if has_enough():
                return
            time.sleep(0.1)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()


def test_whatever_fails_or_kills_it_all_else_is_measured_and_only_what_is_missing_is_done_again(gpu, needs_both):
    (gpu.tests / "test_faults.py").write_text(TESTS)
    (gpu.tests / "test_not_to_be_imported.py").write_text("import there_is_no_such_thing\n")
    asked = ("--stage", "tests", "--stage", "kernels")
    process = gpu.start(*asked, planted=FAULTS)
    killed_after(process, lambda: (gpu.out / "gpu.json").exists() and len(gpu.rows("kernels")) >= 5)
    before = gpu.rows("kernels")
    sound = {cell for cell in before if not is_wrong(before[cell])}
    assert len(sound) >= 3
    assert len(before) < len(kernels.cells(smoke=True))

    code, said, told = gpu.run(*asked, "--resume", planted=FAULTS)
    assert code == 1, told
    assert {cell: gpu.rows("kernels")[cell] for cell in sound} == {cell: before[cell] for cell in sound}
    tests = {name.rpartition("/")[2]: row for name, row in gpu.rows("tests").items()}
    assert {name for name, row in tests.items() if "error" not in row} == {
        "test_right.py::test_right",
        *(f"test_faults.py::test_after[{number}]" for number in range(3)),
    }
    assert "assert 3 == 4" in tests["test_faults.py::test_sticky"]["error"]
    assert "assert 1 == 2" in tests["test_faults.py::test_wrong"]["error"]
    assert "SIGSEGV" in tests["test_faults.py::test_deadly"]["error"]
    assert "there_is_no_such_thing" in tests["test_not_to_be_imported.py"]["error"]
    first = gpu.rows("kernels")
    assert set(first) == set(kernels.cells(smoke=True))
    for cell, row in first.items():
        operation = cell.partition(": ")[2]
        lost = set()
        if operation == "dequantize mxfp4":
            assert "exit code 7" in row["error"]
            continue
        if operation in ("concatenate transposed", "transpose down"):
            lost = {"ours"}
            assert "not what plain indexing gives" in row["wrong"]["ours"]
        if operation == "interleave columns":
            lost = {"copy_ loop"}
            assert "a broken baseline" in row["failed"]["copy_ loop"]
        if operation == "deinterleave columns":
            lost = {"copy_ loop"}
            assert "an illegal memory access" in row["failed"]["copy_ loop"]
        if cell == "tiny: concatenate, bf16 to fp32":
            lost = {"_foreach_copy_"}
            assert "SIGSEGV" in row["failed"]["_foreach_copy_"]
        assert set(row["wrong"]) | set(row["failed"]) == lost
        case = kernels.make_case(operation, operations.Experts("", 2, 24, 48), CPU)
        assert set(row["ms"]) == {"copy_", *kernels.ways(case)} - lost
    ending = said[said.index("Wrong: ") :]
    assert "Wrong: 15\n" in ending  # 4 tests; 4 of transposes, 2 of each interleave, 2 of mxfp4, and a fault
    assert "ours is wrong" in ending
    assert "test_deadly" in ending

    for name in ("test_faults.py", "test_not_to_be_imported.py"):
        (gpu.tests / name).unlink()
    code, said, told = gpu.run(*asked, "--resume")
    assert code == 0, said + told
    assert "Wrong: nothing" in said
    again = gpu.rows("kernels")
    assert set(again) == set(first)
    kept = {cell for cell in first if not is_wrong(first[cell])}
    assert {cell: again[cell] for cell in kept} == {cell: first[cell] for cell in kept}


def test_what_there_is_no_time_for_is_listed_and_not_wrong(gpu, monkeypatch, capsys):
    monkeypatch.setattr(stages, "look_around", lambda _: None)
    with pytest.raises(SystemExit) as ended:
        command.main([str(gpu.out), "--smoke", "--stage", "kernels", "--minutes", "0"])
    assert ended.value.code == 0
    assert set(gpu.result()["left_out"]["kernels"]) == set(kernels.cells(smoke=True))
    assert "Left out for want of time: 26\n- kernels: tiny: concatenate\n" in capsys.readouterr().out


def test_a_record_keeps_the_length_of_its_checkpoints(gpu):
    gpu.out.mkdir()
    Record.new(gpu.out / "gpu.json").write(layers=3)
    with pytest.raises(SystemExit, match=r"have 3 layers; leave --layers out"):
        command.main([str(gpu.out), "--smoke", "--resume", "--minutes", "0", "--layers", "13"])


def test_a_folder_that_a_killed_command_left_goes_when_the_next_begins(tmp_path):
    not_ours = tmp_path / "benchmark-gpu-results"
    not_ours.mkdir()
    with command._temporary(str(tmp_path)) as alive:
        left = Path(shutil.copytree(alive, f"{alive}-left"))  # nobody holds its lock
        (left / "24 GB").write_text("")
        with command._temporary(str(tmp_path)) as root:
            assert {*tmp_path.iterdir()} == {alive, root, not_ours}
    assert [*tmp_path.iterdir()] == [not_ours]


def test_a_folder_with_a_file_is_not_begun_anew(gpu, capsys):
    gpu.out.mkdir()
    (gpu.out / "gpu.json").write_text("{}")
    with pytest.raises(SystemExit):
        command.main([str(gpu.out), "--smoke"])
    assert "--resume" in capsys.readouterr().err


@pytest.mark.parametrize("way", ["kernel", "twin", "idiom", "loop", "foreach"])
@pytest.mark.parametrize("operation", operations.OPERATIONS)
def test_every_way_is_verified_and_an_output_that_stays_poisoned_is_found(operation, way):
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
def test_every_way_to_dequantize_is_verified_and_an_output_that_stays_poisoned_is_found(name):
    pytest.importorskip("triton")
    case = QUANTIZED[name](operations.Experts("", 2, 40, 64, phase_bytes=8), CPU)
    for way, run in (case.ways() | {"twin": case.twin}).items():
        case.verify(way, run)
    with pytest.raises(operations.Mismatch, match="expert 0"):
        case.verify("nothing written", lambda: case.out)


class FakeCuda:
    """As much of torch.cuda as a load is timed with: most of it fails before CUDA is initialized."""

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
def test_a_cold_load_is_the_first_that_its_process_does_on_the_device(monkeypatch, is_cold):
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


def test_a_cold_load_has_kernels_to_compile():
    """Only what is transposed needs one."""
    cold = [one for one in loading.loadings(smoke=False).values() if one.is_cold]
    assert [one.transposed for one in cold] == [True]


def test_a_checkpoint_that_was_cut_off_is_written_anew(tmp_path, needs_both):
    made = checkpoints.checkpoints(3, smoke=True)[checkpoints.SHORT]
    checkpoints.write(made, str(tmp_path / "whole"))
    cut_off = tmp_path / "cut off"
    cut_off.mkdir()
    (cut_off / "model-00009-of-00009.safetensors").write_bytes(b"half a file")
    checkpoints.write(made, str(cut_off))
    whole, again = ({path.name: path.read_bytes() for path in root.iterdir()} for root in (tmp_path / "whole", cut_off))
    assert whole == again


class Workers:
    """Stands for all workers: those of a module do what is planted for it, and all others do their cells."""

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


@pytest.fixture
def run(tmp_path):
    record = Record.new(tmp_path / "gpu.json")
    return stages.Run("cuda:0", False, "tests/gpu", 3, tmp_path, Place({}, tmp_path / "log"), record)


def test_loads_of_a_checkpoint_that_is_not_there_are_left_out_and_it_is_written_when_there_is_time(run, monkeypatch):
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


def test_a_checkpoint_that_cannot_be_written_is_tried_once_and_told_once(run, monkeypatch):
    workers = Workers(monkeypatch, checkpoints=lambda cell: {"error": "the disk is full"})
    stages.measure_loads(run, Limits(time.monotonic() + 60, 60))
    tried = [cell for module, *cells in workers.started for cell in cells if module == "checkpoints"]
    assert sorted(tried) == sorted(checkpoints.checkpoints(3, smoke=False))
    assert len(problems(run.record.result)) == len(tried)
    assert run.record.done("loads") == []
    assert len(left_out(run.record.result)) == len(loading.loadings(smoke=False))


@pytest.mark.parametrize("change", ["a bit", "two rows", "a name"])
def test_a_digest_sees_every_bit_and_its_place(change):
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


def test_a_round_trip_that_changes_a_byte_is_wrong(tmp_path, needs_both):
    root = str(tmp_path)
    made = checkpoints.checkpoints(3, smoke=True)[checkpoints.SHORT]
    checkpoints.write(made, f"{root}/{checkpoints.SHORT}")
    saved = round_trip.save(root, CPU)
    assert saved["nbytes"] > 0
    assert 0 < saved["sync_s"]
    checkpoints.write(made, f"{root}/other")
    file = sorted((tmp_path / "other").glob("*.safetensors"))[-1]
    file.write_bytes(file.read_bytes()[:-1] + b"\0")
    with pytest.raises(operations.Mismatch, match="is not what was loaded"):
        round_trip.compare(f"{root}/other", f"{root}/{checkpoints.SHORT}")


@pytest.mark.parametrize("candidate", candidates.CANDIDATES, ids=lambda candidate: candidate.name)
def test_a_candidate_changes_what_there_is_and_puts_it_back(candidate):
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
        testing.Telling(order, SILENT).pytest_collection_modifyitems(None, mine)
        shares.append([items.index(item) for item in mine])
    assert sorted(itertools.chain.from_iterable(shares)) == list(range(count))
    # Wherever a share leaves out tests of others, at least 12 of its own came before.
    jumps = sum(after != before + 1 for share in shares for before, after in itertools.pairwise(share))
    assert jumps <= count / 12
    assert max(map(len, shares)) - min(map(len, shares)) <= 12


def test_no_two_candidates_of_an_operation_have_one_name():
    pairs = [(operation, each.name) for each in candidates.CANDIDATES for operation in each.operations]
    assert len(set(pairs)) == len(pairs)


def test_what_kernels_compile_in_is_tried_in_a_process_of_its_own():
    pytest.importorskip("triton")
    for candidate in candidates.CANDIDATES:
        compiled_in = [patch for patch in candidate.patches if type(patch.found()).__name__ == "constexpr"]
        assert candidate.own_process == bool(compiled_in), candidate.name


def test_a_candidate_that_is_wrong_or_of_no_constant_costs_only_itself(monkeypatch):
    pytest.importorskip("triton")
    missing = candidates.Patch("automodel_conv.kernels.transpose", "_NO_SUCH_CONSTANT", 1)
    zeroed = candidates.Patch("automodel_conv.kernels.strided_copy", "start", lambda work: None)
    made = (
        candidates.Candidate("no such constant", ("concatenate",), (missing,)),
        candidates.Candidate("writes nothing", ("concatenate",), (zeroed,)),
        candidates.Candidate("as it is", ("concatenate",)),
    )
    monkeypatch.setattr(sweep, "CANDIDATES", made)
    lines = []
    order = {"device": "cpu", "smoke": True, "compiles_only": False, "without": {}, "cells": [*sweep.cells(smoke=True)]}
    sweep.work(order, Channel(lambda line: lines.append(json.loads(line))))
    rows = {line["row"]["candidate"]: line["row"] for line in lines if "row" in line}
    assert "_NO_SUCH_CONSTANT" in rows["no such constant"]["failed"]["ours"]
    assert "expert 0" in rows["writes nothing"]["wrong"]["ours"]
    assert [name for name, row in rows.items() if "ours" in row["ms"]] == ["as it is"]


def test_without_a_device_the_command_says_how_to_try_it(capsys, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a device")
    with pytest.raises(SystemExit):
        command.main([str(tmp_path)])
    assert "--smoke" in capsys.readouterr().err


def test_the_command_needs_none_of_the_packages_that_only_printing_needs():
    hidden = ("accelerate", "psutil", "pytest_benchmark", "rich", "tqdm", "typer", "xdist")
    path = os.pathsep.join([str(HIDE), str(measure.REPOSITORY)])
    environment = os.environ | {"PYTHONPATH": path, "HIDDEN_PACKAGES": ",".join(hidden)}
    workers = ("environment", "testing", "kernels", "sweep", "transfers", "checkpoints", "loading", "round_trip")
    modules = ", ".join(f"benchmarks.gpu.{name}" for name in ("__main__", *workers))
    code = f"import {modules}, sys; print('triton' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout) == (0, "False\n"), run.stderr


H100 = {"name": "H100", "capability": [9, 0], "memory_bytes": 80 << 30, "devices": 1}


def test_numbers_of_two_devices_do_not_meet_in_one_file(run, monkeypatch):
    def on(device):
        Workers(monkeypatch, environment=lambda cell: {"found": device})
        stages.look_around(run)

    on(H100)
    on(H100 | {"memory_bytes": 79 << 30, "devices": 8})  # another machine, with the same device
    for other in ("H200", [10, 0]):
        with pytest.raises(SystemExit, match=r"another device, .*'H100'"):
            on(H100 | {"name" if isinstance(other, str) else "capability": other})
    rows = {row["cell"]: row for row in measure.read_json(str(run.record.path))["rows"]["environment"]}
    assert rows["device"]["found"]["name"] == "H100"


@pytest.mark.parametrize("slow", [(environment.IMPORTS,), ("device",), ("device", "environment", environment.IMPORTS)])
def test_an_environment_that_takes_too_long_does_not_keep_the_stages_from_beginning(run, monkeypatch, slow):
    Workers(monkeypatch, environment=lambda cell: None if cell in slow else {"found": H100})
    stages.look_around(run)
    cells = {cell for cells in environment.TASKS for cell in cells}
    assert set(run.record.done("environment")) == cells - set(slow)
    assert {*left_out(run.record.result)} == {f"environment: {cell}" for cell in slow}


def test_imports_are_timed_in_a_process_that_nothing_else_keeps_waiting(run, monkeypatch):
    workers = Workers(monkeypatch, environment=lambda cell: {"found": H100})
    stages.look_around(run)
    assert [started for started in workers.started if environment.IMPORTS in started] == [("environment", "imports")]
    assert workers.started[0][:2] == ("environment", "device")


def test_a_device_that_says_it_is_none_ends_the_command(run, monkeypatch):
    Workers(monkeypatch, environment=lambda cell: {"error": "no driver"} if cell == "device" else {"found": H100})
    with pytest.raises(SystemExit, match=r"no device cuda:0: no driver"):
        stages.look_around(run)


def test_a_stage_that_breaks_in_the_command_itself_is_told_and_the_next_begins(run, monkeypatch):
    done = []
    made = {
        "broken": stages.Stage(1, 1, lambda *_: 1 / 0),
        "next": stages.Stage(3, 1, lambda _, limits: done.append(limits.deadline - time.monotonic())),
    }
    monkeypatch.setattr(stages, "STAGES", made)
    monkeypatch.setattr(stages, "look_around", lambda _: None)
    stages.run_all(run, 60.0, lambda text: None)
    assert "ZeroDivisionError" in problems(run.record.result)[0]
    assert 59 < done[0] <= 60  # what the first left


def test_the_longest_checkpoint_is_as_long_as_the_disk_allows():
    assert checkpoints.layers_that_fit(13, 64e9) == 13
    assert 1 <= checkpoints.layers_that_fit(13, 10e9) < 4
    assert checkpoints.layers_that_fit(13, 1e9) == 1
