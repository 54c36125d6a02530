"""Tests of benchmarks.peers: all methods load the same tensors, a warm cache is warm, and tables show measurements."""

import csv
import json
import mmap
import sys
from pathlib import Path

import pytest

import automodel_conv as amc
from automodel_conv.execution import page_calls
from automodel_conv.upstream.registry import transformers_available
from benchmarks import measure, memory, shapes
from benchmarks.peers import __main__ as peers
from benchmarks.peers import cache, overlay, pairs, running, sweep, tables
from benchmarks.peers.machines import State
from benchmarks.peers.methods import METHODS
from benchmarks.peers.roofs import ROOFS
from benchmarks.peers.worker import LAYOUTS, Job, variables, work

pytestmark = pytest.mark.skipif(not transformers_available(), reason="benchmarks build transformers models")
HERE = [name for name, method in METHODS.items() if method.installed]


@pytest.fixture
def page_sizes(monkeypatch):
    """Record the page sizes that the loader receives."""
    load, sizes = amc.load_state_dict, []

    def load_state_dict(*arguments, **options):
        sizes.append(options.get("huge_pages", "nothing"))
        return load(*arguments, **options)

    monkeypatch.setattr(amc, "load_state_dict", load_state_dict)
    return sizes


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("small")
    shapes.write_checkpoint(shapes.SMALL, str(directory))
    return str(directory)


def test_all_installed_methods_load_the_same_tensors(checkpoint, page_sizes):
    digests = {}
    for layout in LAYOUTS:
        for method in HERE:
            [load] = work(Job(method, [(checkpoint, 2)], checkpoint, layout), 0)
            digests.setdefault(layout, set()).add(load["digest"])
            assert load["seconds"] > 0
            assert load["cached_share"] == 1
    assert [len(results) for results in digests.values()] == [1, 1]
    assert len(set.union(*digests.values())) == 2


def test_loader_gets_a_page_size_only_in_rows_that_name_one(checkpoint, page_sizes):
    reading = []
    for method in ("ours", "ours-huge", "ours-small"):
        [load] = work(Job(method, [(checkpoint, 2)], checkpoint, memory=memory.AS_FOUND), 1)
        reading.append(load["read_seconds"] / load["seconds"])
    assert page_sizes == ["nothing"] * 2 + [True] * 2 + [False] * 2
    assert all(0 < share < 1 for share in reading)


@pytest.mark.parametrize("name", [name for name, roof in ROOFS.items() if "warm" in roof.caches])
def test_roofs_run(checkpoint, name):
    [load] = work(Job(name, [(checkpoint, 2)], checkpoint, ""), 0)
    assert load["seconds"] > 0
    assert load["digest"] is None


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can populate pages")
def test_only_the_small_page_roof_populates_pages_before_the_read(checkpoint, monkeypatch):
    populate_pages, populated = page_calls.populate_pages, []
    monkeypatch.setattr(
        page_calls, "populate_pages", lambda *pages: populated.append(pages[1]) or populate_pages(*pages)
    )
    files = [path.stat().st_size for path in Path(checkpoint).glob("*.safetensors")]
    ROOFS["preadv"].prepare(checkpoint, 1)()
    assert populated == []
    buffers = ROOFS["preadv-small"].prepare(checkpoint, 1)()
    assert sum(files) - 2 * len(files) * mmap.PAGESIZE <= sum(populated) <= sum(files)
    assert sum(int(buffer.count_nonzero()) for buffer in buffers) > sum(files) // 2


def test_point_that_would_take_too_long_is_left_out(checkpoint):
    job = Job("ours", [(checkpoint, 1)] * 2, checkpoint, growth=[1.0, 1e9], most_seconds=10.0)
    first, second = work(job, 1)
    assert first["seconds"] > 0
    assert second["expected_seconds"] > 10
    assert "seconds" not in second


def test_read_file_is_in_the_page_cache(checkpoint):
    measure.read_through(checkpoint)
    assert cache.cached_share(checkpoint) == 1


def test_direct_reads_are_turned_off_only_for_a_warm_cache():
    assert variables("warm")["FASTSAFETENSORS_ODIRECT"] == "0"
    assert "FASTSAFETENSORS_ODIRECT" not in variables("cold")
    assert variables("cold")["THP_MEM_ALLOC_ENABLE"] == "1"
    assert "THP_MEM_ALLOC_ENABLE" not in variables("cold", huge_pages=False)


