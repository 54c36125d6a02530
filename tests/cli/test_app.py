"""Tests of the commands ``plan``, ``load`` and ``verify``: output, reads and exit codes."""

import json
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import automodel_conv
from automodel_conv.cli import demo, steps
from automodel_conv.planning.plan import CopyPlan
from automodel_conv.upstream.registry import transformers_available
from benchmarks.full_size import write_header
from tests.cli.support import GATE_UP, run, value

HIDE = Path(__file__).parents[1] / "hide"
BARS = {"convert": "writing", "verify": "verifying"}
needs_transformers = pytest.mark.skipif(not transformers_available(), reason="builds a transformers model")


def test_plan_without_a_model_reads_only_headers(plain, no_tensor_data):
    result = run("plan", plain, "--no-model", "--explain", "a.weight")
    assert result.exit_code == 0, result.output
    assert "reads 32 bytes," in result.stdout
    assert "a.weight  F32 [2, 3]  24 bytes  (read)" in result.stdout


def test_reading_tensor_data_is_detected(plain, no_tensor_data):
    with pytest.raises(AssertionError, match="beyond the header"):
        automodel_conv.load_state_dict(plain, rules=[])


@needs_transformers
def test_plan_explains_the_source_of_every_part_of_a_target(moe, no_tensor_data):
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


def test_saved_plan_reads_back(plain, tmp_path):
    file = tmp_path / "plan.json"
    assert run("plan", plain, "--no-model", "--save", file).exit_code == 0
    assert CopyPlan.from_json(file.read_text()) == automodel_conv.compile_plan(plain, rules=[])
    assert json.loads(file.read_text())


def test_unknown_target_is_refused_with_similar_names(plain):
    result = run("plan", plain, "--no-model", "--explain", "x.a.weight")
    assert result.exit_code == 2
    assert "no target" in result.stderr
    assert "a.weight" in result.stderr


@pytest.fixture
def big(tmp_path):
    """Write headers of 5.03 GB over sparse files: four experts of 1 GB, another GB, and 1,024 small ones."""
    files = {
        "model-00001-of-00002.safetensors": {
            "a.experts.w": ("F32", [4, 1000, 250_000]),
            "b.experts.w": ("BF16", [1024, 2, 8192]),
        },
        "model-00002-of-00002.safetensors": {"norm.weight": ("F32", [1000, 250_000])},
    }
    for file, tensors in files.items():
        write_header(tmp_path / file, tensors)
    weight_map = {name: file for file, tensors in files.items() for name in tensors}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return tmp_path


A_RANK_READS = {
    # Minimum, median and maximum. An expert, 1 GB, is 239 reads of at most 4 MiB; 256 small ones, 8.4 MB, are two
    # reads; the other file is 239 again.
    "ep=4": {
        "holds": "2.0 GB 2.0 GB 2.0 GB",
        "reads": "2.0 GB 2.0 GB 2.0 GB",
        "bytes read per byte held": "1.000 1.000 1.000",
        "read calls": "480 480 480",
        "files": "2 2 2",
        "calls per file": "240.0 240.0 240.0",
        "caption": "a summary over 4 ranks; imbalance: the largest share is 1.000 of the mean",
    },
    # Four experts over three ranks: 2, 2, 0. Small experts: 342, 342, 340. Every rank reads the other GB.
    "ep=3": {
        "holds": "1.0 GB 3.0 GB 3.0 GB",
        "reads": "1.0 GB 3.0 GB 3.0 GB",
        "bytes read per byte held": "1.000 1.000 1.000",
        "files": "2 2 2",
        "caption": "3 ranks; imbalance: the largest share is 1.284 of the mean",
    },
    # Experts over both: 2 of 4, half of the rows. The other GB in four parts. Small experts: 512, one row of each.
    "ep=2,fsdp=2": {"holds": "1.3 GB 1.3 GB 1.3 GB", "files": "2 2 2"},
    "replicate=2,fsdp=2": {"holds": "2.5 GB 2.5 GB 2.5 GB", "bytes read per byte held": "1.000 1.000 1.000"},
    "replicate=3": {"holds": "5.0 GB 5.0 GB 5.0 GB", "caption": "3 ranks; imbalance: the largest share is 1.000"},
    # More ranks than are sampled. Most hold none of the first tensor, and all hold one small expert.
    "ep=1024": {"holds": "1.0 GB 1.0 GB 2.0 GB", "caption": "a summary over 1024 ranks, 64 of them sampled"},
}


