"""Tests of ``python -m benchmarks.gpu`` without a GPU: the whole command runs, and a fault affects only itself."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import measure, operations
from benchmarks.gpu import __main__ as command
from benchmarks.gpu import environment, kernels, loading, round_trip, stages, sweep, tables
from benchmarks.gpu.record import Record, is_wrong, problems

HIDE = Path(__file__).parents[1] / "hide"
CPU = torch.device("cpu")


class Command:
    """The command in a process of its own, with one test in place of tests/gpu, which runs as part of this suite."""

    def __init__(self, root):
        self.out = root / "out"
        self.tests = root / "planted"
        self.tests.mkdir()
        (self.tests / "test_right.py").write_text("def test_right():\n    pass\n")

    def start(self, *arguments, planted=""):
        """Start the command.

        Args:
            planted: code that each process runs first.
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
        """Return the exit code, standard output and standard error."""
        process = self.start(*arguments, planted=planted)
        stdout, stderr = process.communicate()
        return process.returncode, stdout, stderr

    def result(self):
        return json.loads((self.out / "gpu.json").read_text())

    def rows(self, stage):
        return {row["cell"]: row for row in self.result()["rows"].get(stage, [])}


@pytest.fixture
def gpu(tmp_path):
    return Command(tmp_path)


def test_whole_command_runs_and_writes_what_it_measured(gpu, needs_both):
    code, stdout, stderr = gpu.run("--commit", "0123abc")
    assert code == 0, stdout + stderr
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
    assert stdout == f"{tables.markdown(result)}\n{tables.ending(result)}"
    assert "0123abc" in stdout
    assert sorted(path.name for path in gpu.out.iterdir()) == ["gpu.json", "gpu.log"]
    assert [path.name for path in gpu.out.parent.iterdir() if path.name.startswith("benchmark-gpu")] == []


# Faults: one wrong byte in ours, a baseline that raises, one that breaks the device, one that kills its process, and
# a case that kills its process.
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


@pytest.mark.long
def test_faults_affect_only_their_cells_and_resume_repeats_only_those(gpu, needs_both):
    (gpu.tests / "test_faults.py").write_text(TESTS)
    (gpu.tests / "test_not_to_be_imported.py").write_text("import there_is_no_such_thing\n")
    asked = ("--stage", "tests", "--stage", "kernels")
    process = gpu.start(*asked, planted=FAULTS)
    killed_after(process, lambda: (gpu.out / "gpu.json").exists() and len(gpu.rows("kernels")) >= 5)
    before = gpu.rows("kernels")
    sound = {cell for cell in before if not is_wrong(before[cell])}
    assert len(sound) >= 3
    assert len(before) < len(kernels.cells(smoke=True))

    code, stdout, stderr = gpu.run(*asked, "--resume", planted=FAULTS)
    assert code == 1, stderr
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
    ending = stdout[stdout.index("Wrong: ") :]
    assert "Wrong: 15\n" in ending  # 4 tests, 4 transposes, 2 of each interleave, 2 mxfp4, and a fault
    assert "ours is wrong" in ending
    assert "test_deadly" in ending

    for name in ("test_faults.py", "test_not_to_be_imported.py"):
        (gpu.tests / name).unlink()
    code, stdout, stderr = gpu.run(*asked, "--resume")
    assert code == 0, stdout + stderr
    assert "Wrong: nothing" in stdout
    again = gpu.rows("kernels")
    assert set(again) == set(first)
    kept = {cell for cell in first if not is_wrong(first[cell])}
    assert {cell: again[cell] for cell in kept} == {cell: first[cell] for cell in kept}


def test_cells_without_time_are_listed_and_not_wrong(gpu, monkeypatch, capsys):
    monkeypatch.setattr(stages, "look_around", lambda _: None)
    with pytest.raises(SystemExit) as ended:
        command.main([str(gpu.out), "--smoke", "--stage", "kernels", "--minutes", "0"])
    assert ended.value.code == 0
    assert set(gpu.result()["left_out"]["kernels"]) == set(kernels.cells(smoke=True))
    assert "Left out for want of time: 26\n- kernels: tiny: concatenate\n" in capsys.readouterr().out


def test_record_keeps_the_length_of_its_checkpoints(gpu):
    gpu.out.mkdir()
    Record.new(gpu.out / "gpu.json").write(layers=3)
    with pytest.raises(SystemExit, match=r"have 3 layers; leave --layers out"):
        command.main([str(gpu.out), "--smoke", "--resume", "--minutes", "0", "--layers", "13"])


def test_folder_of_a_killed_command_is_removed_by_the_next(tmp_path):
    not_ours = tmp_path / "benchmark-gpu-results"
    not_ours.mkdir()
    with command._temporary(str(tmp_path)) as alive:
        left = Path(shutil.copytree(alive, f"{alive}-left"))  # without a held lock
        (left / "24 GB").write_text("")
        with command._temporary(str(tmp_path)) as root:
            assert {*tmp_path.iterdir()} == {alive, root, not_ours}
    assert [*tmp_path.iterdir()] == [not_ours]


def test_folder_with_a_file_is_not_started_again(gpu, capsys):
    gpu.out.mkdir()
    (gpu.out / "gpu.json").write_text("{}")
    with pytest.raises(SystemExit):
        command.main([str(gpu.out), "--smoke"])
    assert "--resume" in capsys.readouterr().err


def test_without_a_device_the_command_explains_how_to_try_it(capsys, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("this machine has a device")
    with pytest.raises(SystemExit):
        command.main([str(tmp_path)])
    assert "--smoke" in capsys.readouterr().err


def test_command_does_not_need_the_packages_for_printing():
    hidden = ("accelerate", "psutil", "pytest_benchmark", "rich", "tqdm", "typer", "xdist")
    path = os.pathsep.join([str(HIDE), str(measure.REPOSITORY)])
    environment = os.environ | {"PYTHONPATH": path, "HIDDEN_PACKAGES": ",".join(hidden)}
    workers = ("environment", "testing", "kernels", "sweep", "transfers", "checkpoints", "loading", "round_trip")
    modules = ", ".join(f"benchmarks.gpu.{name}" for name in ("__main__", *workers))
    code = f"import {modules}, sys; print('triton' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout) == (0, "False\n"), run.stderr
