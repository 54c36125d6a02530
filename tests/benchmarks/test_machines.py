"""Tests of benchmarks.peers.machines: each state is set up, ends with its block, and reports if it is impossible."""

import json
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from automodel_conv.upstream.registry import transformers_available
from benchmarks import measure, memory, shapes
from benchmarks.peers import __main__ as peers
from benchmarks.peers import cache, machines, tables
from benchmarks.peers.machines import MACHINES, Machine, State, Unavailable
from benchmarks.peers.running import run_jobs
from benchmarks.peers.worker import Job

pytestmark = pytest.mark.skipif(not transformers_available(), reason="benchmarks build transformers models")


@pytest.fixture
def checkpoint(tmp_path):
    shapes.write_checkpoint(shapes.SMALL, str(tmp_path / "files"))
    return str(tmp_path / "files")


@pytest.fixture
def root(tmp_path):
    (tmp_path / "root").mkdir()
    return str(tmp_path / "root")


@contextmanager
def set_up(name, checkpoint, root):
    try:
        with MACHINES[name].make(checkpoint, root, False) as state:
            yield state
    except Unavailable as error:
        pytest.skip(str(error))


def test_page_cache_holds_another_file(checkpoint, root):
    with set_up("page-cache-full", checkpoint, root) as state:
        assert cache.cached_share(root) == 1
        assert Path(root, "other").stat().st_blocks == 0
        cache.evict(root)
        state.before()
        assert cache.cached_share(root) == 1


def test_fragmenting_process_holds_a_sixteenth_of_memory():
    command = [sys.executable, "-m", "benchmarks.peers.holding", str(512 << 20)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=measure.REPOSITORY) as helper:
        for _ in range(2):
            helper.stdin.write(b"\n")
            helper.stdin.flush()
            assert helper.stdout.readline() == b"held\n"
            status = Path(f"/proc/{helper.pid}/status").read_text().splitlines()
            anonymous = next(int(line.split()[1]) << 10 for line in status if line.startswith("RssAnon"))
            assert 32 << 20 <= anonymous <= 96 << 20
        helper.stdin.close()
    assert helper.returncode == 0


def test_memory_is_fragmented_before_each_run_until_the_block_ends(checkpoint, root, monkeypatch):
    started = []
    popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: started.append(popen(*a, **k)) or started[-1])
    with set_up("fragmented", checkpoint, root) as state:
        state.before()
        state.before()
        assert started[0].poll() is None
    assert started[0].returncode == 0


def test_files_on_overlayfs_are_the_same_and_leave_no_mount(checkpoint, root):
    with set_up("overlayfs", checkpoint, root) as state:
        shown = subprocess.run([*state.prefix, "ls", state.directory], capture_output=True, text=True, check=True)
        assert shown.stdout.split() == sorted(os.listdir(checkpoint))
        assert os.listdir(state.directory) == []


def test_two_loads_wait_for_each_other_before_they_begin(checkpoint, root):
    with set_up("two-loads", checkpoint, root) as state:
        results = run_jobs({"a": Job("preadv", [(checkpoint, 1)], checkpoint, "")}, 1, state)
    assert results["a"][0]["seconds"] > 0


def test_slower_of_two_loads_counts(checkpoint, monkeypatch):
    seconds, met = [3.0, 1.0, 1.0, 3.0], []

    def run_worker(command, *_, **__):
        met.append(json.loads(command[-1])["meet"])
        return {"loads": [{"seconds": seconds.pop(), "digest": None}]}

    monkeypatch.setattr(measure, "run_worker", run_worker)
    jobs = {"a": Job("preadv", [(checkpoint, 1)], checkpoint, "")}
    results = run_jobs(jobs, 2, State(checkpoint, loads=2))
    assert [load["seconds"] for load in results["a"]] == [3.0, 3.0]
    assert len(set(met)) == 2
    assert None not in met


def test_limited_process_is_in_its_group(checkpoint, tmp_path, monkeypatch):
    group = tmp_path / f"benchmark-{os.getpid()}"
    monkeypatch.setattr(machines, "_parent_group", lambda: tmp_path)
    monkeypatch.setattr(Path, "exists", lambda path: False)  # no systemd
    monkeypatch.setattr(Path, "rmdir", lambda path: None)  # cgroup file systems remove the files inside
    with MACHINES["memory-limit"].make(checkpoint, "", True) as state:
        assert int((group / "memory.max").read_text()) == int(1.15 * measure.file_bytes(checkpoint)) + (320 << 20)
        run = subprocess.run([*state.prefix, "sh", "-c", "echo $$"], capture_output=True, text=True, check=True)
        assert (group / "cgroup.procs").read_text() == run.stdout


def test_killed_worker_is_reported(checkpoint, monkeypatch):
    kill = ["-c", "import os; os.kill(os.getpid(), 9)"]
    for prefix in ((), ("sh", "-c", '"$@"; exit $?', "sh")):
        with pytest.raises(measure.Killed):
            measure.run_worker(kill, 0, prefix=prefix)
    worker = measure.run_worker
    monkeypatch.setattr(measure, "run_worker", lambda *_, **__: worker(kill, 0))
    jobs = {"a": Job("preadv", [(checkpoint, 1)], checkpoint, "")}
    assert run_jobs(jobs, 1, State(checkpoint)) == {"a": [{"killed": True}]}


def test_impossible_state_is_in_the_result_with_its_reason(tmp_path, monkeypatch):
    @contextmanager
    def make(checkpoint, root, fully):
        raise Unavailable("no rights\nat all")
        yield

    monkeypatch.setitem(MACHINES, "overlayfs", Machine("files on overlayfs", make))
    result = peers.run(
        shapes.SMALL, ["overlayfs"], list(memory.MEMORY), None, ["[E, 2I, H]"], ["warm"], 1, 1, str(tmp_path)
    )
    assert result["not_made"] == {"overlayfs": "no rights\nat all"}
    text = tables.markdown({"environment": measure.environment(), **result})
    assert "\n*files on overlayfs: cannot be set up here (no rights at all)*\n" in text
    assert os.listdir(tmp_path) == []


def test_skipped_page_cache_state_is_in_the_result_with_its_reason(tmp_path):
    result = peers.run(
        shapes.SMALL, ["cold-cache"], [memory.READY], None, ["[E, 2I, H]"], ["warm"], 1, 1, str(tmp_path)
    )
    assert result["rows"] == []
    assert result["not_made"] == {"cold-cache": "it needs --cache cold"}