def test_memory_is_touched_beforehand_only_to_make_it_ready(checkpoint, monkeypatch):
    touched = []
    monkeypatch.setattr(memory, "ready_memory", touched.append)
    for state in memory.MEMORY:
        work(Job("preadv", [(checkpoint, 2)], checkpoint, "", memory=state), 1)
    assert touched == [3 * measure.file_bytes(checkpoint)]


def test_runner_waits_before_loads_with_memory_as_found(checkpoint, monkeypatch):
    waited = []
    monkeypatch.setattr(memory.time, "sleep", waited.append)
    monkeypatch.setattr(measure, "run_worker", lambda *_, **__: {"loads": [{"seconds": 1.0}]})
    for state in memory.MEMORY:
        running.run_jobs({"a": Job("preadv", [(checkpoint, 2)], checkpoint, "", memory=state)}, 2, State(checkpoint))
    assert waited == [30.0, 30.0]


def test_memory_of_files_that_leave_the_page_cache_is_free_before_the_wait(checkpoint, monkeypatch):
    measure.read_through(checkpoint)
    cached = []
    monkeypatch.setattr(memory.time, "sleep", lambda _: cached.append(cache.cached_share(checkpoint)))
    monkeypatch.setattr(measure, "run_worker", lambda *_, **__: {"loads": [{"seconds": 1.0}]})
    job = Job("preadv", [(checkpoint, 2)], checkpoint, "", "cold", memory=memory.AS_FOUND)
    running.run_jobs({"a": job}, 1, State(checkpoint))
    assert cached == [0]


def test_torch_requests_huge_pages_only_in_rows_that_name_them(checkpoint, monkeypatch):
    methods_by_memory = {}

    def run_worker(command, repetition, variables, prefix):
        job = json.loads(command[-1])
        if "THP_MEM_ALLOC_ENABLE" in variables:
            methods_by_memory.setdefault(job["memory"], set()).add(job["method"])
        return {"loads": [{"seconds": 1.0}]}

    monkeypatch.setattr(measure, "run_worker", run_worker)
    monkeypatch.setattr(memory, "wait", lambda state: None)
    for state in memory.MEMORY:
        layouts = list(LAYOUTS)[:1]
        jobs = peers.jobs_of(list(METHODS), layouts, ["warm"], state, checkpoint, checkpoint, 1)
        running.run_jobs(jobs, 1, State(checkpoint))
    by_itself = {"transformers-as-it-comes", "ours", "ours-huge", "ours-small"}
    assert methods_by_memory == {memory.READY: set(METHODS) - by_itself, memory.AS_FOUND: {"transformers"}}


def test_every_peer_is_pinned():
    pins = overlay.PINS.read_text()
    for method in METHODS.values():
        assert method.installed or f"{method.package}==" in pins


@pytest.mark.long
def test_runs_become_a_table_and_the_file_becomes_markdown(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(memory, "RETURN_SECONDS", 0.0)
    file, layout = tmp_path / "result.json", next(iter(LAYOUTS))
    arguments = ["--size", "small", "--repetitions", "1", "--threads", "1", "--cache", "warm", "--json", str(file)]
    peers.main([*arguments, "--method", "ours", "--layout", layout, "--directory", str(tmp_path)])
    shown = capsys.readouterr().out
    assert "bare preadv" in shown
    assert "memory as found" in shown
    result = json.loads(file.read_text())
    assert {(row["memory"], row["method"], row["layout"]) for row in result["rows"]} == {
        *((state, name, "") for name, r in ROOFS.items() if "warm" in r.caches for state in r.memory),
        *((state, "ours", layout) for state in memory.MEMORY),
    }
    assert all(len(row["runs"]) == 1 for row in result["rows"])
    assert all(run["free_bytes"] >= run["free_huge_bytes"] > 0 for row in result["rows"] for run in row["runs"])
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]
    peers.main(["--from", str(file)])
    lines = capsys.readouterr().out.splitlines()
    assert sum("**automodel_conv" in line for line in lines) == 2


ENVIRONMENT = {"cores": 2, "machine": "x86_64", "kernel": "6.18"}


def _row(method, layout, digest, seconds=1.0, state=memory.READY, machine="quiet"):
    run = dict.fromkeys(("cpu_seconds", "minor_faults", "major_faults", "called_bytes", "mapped_bytes"), 0)
    run |= {"seconds": seconds, "anonymous_bytes": 10, "resident_bytes": 20, "digest": digest}
    row = {"method": method, "title": method, "version": "1", "layout": layout, "cache": "warm"}
    return row | {"memory": state, "machine": machine, "runs": [run]}


