"""The command line: what it prints, what it reads, and how it ends."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

import automodel_conv
from automodel_conv import demo
from automodel_conv.cli import app, show_demo
from automodel_conv.files import system
from automodel_conv.planning.plan import CopyPlan
from automodel_conv.planning.registry import transformers_available

HIDE = Path(__file__).parent / "hide"
GATE_UP = "model.layers.1.mlp.experts.gate_up_proj"

needs_transformers = pytest.mark.skipif(not transformers_available(), reason="builds a model of transformers")


@pytest.fixture(scope="module")
def moe(tmp_path_factory):
    directory = tmp_path_factory.mktemp("moe")
    demo.write_checkpoint(demo.TINY, str(directory))
    return directory


@pytest.fixture
def plain(tmp_path):
    save_file(
        {"a.weight": torch.arange(6.0).view(2, 3), "b": torch.ones(2)},
        tmp_path / "model.safetensors",
    )
    return tmp_path


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def bytes_of_headers(directory: Path) -> dict[str, int]:
    lengths = {}
    for path in directory.glob("*.safetensors"):
        with path.open("rb") as file:
            lengths[str(path)] = 8 + int.from_bytes(file.read(8), "little")
    return lengths


@pytest.fixture
def no_tensor_data(monkeypatch):
    """Fails every read of a weights file that goes beyond its header; the index has no data."""

    def preadv(fd, views, offset):
        path = os.readlink(f"/proc/self/fd/{fd}")
        if path.endswith(".safetensors"):
            header = 8 + int.from_bytes(os.pread(fd, 8, 0), "little")
            if offset + sum(map(len, views)) > header:
                raise AssertionError(f"{path}: read beyond the header")
        return os.preadv(fd, views, offset)

    if sys.platform != "linux":
        pytest.skip("asks /proc which file a descriptor is")
    monkeypatch.setattr(system, "preadv", preadv)


def test_plan_without_a_model_prints_a_summary_from_headers_alone(plain, no_tensor_data):
    result = run("plan", plain, "--no-model", "--explain", "a.weight")
    assert result.exit_code == 0, result.output
    assert "reads 0.000 GB" in result.stdout
    assert "a.weight  F32 [2, 3]  24 bytes  (read)" in result.stdout


def test_reading_tensor_data_is_noticed(plain, no_tensor_data):
    with pytest.raises(AssertionError, match="beyond the header"):
        automodel_conv.load_state_dict(plain, rules=[])


@needs_transformers
def test_plan_explains_where_every_part_of_a_target_comes_from(moe, no_tensor_data):
    result = run("plan", moe, "--explain", GATE_UP)
    assert result.exit_code == 0, result.output
    assert f"{GATE_UP}  BF16 [3, 64, 64]" in result.stdout
    for expert in range(demo.TINY.experts):
        for part in ("gate_proj", "up_proj"):
            assert f"model.layers.1.mlp.experts.{expert}.{part}.weight BF16 [32, 64]" in result.stdout


@needs_transformers
def test_plan_in_another_layout_names_its_targets(moe):
    target = GATE_UP.replace("gate_up_proj", "gate_and_up_projs")
    result = run("plan", moe, "--layout", "nemo", "--explain", target)
    assert result.exit_code == 0, result.output
    assert f"{target}  BF16 [3, 64, 64]" in result.stdout


def test_plan_written_as_json_reads_back(plain, tmp_path):
    file = tmp_path / "plan.json"
    assert run("plan", plain, "--no-model", "--json", file).exit_code == 0
    assert CopyPlan.from_json(file.read_text()) == automodel_conv.compile_plan(plain, rules=[])
    assert json.loads(file.read_text())


def test_an_unknown_target_is_refused_with_names_like_it(plain):
    result = run("plan", plain, "--no-model", "--explain", "x.a.weight")
    assert result.exit_code == 2
    assert "no target" in result.stderr
    assert "a.weight" in result.stderr


@needs_transformers
def test_load_reports_bytes_phases_and_names(moe):
    result = run("load", moe, "--threads", "1", "--dtype", "float32", "--no-progress")
    assert result.exit_code == 0, result.output
    for label in ("GB/s", "open", "plan", "read", "peak extra memory", "missing", "unexpected"):
        assert label in result.stdout


@needs_transformers
def test_load_draws_a_bar_when_asked(moe):
    assert "loading" in run("load", moe, "--progress").stderr
    assert "loading" not in run("load", moe).stderr


@needs_transformers
def test_load_counts_what_does_not_fit_only_when_not_strict(moe, tmp_path):
    for path in moe.iterdir():
        (tmp_path / path.name).symlink_to(path)
    config = json.loads((moe / "config.json").read_text())
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))
    refused = run("load", tmp_path)
    assert refused.exit_code == 1
    assert "unexpected" in refused.stderr
    result = run("load", tmp_path, "--no-strict")
    assert result.exit_code == 0, result.output
    [unexpected] = [line for line in result.stdout.splitlines() if "unexpected" in line]
    assert int(unexpected.strip("│ ").split()[-1]) > 0


def test_an_unknown_dtype_is_refused(plain):
    result = run("load", plain, "--dtype", "Tensor")
    assert result.exit_code == 2
    assert "no dtype 'Tensor'" in result.stderr


@pytest.mark.parametrize("command", ["plan", "load"])
def test_an_error_of_this_package_is_printed_without_a_traceback(tmp_path, command):
    result = run(command, tmp_path / "nothing.safetensors")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: no such checkpoint\n  where:")
    assert "Traceback" not in result.output


def test_any_other_exception_propagates(plain, monkeypatch):
    def broken(*args, **kwargs):
        raise ZeroDivisionError

    monkeypatch.setattr("automodel_conv.cli.compile_plan", broken)
    assert isinstance(run("plan", plain).exception, ZeroDivisionError)


def test_version_is_the_package_s():
    assert run("--version").stdout.strip() == automodel_conv.__version__


def python(*arguments, **variables):
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, **variables},
        cwd=Path(automodel_conv.__file__).parent.parent,
    )


def test_help_and_plain_plans_work_without_transformers(plain):
    path = os.pathsep.join(filter(None, [str(HIDE), os.environ.get("PYTHONPATH")]))
    hidden = {"PYTHONPATH": path, "HIDDEN_PACKAGES": "transformers"}
    usage = python("-m", "automodel_conv", "--help", **hidden)
    assert usage.returncode == 0, usage.stderr
    assert all(command in usage.stdout for command in ("plan", "load", "demo"))
    planned = python("-m", "automodel_conv", "plan", plain, "--no-model", **hidden)
    assert planned.returncode == 0, planned.stderr
    refused = python("-m", "automodel_conv", "demo", **hidden)
    assert refused.returncode == 1
    assert "pip install transformers" in refused.stderr
    assert "Traceback" not in refused.stderr


@needs_transformers
def test_demo_compares_both_loads_and_removes_its_files(tmp_path, capsys):
    assert show_demo(demo.TINY, str(tmp_path))
    shown = capsys.readouterr().out
    assert str(tmp_path) in shown
    assert "yes" in shown
    assert list(tmp_path.iterdir()) == []


@needs_transformers
def test_demo_fails_and_names_the_tensor_where_one_bit_differs(tmp_path, monkeypatch, capsys):
    def lying(method, directory, warm_up):
        load = demo._measure(method, directory, warm_up)
        if method == "automodel_conv":
            load.digests[GATE_UP] = "0"
        return load

    monkeypatch.setattr(demo, "_in_new_process", lying)
    monkeypatch.setattr("automodel_conv.cli.DEMO_MODEL", demo.TINY)
    result = run("demo", "--directory", tmp_path)
    assert result.exit_code == 1
    assert f"different: {GATE_UP}" in result.stderr
    assert "yes" not in result.stdout


@needs_transformers
def test_digests_see_one_bit_and_the_dtype():
    tensor = torch.ones(4)
    other = tensor.clone()
    other[3] += 2**-20
    same, bit, dtype = (demo.digests({"x": t})["x"] for t in (tensor.clone(), other, tensor.view(torch.int32)))
    assert demo.digests({"x": tensor})["x"] == same
    assert len({same, bit, dtype}) == 3
