"""Tests of the command ``refit-plan``: its output, its file and its errors."""

import json
import shutil
from contextlib import nullcontext

import pytest

pytest.importorskip("transformers", reason="builds transformers models")

from automodel_conv.cli import steps
from automodel_conv.cli.engine_mesh import parse_engine_mesh
from automodel_conv.cli.refit_plan import described_model, refit_plan
from tests.cli.support import run

MESHES = ("--trainer", "fsdp=2", "--engine", "tp=2")


def test_prints_divisions_costs_and_the_busiest_link(moe, no_tensor_data):
    result = run("refit-plan", moe, *MESHES, "--bucket-bytes", "64KiB")
    assert result.exit_code == 0, result.output
    plan = refit_plan(described_model(str(moe), {}, None), {"fsdp": 2}, parse_engine_mesh("tp=2"), 1 << 16)
    assert str(plan.forecast) in result.stdout
    assert plan.forecast.rounds > 1
    text = " ".join(result.stdout.split())
    assert "rows over tp" in text
    assert "k_proj, v_proj" in text
    sender, receiver = plan.busiest_link
    assert f"the busiest link is from rank {sender} to rank {receiver}; ranks of the trainer come first" in text


def test_needs_only_a_config(moe, tmp_path):
    shutil.copy(moe / "config.json", tmp_path)
    result = run("refit-plan", tmp_path, *MESHES)
    assert result.exit_code == 0, result.output
    assert result.stdout == run("refit-plan", moe, *MESHES).stdout


def test_a_dtype_is_not_guessed(moe, tmp_path):
    config = json.loads((moe / "config.json").read_text())
    assert config.pop("dtype", None) or config.pop("torch_dtype", None)
    (tmp_path / "config.json").write_text(json.dumps(config))
    result = run("refit-plan", tmp_path, *MESHES)
    assert result.exit_code == 1
    assert result.stderr.startswith("error: config.json states no dtype, and there are no weights that have one\n")
    assert "pass --dtype, that of the engine" in result.stderr
    assert run("refit-plan", tmp_path, *MESHES, "--dtype", "bfloat16").exit_code == 0


def test_a_dtype_replaces_that_of_the_config(moe):
    sent = []
    for dtype in ("bfloat16", "float32"):
        result = run("refit-plan", moe, *MESHES, "--dtype", dtype, "--json")
        assert result.exit_code == 0, result.output
        sent.append(sum(json.loads(result.stdout)["result"]["bytes_sent"].values()))
    assert sent[1] == 2 * sent[0]


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (("--trainer", "tp=2", "--engine", "tp=2"), "not a mesh\n"),
        (("--trainer", "fsdp=2", "--engine", "fsdp=2"), "not a mesh\n"),
        (("--trainer", "fsdp=2", "--engine", "tp=4,ep=2"), "ep is not tp x dp\n"),
        (("--trainer", "fsdp=2", "--engine", "tp=7"), "the ranks of the engine do not divide"),
        ((*MESHES, "--bucket-bytes", "much"), "not a size\n"),
        ((*MESHES, "--bucket-bytes", "16"), "bucket_bytes= is too small\n"),
    ],
)
def test_a_wrong_value_is_named(moe, options, error):
    result = run("refit-plan", moe, *options)
    assert result.exit_code == 1
    assert result.stderr.startswith(f"error: {error}")


def test_both_meshes_are_needed(moe):
    result = run("refit-plan", moe, "--trainer", "fsdp=2")
    assert result.exit_code == 2
    assert "--engine" in result.stderr


def test_names_its_steps(moe, monkeypatch):
    named = []
    monkeypatch.setattr(steps, "step_line", lambda enabled: nullcontext(lambda step: named.append((enabled, step))))
    assert run("refit-plan", moe, *MESHES, "--progress").exit_code == 0
    assert named[:2] == [(True, "headers"), (True, "plan")]