def _markdown(rows, environment=(), not_made=()):
    about = ENVIRONMENT | dict(environment)
    return tables.markdown({"environment": about, "rows": rows, "file_bytes": 10, "not_made": dict(not_made)})


def test_different_tensors_give_no_table():
    tables.check([_row("a", "x", "1"), _row("b", "x", "1"), _row("a", "y", "2")])
    with pytest.raises(RuntimeError, match="do not produce the same tensors"):
        tables.check([_row("a", "x", "1"), _row("b", "x", "2")])
    with pytest.raises(RuntimeError, match="do not produce the same tensors"):
        tables.check([_row("a", "x", "1"), _row("a", "x", "2", state=memory.AS_FOUND)])


def test_ratios_use_ours_of_the_same_layout_and_memory_and_the_faster_roof():
    rows = [_row("preadv", "", None, 0.5), _row("preadv-small", "", None, 0.75), _row("preadv-touched", "", None, 0.1)]
    rows += [_row("a", "x", "1", 3.0), _row("ours", "x", "1", 1.0), _row("ours", "y", "1", 9.0)]
    rows += [_row(m, "x", "1", 2.0, memory.AS_FOUND) for m in ("a", "ours")]
    rows += [_row("preadv", "", None, 2.0, memory.AS_FOUND), _row("preadv-small", "", None, 1.5, memory.AS_FOUND)]
    ready, as_found = (line for line in _markdown(rows).splitlines() if line.startswith("| a (1)"))
    assert "| 3.00x | 0.17 |" in ready
    assert "| 1.00x | 0.75 |" in as_found


def test_killed_method_has_no_result_and_is_no_reference():
    killed = _row("preadv", "", None) | {"runs": [{"killed": True}]}
    rows = [killed, _row("preadv-small", "", None, 0.5), _row("ours", "x", "1", 1.0)]
    tables.check([killed | {"layout": "x"}, rows[-1]])
    text = _markdown(rows)
    assert "| preadv (1) | killed |" in text
    assert "**0.50**" in text


def test_table_describes_the_machine():
    assert _markdown([]).startswith("2 cores of x86_64; Linux 6.18.\n")
    known = {"cpu": "Some CPU", "memory_bytes": 24 << 30, "huge_pages": "always [madvise] never"}
    text = _markdown([], known | {"touched_gb_per_s": {"freed_just_now": 4.7, "freed_long_ago": 0.5}})
    assert text.startswith("2 cores of Some CPU; 24 GiB; Linux 6.18; transparent huge pages: madvise; ")
    assert "at 4.7 GB/s if it was freed just now, at 0.5 GB/s if 30 s ago: free memory goes back to the host." in text
    kept = {"touched_gb_per_s": {"freed_just_now": 4.7, "freed_long_ago": 4.0}}
    assert "free memory stays with the machine." in _markdown([], kept)


def test_speed_of_touching_memory_is_measured():
    speeds = memory.touch_speeds(4 << 20, 1, 0.0)
    assert set(speeds) == {"freed_just_now", "freed_long_ago"}
    assert min(speeds.values()) > 0


def test_pairs_are_compared_one_by_one():
    def runs(*seconds):
        return [{"seconds": one, "read_seconds": one / 2} for one in seconds]

    result = {"environment": ENVIRONMENT, "against": "ours-small"}
    result["runs"] = {"ours": runs(1.0, 4.0, 3.0), "ours-small": runs(1.0, 2.0, 3.0)}
    assert "whole load, 3 pairs: 1.00 (1.00-1.60)x, at worst 2.00x" in list(pairs.lines(result))


def test_sweep_becomes_a_csv(tmp_path):
    lines = sweep.run("threads", ["ours"], 1, 64, str(tmp_path))
    sweep.write(lines, tmp_path / "sweep-threads.csv")
    with (tmp_path / "sweep-threads.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [line["x"] for line in rows] == ["1", "2", "4", "8"]
    assert all(float(line["seconds"]) > 0 for line in rows)
    assert [path.name for path in tmp_path.iterdir()] == ["sweep-threads.csv"]


@pytest.mark.parametrize("axis", sweep.AXES)
def test_points_of_an_axis_are_in_order_and_of_similar_size(axis):
    points = sweep.AXES[axis].points(1)
    xs = [point.x for point in points]
    assert xs == sorted(set(xs))
    if axis in ("tensors", "size"):
        sizes = []
        for _, shape, _ in points:
            config = shape.config
            expert = 6 * config["hidden_size"] * config["moe_intermediate_size"]
            sizes.append(config["num_hidden_layers"] * config["num_experts"] * expert)
        assert max(sizes) < 1.35 * min(sizes)
