"""Tests of the tables that ``python -m benchmarks.gpu`` prints, and of its closing summary."""

from benchmarks import measure
from benchmarks.gpu import __main__ as command
from benchmarks.gpu import loading, tables

LOAD = {
    "checkpoint": "short",
    "transposed": False,
    "seconds": 0.5,
    "again_s": [0.4, 0.3],
    "pinned_s": 0.03,
    "detail": {"read": 0.25},
    "nbytes": 10**10,
    "peak_device_bytes": 11 * 10**9,
}
MOVED = {"layer": "Mixtral-8x7B", "bytes_moved": 3 * 10**9}
RESULT = {
    "runs": [{"commit": None}, {"commit": "0123abc"}],
    "stages_s": {"tests": 31.2, "kernels": 60.0},
    "left_out": {"loads": ["ours, cold"]},
    "errors": {"sweep": "no worker"},
    "rows": {
        "environment": [
            {
                "cell": "environment",
                "found": {
                    "versions": {"torch": "2.11.0", "triton": "3.6.0"},
                    "cores": 16,
                    "date": "2026-11-23T21:00:00+00:00",
                    "commit": None,
                },
            },
            {"cell": "device", "found": {"name": "NVIDIA H100 80GB HBM3", "memory_bytes": 80 * 2**30}},
        ],
        "tests": [
            {"cell": "a"},
            {"cell": "b", "error": "assert 1 == 2"},
            {"cell": "c", "skipped": "no"},
            {"cell": "d"},
        ],
        "kernels": [
            {
                **MOVED,
                "cell": "Mixtral-8x7B: concatenate",
                "experts": 8,
                "intermediate": 14336,
                "hidden": 4096,
                "operation": "concatenate",
                "ms": {
                    "copy_": 1.0,
                    "ours": 1.25,
                    "ours, addresses known": 1.2,
                    "stack, cat, transpose": None,
                    "copy_ loop": 4.0,
                },
                "failed": {"_foreach_copy_": "killed by signal SIGSEGV"},
            },
            {"cell": "Mixtral-8x7B: split back", "error": "RuntimeError: dead"},
        ],
        "sweep": [
            {
                **MOVED,
                "cell": name,
                "operation": "interleave columns",
                "candidate": name,
                "ms": {"copy_": 1.0, "ours": ms},
            }
            for name, ms in (("64x64", 1.5), ("64x128", 1.25))
        ],
        "transfers": [
            {"cell": "to the device, at once", "gb_per_s": 50.0},
            {"cell": "pin 64 MiB", "first_s": 0.03, "again_s": 0.0001},
        ],
        "checkpoints": [
            {"cell": "short", "shape": "4 layers", "file_bytes": 5 * 10**9},
            {"cell": "long", "shape": "13 layers", "file_bytes": 15 * 10**9},
        ],
        "loads": [
            {**LOAD, "cell": "ours"},
            {**LOAD, "cell": "ours, long", "checkpoint": "long", "seconds": 0.8, "again_s": [0.6, 0.5]},
            {**LOAD, "cell": "from_pretrained", "again_s": [], "pinned_s": None, "detail": {"how": "device_map"}},
        ],
        "round trip": [{"cell": "save from the device", "seconds": 2.0, "nbytes": 5 * 10**9}],
    },
}


def test_tables_are_built_from_a_result(tmp_path, capsys):
    file = tmp_path / "gpu.json"
    measure.write_json(str(file), RESULT)
    command.main(["--table", str(file)])
    shown = capsys.readouterr().out.splitlines()
    assert shown == [
        "NVIDIA H100 80GB HBM3, 80 GiB; torch 2.11.0, triton 3.6.0; 16 cores; 2026-11-23, 0123abc",
        "",
        "Tests: 2 passed, 1 failed, 1 skipped.",
        "",
        "| layer | operation | `copy_`, GB/s | ours, ms | ours, GB/s | ours, of `copy_` | ours, addresses known, of "
        "`copy_` | stack, cat, transpose, of `copy_` | _foreach_copy_, of `copy_` | copy_ loop, of `copy_` "
        "| ours, tables too, of `copy_` | torch, by fp32, of `copy_` |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| Mixtral-8x7B (E 8, I 14336, H 4096) | concatenate | 3000 | 1.250 | 2400 | 0.80 | 0.83 | out of memory "
        "| failed | 0.25 |  |  |",
        "",
        "| layer | operation | candidate | ours, GB/s | of `copy_` |",
        "| --- | --- | --- | ---: | ---: |",
        "| Mixtral-8x7B | interleave columns | 64x128 | 2400 | 0.80 |",
        "| Mixtral-8x7B | interleave columns | 64x64 | 2000 | 0.67 |",
        "",
        "|  | GB/s | first, ms | again, ms |",
        "| --- | ---: | ---: | ---: |",
        "| to the device, at once | 50.0 |  |  |",
        "| pin 64 MiB |  | 30.00 | 0.10 |",
        "",
        "Warm page cache. short: 4 layers, 5.00 GB; long: 13 layers, 15.00 GB",
        "",
        "|  | checkpoint | seconds | again | GB/s | pinning, s | peak on the device | bus alone, of the reading |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| ours | short | 0.50 | 0.30 | 10.0 | 0.030 | 1.10x | 0.40 |",
        "| ours, long | long | 0.80 | 0.50 | 18.8 | 0.030 | 1.10x | 1.20 |",
        "| from_pretrained | short | 0.50 |  | 10.0 |  | 1.10x |  |",
        "",
        "Slope of ours: 50.0 GB/s from 5.00 to 15.00 GB, and 0.300 s.",
        "",
        "save from the device: 2.00 s, 2.5 GB/s",
    ]


def test_summary_lists_errors_omissions_and_times():
    assert tables.ending(RESULT).splitlines() == [
        "Wrong: 4",
        "- sweep: no worker",
        "- tests: b: assert 1 == 2",
        "- kernels: Mixtral-8x7B: concatenate: _foreach_copy_ is failed: killed by signal SIGSEGV",
        "- kernels: Mixtral-8x7B: split back: RuntimeError: dead",
        "Left out for want of time: 1",
        "- loads: ours, cold",
        "Took: tests 31 s, kernels 60 s",
    ]


def test_at_most_fifty_failures_are_listed():
    many = [{"cell": f"test {number}", "error": "wrong"} for number in range(60)]
    lines = tables.ending(RESULT | {"errors": {}, "rows": {"tests": many}}).splitlines()
    assert lines[0] == "Wrong: 60"
    assert len([line for line in lines if "test " in line]) == 50
    assert "- and 10 more in gpu.json" in lines


def test_result_without_some_stages_has_the_other_tables():
    rows = {stage: RESULT["rows"][stage] for stage in ("environment", "checkpoints", "loads")}
    shown = tables.markdown(RESULT | {"rows": rows})
    assert "| ours | short |" in shown
    assert "pin 64 MiB" not in shown


def test_load_of_different_tensors_has_no_result():
    rows = [
        {"cell": cell, "checkpoint": "short", "transposed": transposed, "digest": digest, "seconds": 12345.0}
        for cell, transposed, digest in (("a", False, "1"), ("b", False, "2"), ("c", True, "2"))
    ]
    [wrong] = loading.mark_unequal([*rows, {"cell": "d", "error": "dead"}])
    assert (wrong["cell"], wrong["wrong"]) == ("b", {"load": "not the tensors that 'a' made"})
    shown = tables.markdown(RESULT | {"rows": RESULT["rows"] | {"loads": [wrong]}})
    assert "12345" not in shown
