"""benchmarks.peers: all ways make the same tensors, a warm cache is warm, and what is printed is what was measured."""

import csv
import json

import pytest

from automodel_conv.planning.registry import transformers_available
from benchmarks import measure, shapes
from benchmarks.peers import __main__ as peers
from benchmarks.peers import cache, overlay, sweep, tables
from benchmarks.peers.methods import METHODS
from benchmarks.peers.roofs import ROOFS
from benchmarks.peers.worker import LAYOUTS, Job, variables, work

pytestmark = pytest.mark.skipif(not transformers_available(), reason="benchmarks build models of transformers")
HERE = [name for name, method in METHODS.items() if method.installed]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("small")
    shapes.write_checkpoint(shapes.SMALL, str(directory))
    return str(directory)


def test_all_that_is_installed_makes_the_same_tensors(checkpoint):
    digests = {}
    for layout in LAYOUTS:
        for method in HERE:
            [load] = work(Job(method, [(checkpoint, 2)], checkpoint, layout), 0)
            digests.setdefault(layout, set()).add(load["digest"])
            assert load["seconds"] > 0
            assert load["cached_share"] == 1
    assert [len(found) for found in digests.values()] == [1, 1]
    assert len(set.union(*digests.values())) == 2


@pytest.mark.parametrize("name", [name for name, roof in ROOFS.items() if "warm" in roof.caches])
def test_roofs_run(checkpoint, name):
    [load] = work(Job(name, [(checkpoint, 2)], checkpoint, ""), 0)
    assert load["seconds"] > 0
    assert load["digest"] is None


def test_a_point_that_would_take_too_long_is_left_out(checkpoint):
    job = Job("ours", [(checkpoint, 1)] * 2, checkpoint, growth=[1.0, 1e9], most_seconds=10.0)
    first, second = work(job, 1)
    assert first["seconds"] > 0
    assert second["expected_seconds"] > 10
    assert "seconds" not in second


def test_what_was_read_is_in_the_page_cache(checkpoint):
    measure.read_through(checkpoint)
    assert cache.cached_share(checkpoint) == 1


def test_only_a_warm_cache_is_asked_for_by_those_who_read_past_it():
    assert variables("warm")["FASTSAFETENSORS_ODIRECT"] == "0"
    assert "FASTSAFETENSORS_ODIRECT" not in variables("cold")
    assert variables("cold")["THP_MEM_ALLOC_ENABLE"] == "1"
    assert "THP_MEM_ALLOC_ENABLE" not in variables("cold", huge_pages=False)


def test_every_peer_is_pinned():
    pins = overlay.PINS.read_text()
    for method in METHODS.values():
        assert method.installed or f"{method.package}==" in pins


def test_runs_become_a_table_and_the_file_becomes_markdown(tmp_path, capsys):
    file = tmp_path / "result.json"
    arguments = ["--size", "small", "--repetitions", "1", "--threads", "1", "--cache", "warm", "--json", str(file)]
    peers.main([*arguments, "--method", "safetensors-copy", "--method", "ours", "--directory", str(tmp_path)])
    shown = capsys.readouterr().out
    assert "bare preadv" in shown
    assert "safetensors, copy_" in shown
    result = json.loads(file.read_text())
    assert {(row["method"], row["layout"]) for row in result["rows"]} == {
        *((name, "") for name, roof in ROOFS.items() if "warm" in roof.caches),
        *((name, layout) for name in ("safetensors-copy", "ours") for layout in LAYOUTS),
    }
    assert all(len(row["runs"]) == 1 for row in result["rows"])
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]
    peers.main(["--from", str(file)])
    lines = capsys.readouterr().out.splitlines()
    assert sum("**automodel_conv" in line for line in lines) == 2


def _row(method, layout, digest, seconds=1.0):
    run = dict.fromkeys(("cpu_seconds", "minor_faults", "major_faults", "called_bytes", "mapped_bytes"), 0)
    run |= {"seconds": seconds, "anonymous_bytes": 10, "resident_bytes": 20, "digest": digest}
    return {"method": method, "title": method, "version": "1", "layout": layout, "cache": "warm", "runs": [run]}


def test_tensors_that_differ_give_no_table():
    tables.check([_row("a", "x", "1"), _row("b", "x", "1"), _row("a", "y", "2")])
    with pytest.raises(RuntimeError, match="do not make the same tensors"):
        tables.check([_row("a", "x", "1"), _row("b", "x", "2")])


def test_ratios_are_to_ours_of_the_same_layout_and_to_the_roof():
    rows = [_row("preadv", "", None, 0.5), _row("a", "x", "1", 3.0), _row("ours", "x", "1", 1.0)]
    text = tables.markdown({"rows": rows, "file_bytes": 10})
    [line] = [line for line in text.splitlines() if line.startswith("| a (1)")]
    assert "| 3.00x | 0.17 |" in line


def test_a_sweep_becomes_a_csv(tmp_path):
    lines = sweep.run("threads", ["ours"], 1, 64, str(tmp_path))
    sweep.write(lines, tmp_path / "sweep-threads.csv")
    with (tmp_path / "sweep-threads.csv").open(newline="") as file:
        found = list(csv.DictReader(file))
    assert [line["x"] for line in found] == ["1", "2", "4", "8"]
    assert all(float(line["seconds"]) > 0 for line in found)
    assert [path.name for path in tmp_path.iterdir()] == ["sweep-threads.csv"]


@pytest.mark.parametrize("axis", sweep.AXES)
def test_points_of_an_axis_are_in_order_and_of_like_bytes(axis):
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
