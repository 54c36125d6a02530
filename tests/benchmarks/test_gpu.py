"""``python -m benchmarks.gpu`` without a GPU: all of it runs, and nothing wrong is timed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from automodel_conv.kernels.interleave import deinterleave_variant, interleave_variant
from automodel_conv.kernels.transpose import transpose_variant
from automodel_conv.planning.registry import transformers_available
from benchmarks import measure, operations
from benchmarks.gpu import __main__ as command
from benchmarks.gpu import kernels, loading, tables, transfers
from benchmarks.quantized import QUANTIZED

HIDE = Path(__file__).parents[1] / "hide"
CPU = torch.device("cpu")
CHOOSERS = (transpose_variant, interleave_variant, deinterleave_variant)


@pytest.fixture
def needs_both():
    pytest.importorskip("triton")
    if not transformers_available():
        pytest.skip("the command builds models of transformers")


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Where the result goes, and a test that passes in place of tests/gpu, which runs beside these tests."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    (tmp_path / "test_right.py").write_text("def test_right():\n    pass\n")
    return tmp_path


def arguments(files, test="test_right.py"):
    return ["--smoke", "--json", str(files / "result.json"), "--tests", str(files / test), "--directory", str(files)]


def found(files):
    return json.loads((files / "result.json").read_text())


def test_the_whole_command_runs_and_writes_what_it_measured(files, needs_both):
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", *arguments(files)],
        cwd=measure.REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    result = found(files)
    assert result["errors"] == {}
    assert result["environment"]["versions"]["torch"] == torch.__version__
    rows = {(row["layer"], row["operation"]) for row in result["kernels"]}
    assert rows == {(layer.name, name) for layer in kernels.SMOKE_LAYERS for name in (*kernels.MEASURED, *QUANTIZED)}
    assert all(min(row["ms"].values()) > 0 for row in result["kernels"])
    assert set(result["loads"]["runs"]) == set(loading.METHODS)
    assert all(run["seconds"] > 0 for runs in result["loads"]["runs"].values() for run in runs)
    assert result["transfers"]["compilation"]["first_call_s"] > 0
    assert set(result["stages_s"]) == {"tests", "kernels", "checkpoint", "transfers", "loads"}
    assert run.stdout == tables.markdown(result)
    assert sorted(path.name for path in files.iterdir() if path.name != "__pycache__") == [
        "result.json",
        "test_right.py",
    ]


def test_nothing_is_timed_after_a_test_that_failed(files, monkeypatch):
    (files / "test_wrong.py").write_text("def test_wrong():\n    assert False\n")
    monkeypatch.setattr(kernels, "median_ms", lambda *_: pytest.fail("timed"))
    with pytest.raises(command.TestsFailed, match=r"test_wrong\.py failed; nothing was timed"):
        command.main(arguments(files, "test_wrong.py"))
    assert set(found(files)["stages_s"]) == {"tests"}
    assert "kernels" not in found(files)


def test_a_kernel_that_writes_one_wrong_byte_is_not_timed(files, needs_both, monkeypatch):
    def wrong(dst, src):
        right(dst, src)
        if not isinstance(dst, list):
            return
        dst[-1].view(torch.uint8)[-1, -1] ^= 1

    right = operations.KERNELS["transpose"]
    monkeypatch.setitem(operations.KERNELS, "transpose", wrong)
    timed = []
    monkeypatch.setattr(kernels, "measure_case", lambda case, device: measured(case, device, timed))
    with pytest.raises(operations.Mismatch, match="ours: expert 1"):
        command.main(arguments(files))
    assert set(timed) == {"strided_copy"}  # what comes before it
    assert {row["operation"] for row in found(files)["kernels"]} == set(list(kernels.MEASURED)[:3])
    assert "loads" not in found(files)


measure_case = kernels.measure_case


def measured(case, device, timed):
    return measure_case(case, device, lambda *_: timed.append(case.verb) or 1.0)


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


def test_all_ways_of_loading_make_the_same_tensors(tmp_path, needs_both):
    command.write(command.SMALL, str(tmp_path / "big"), str(tmp_path / "small"))
    runs = {
        method: loading.work(method, str(tmp_path / "big"), str(tmp_path / "small"), CPU, 1, first=True)
        for method in loading.METHODS
    }
    for transposed in (False, True):
        assert len({runs[m]["digest"] for m in runs if loading.METHODS[m][1] == transposed}) == 1
    assert runs["ours"]["digest"] != runs["ours, nemo"]["digest"]


def test_loads_that_differ_give_no_number(monkeypatch, capsys):
    monkeypatch.setattr(measure, "run_worker", lambda arguments, *_, **__: {"digest": arguments[2], "seconds": 12345.0})
    monkeypatch.setattr(measure, "read_through", lambda _: 0)
    with pytest.raises(operations.Mismatch, match="do not make the same tensors"):
        loading.measure_loads("", "", CPU, 1, 1, 0.0)
    assert "12345" not in "".join(capsys.readouterr())


def test_rounds_of_loads_end_with_the_time(monkeypatch):
    monkeypatch.setattr(measure, "run_worker", lambda *_, **__: {"digest": "", "seconds": 1.0})
    monkeypatch.setattr(measure, "read_through", lambda _: 0)
    assert {len(runs) for runs in loading.measure_loads("", "", CPU, 1, 5, 0.0).values()} == {1}
    assert {len(runs) for runs in loading.measure_loads("", "", CPU, 1, 5, float("inf")).values()} == {5}


def test_a_stage_that_breaks_is_told_and_the_next_begins(files, needs_both, monkeypatch, capsys):
    monkeypatch.setattr(kernels, "measure_layers", lambda *_: iter([]))
    monkeypatch.setattr(transfers, "cold_compilation", lambda timeout_s: 1 / 0)
    monkeypatch.setattr(loading, "measure_loads", lambda *_: {"ours": [RUN]})
    with pytest.raises(SystemExit, match="broken: transfers"):
        command.main(arguments(files))
    assert "ZeroDivisionError" in found(files)["errors"]["transfers"]
    assert found(files)["loads"]["runs"] == {"ours": [RUN]}
    assert "| ours | 2.00 |" in capsys.readouterr().out


def test_a_sweep_launches_other_tiles():
    bf16 = torch.bfloat16
    for tile in kernels.TILES:
        with kernels.tiles(tile):
            variants = [choose(bf16, bf16, 16, 16) for choose in CHOOSERS]
        assert [(v.tile_rows, v.tile_columns) for v in variants] == [tile] * 3


def test_without_a_device_the_command_says_how_to_try_it(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a device")
    with pytest.raises(SystemExit):
        command.main([])
    assert "--smoke" in capsys.readouterr().err


def test_the_command_needs_none_of_the_packages_that_only_printing_needs():
    hidden = ("accelerate", "psutil", "pytest_benchmark", "rich", "tqdm", "typer", "xdist")
    path = os.pathsep.join([str(HIDE), str(measure.REPOSITORY)])
    environment = os.environ | {"PYTHONPATH": path, "HIDDEN_PACKAGES": ",".join(hidden)}
    code = "import benchmarks.gpu.__main__, sys; print('triton' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout) == (0, "False\n"), run.stderr


# --- tables -----------------------------------------------------------------------------------------------------------

RUN = {"seconds": 2.0, "detail": {"read": 1.6}, "nbytes": 10**10, "peak_device_bytes": 11 * 10**9}
RESULT = {
    "environment": {
        "versions": {"torch": "2.11.0", "triton": "3.6.0"},
        "cores": 16,
        "date": "2026-11-23T21:00:00+00:00",
        "commit": "0123abc",
    },
    "device": {"name": "NVIDIA H100 80GB HBM3", "memory_bytes": 80 * 2**30},
    "kernels": [
        {
            "layer": "Mixtral-8x7B",
            "experts": 8,
            "intermediate": 14336,
            "hidden": 4096,
            "operation": "concatenate",
            "bytes_moved": 3 * 10**9,
            "ms": {
                "copy_": 1.0,
                "ours": 1.25,
                "ours, addresses known": 1.2,
                "stack, cat, transpose": None,
                "_foreach_copy_": 2.0,
                "copy_ loop": 4.0,
            },
        }
    ],
    "sweep": [
        {
            "layer": "Mixtral-8x7B",
            "operation": "interleave columns",
            "tile": [64, 128],
            "bytes_moved": 3 * 10**9,
            "ms": {"copy_": 1.0, "ours": 1.25},
        }
    ],
    "transfers": {
        "threads": 16,
        "host_to_device_gb_per_s": 50.0,
        "preadv_gb_per_s": 40.0,
        "compilation": {"first_call_s": 1.234, "second_call_s": 0.0001},
    },
    "loads": {
        "shape": "4 layers",
        "file_bytes": 10**10,
        "runs": {
            "ours": [RUN, RUN | {"seconds": 2.5}, RUN | {"seconds": 4.0}],
            "from_pretrained": [RUN | {"seconds": 5.0, "detail": "device_map", "peak_device_bytes": 2 * 10**10}],
        },
    },
}


def test_tables_are_made_from_a_result(tmp_path, capsys):
    file = tmp_path / "result.json"
    measure.write_json(str(file), RESULT)
    command.main(["--table", str(file)])
    assert capsys.readouterr().out.splitlines() == [
        "NVIDIA H100 80GB HBM3, 80 GiB; torch 2.11.0, triton 3.6.0; 16 cores; 2026-11-23, 0123abc",
        "",
        "| layer | operation | `copy_`, GB/s | ours, ms | ours, GB/s | ours, of `copy_` | ours, addresses known, of "
        "`copy_` | stack, cat, transpose, of `copy_` | _foreach_copy_, of `copy_` | copy_ loop, of `copy_` "
        "| ours, tables too, of `copy_` | torch, by fp32, of `copy_` |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| Mixtral-8x7B (E 8, I 14336, H 4096) | concatenate | 3000 | 1.250 | 2400 | 0.80 | 0.83 |  | 0.50 | 0.25 |  |  |",  # noqa: E501
        "",
        "| layer | operation | tile | ours, GB/s | of `copy_` |",
        "| --- | --- | --- | ---: | ---: |",
        "| Mixtral-8x7B | interleave columns | 64x128 | 2400 | 0.80 |",
        "",
        "Pinned memory to the device 50.0 GB/s; `preadv` into pinned memory 40.0 GB/s with 16 threads; first call of a "
        "kernel 1.23 s (an empty cache), the second 0.10 ms.",
        "",
        "4 layers, 10.00 GB, warm page cache:",
        "",
        "|  | seconds | GB/s | peak on the device | host to device alone, of the reading |",
        "| --- | ---: | ---: | ---: | ---: |",
        "| ours | 2.50 | 4.0 | 1.10x | 0.12 |",
        "| from_pretrained | 5.00 | 2.0 | 2.00x |  |",
    ]


def test_a_result_without_some_stages_has_the_other_tables():
    shown = tables.markdown({key: RESULT[key] for key in ("environment", "device", "loads")})
    assert "| ours | 2.50 |" in shown
    assert "preadv" not in shown