@pytest.mark.parametrize("mesh", A_RANK_READS)
def test_plan_for_a_mesh_prints_the_reads_of_each_rank(big, mesh, no_tensor_data):
    result = run("plan", big, "--no-model", "--mesh", mesh)
    assert result.exit_code == 0, result.output
    wanted = dict(A_RANK_READS[mesh])
    assert wanted.pop("caption", "") in " ".join(result.stdout.split())
    for label, numbers in wanted.items():
        assert value(result.stdout, label).replace("│", " ").split() == numbers.split(), label


def test_rows_with_small_gaps_are_read_in_one_call(tmp_path):
    """Check slabs of 1 MiB that hold 32 rows of 16 KiB, one of each expert, and the 31 gaps between them."""
    save_file({"experts.w": torch.zeros(1024, 2, 8192, dtype=torch.bfloat16)}, tmp_path / "model.safetensors")
    result = run("plan", tmp_path, "--no-model", "--mesh", "ep=1,fsdp=2")
    assert result.exit_code == 0, result.output
    wanted = {
        "holds": "16.8 MB",
        "reads": "33.0 MB",
        "bytes read per byte held": "1.969",
        "read calls": "32",
        "calls per file": "32.0",
    }
    for label, number in wanted.items():
        assert value(result.stdout, label).replace("│", " ").split() == number.split() * 3, label
    assert "a rank also reads gaps of at most 64 KiB" in " ".join(result.stdout.split())


@pytest.mark.parametrize(
    "mesh", ["", "ep", "ep=", "ep=0", "ep=-2", "ep=2.5", "ep=two", "ep=2,", "ep=2,ep=4", "tp=2", "ep=2 fsdp=2", "64"]
)
def test_malformed_mesh_error_shows_an_example(plain, mesh):
    result = run("plan", plain, "--no-model", "--mesh", mesh)
    assert result.exit_code == 1
    assert result.stderr.startswith("error: not a mesh\n")
    assert "ep=64,fsdp=8" in result.stderr
    assert repr(mesh) in result.stderr
    assert not result.stdout


@needs_transformers
def test_load_reports_bytes_phases_and_names(moe):
    result = run("load", moe, "--threads", "1", "--dtype", "float32", "--no-progress")
    assert result.exit_code == 0, result.output
    for label in ("speed", "open", "plan", "read", "peak extra memory", "missing", "unexpected"):
        assert label in result.stdout


@needs_transformers
def test_load_draws_a_progress_bar(moe):
    assert "reading" in run("load", moe, "--progress").stderr
    assert "reading" not in run("load", moe).stderr


@needs_transformers
def test_load_counts_mismatches_with_no_strict(moe, tmp_path):
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


def test_verify_names_the_first_element_that_differs(plain, tmp_path):
    new = tmp_path / "new"
    assert run("convert", plain, new, "--no-model").exit_code == 0
    result = run("verify", plain, new)
    assert result.exit_code == 0, result.output
    assert result.stdout == "2 tensors in 1 file, 32 bytes: bit-identical to the source\n"
    file = new / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    result = run("verify", plain, new)
    assert result.exit_code == 1
    assert result.stderr.startswith("error: b does not match its source\n")
    assert "[1] of F32 [2]" in result.stderr


@needs_transformers
def test_verify_states_whether_anything_was_converted(moe, tmp_path):
    grouped, back, cast = tmp_path / "grouped", tmp_path / "back", tmp_path / "cast"
    for source, new, options in (
        (moe, grouped, ["--layout", "nemo"]),
        (grouped, back, ["--layout", "per_expert"]),
        (moe, cast, ["--layout", "per_expert", "--dtype", "float16"]),
    ):
        assert run("convert", source, new, *options).exit_code == 0
    assert run("verify", moe, back, "--layout", "per_expert").stdout.endswith(": bit-identical to the source\n")
    assert run("verify", moe, back).stdout.endswith(": bit-identical to the source\n")
    for arguments in ((moe, grouped), (grouped, back), (moe, cast, "--dtype", "float16", "--layout", "per_expert")):
        assert run("verify", *arguments).stdout.endswith(": bit-identical to a conversion of the source\n")


def test_verify_counts_several_files(plain, tmp_path):
    new = tmp_path / "new"
    assert run("convert", plain, new, "--no-model", "--max-shard-size", "10B").exit_code == 0
    assert run("verify", plain, new).stdout.startswith("2 tensors in 2 files, ")


@pytest.mark.parametrize(
    ("command", "usage"),
    [
        ("convert", "convert [OPTIONS] SOURCE DESTINATION"),
        ("verify", "verify [OPTIONS] SOURCE [DESTINATION]"),
        ("load", "load [OPTIONS] PATH"),
        ("demo", "demo [OPTIONS]"),
    ],
)
def test_usage_names_arguments_in_capitals_without_braces(command, usage):
    lines = run(command, "--help").stdout.splitlines()
    assert next(line for line in lines if "Usage:" in line).strip().endswith(usage)


def test_verify_of_one_checkpoint_compares_checksums(plain, tmp_path):
    new = tmp_path / "new"
    assert run("verify", plain).exit_code == 1
    assert run("convert", plain, new, "--no-model", "--checksums").exit_code == 0
    result = run("verify", new)
    assert result.exit_code == 0, result.output
    assert "all match their checksums" in result.stdout
    file = new / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    result = run("verify", new)
    assert result.exit_code == 1
    assert "b in" in result.stderr


@needs_transformers
def test_load_verifies_checksums_when_asked(moe):
    result = run("load", moe, "--verify")
    assert result.exit_code == 1
    assert "no checksums" in result.stderr


@pytest.mark.parametrize("command", BARS)
def test_convert_and_verify_draw_a_progress_bar(plain, tmp_path, command):
    new = tmp_path / "new"
    if command == "verify":
        assert run("convert", plain, new, "--no-model").exit_code == 0
    for shown in (True, False):
        result = run(command, plain, new, "--no-model", "--progress" if shown else "--no-progress")
        assert result.exit_code == 0, result.output
        assert (BARS[command] in result.stderr) == shown
        if command == "convert":
            new = tmp_path / "another"


def test_version_is_that_of_the_package():
    assert run("--version").stdout.strip() == automodel_conv.__version__


def python(*arguments, **variables):
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, **variables},
        cwd=Path(automodel_conv.__file__).parent.parent,
    )


def test_ctrl_c_while_the_command_line_is_imported_ends_with_130():
    program = """
import sys
class Interrupted:
    def find_spec(self, name, path=None, target=None):
        if name == "automodel_conv.cli.app":
            raise KeyboardInterrupt
sys.meta_path.insert(0, Interrupted())
from automodel_conv.cli import main
main()
"""
    done = python("-c", program)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_help_and_plain_plans_work_without_transformers(plain):
    path = os.pathsep.join(filter(None, [str(HIDE), os.environ.get("PYTHONPATH")]))
    hidden = {"PYTHONPATH": path, "HIDDEN_PACKAGES": "transformers"}
    usage = python("-m", "automodel_conv", "--help", **hidden)
    assert usage.returncode == 0, usage.stderr
    assert all(command in usage.stdout for command in ("plan", "load", "convert", "verify", "demo"))
    planned = python("-m", "automodel_conv", "plan", plain, "--no-model", **hidden)
    assert planned.returncode == 0, planned.stderr
    refused = python("-m", "automodel_conv", "demo", **hidden)
    assert refused.returncode == 1
    assert "pip install 'automodel-conv[transformers]'" in refused.stderr
    assert "Traceback" not in refused.stderr


@pytest.mark.parametrize("shown", [True, False])
def test_plan_names_its_steps(big, monkeypatch, shown):
    named = []
    monkeypatch.setattr(steps, "step_line", lambda enabled: nullcontext(lambda step: named.append((enabled, step))))
    result = run("plan", big, "--no-model", "--mesh", "ep=2", "--progress" if shown else "--no-progress")
    assert result.exit_code == 0, result.output
    expected = ["headers", "plan", "reads of rank 1 of 2", "reads of rank 2 of 2"]
    assert named == [(shown, step) for step in expected]
