"""The command line: what it prints, what it reads, and how it ends."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from typer.main import get_command
from typer.testing import CliRunner

import automodel_conv
from automodel_conv.cli import demo, words
from automodel_conv.cli.app import app, show_demo
from automodel_conv.files import system
from automodel_conv.files.staging import STAGING_NAME
from automodel_conv.planning.plan import CopyPlan
from automodel_conv.upstream.registry import transformers_available

HIDE = Path(__file__).parent / "hide"
BARS = {"convert": "converting", "verify": "verifying"}
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


@pytest.fixture
def big(tmp_path):
    """Headers of 5.03 GB over files that are one hole each: four experts of 1 GB, another GB, and 1,024 small ones."""
    files = {
        "model-00001-of-00002.safetensors": {
            "a.experts.w": ("F32", [4, 1000, 250_000]),
            "b.experts.w": ("BF16", [1024, 2, 8192]),
        },
        "model-00002-of-00002.safetensors": {"norm.weight": ("F32", [1000, 250_000])},
    }
    for file, tensors in files.items():
        header, stop = {}, 0
        for name, (dtype, shape) in tensors.items():
            start, stop = stop, stop + math.prod(shape) * {"F32": 4, "BF16": 2}[dtype]
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with (tmp_path / file).open("wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            out.truncate(8 + len(text) + stop)
    weight_map = {name: file for file, tensors in files.items() for name in tensors}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return tmp_path


A_RANK_READS = {
    # Least, median and most. An expert, 1 GB, is 239 reads of at most 4 MiB; 256 small ones, 8.4 MB, are two; the other
    # file again 239.
    "ep=4": {
        "holds, GB": "2.008 2.008 2.008",
        "reads, GB": "2.008 2.008 2.008",
        "reads a byte it holds, times": "1.000 1.000 1.000",
        "reads of neighbouring bytes": "480 480 480",
        "files": "2 2 2",
        "reads a file": "240.0 240.0 240.0",
        "caption": "4 ranks; imbalance: the largest share is 1.000 of the mean",
    },
    # Four experts over three ranks: 2, 2, 0; of the small ones 342, 342, 340; the other GB on all.
    "ep=3": {
        "holds, GB": "1.011 3.011 3.011",
        "reads, GB": "1.011 3.011 3.011",
        "reads a byte it holds, times": "1.000 1.000 1.000",
        "files": "2 2 2",
        "caption": "3 ranks; imbalance: the largest share is 1.284 of the mean",
    },
    # Experts over both: 2 of 4, half of the rows; the other GB in four parts. Of the small ones 512, a row of each.
    "ep=2,fsdp=2": {"holds, GB": "1.258 1.258 1.258", "files": "2 2 2"},
    "replicate=2,fsdp=2": {"holds, GB": "2.517 2.517 2.517", "reads a byte it holds, times": "1.000 1.000 1.000"},
    "replicate=3": {"holds, GB": "5.034 5.034 5.034", "caption": "3 ranks; imbalance: the largest share is 1.000"},
    # More than are looked at; most of them have none of the first tensor, and all one small expert.
    "ep=1024": {"holds, GB": "1.000 1.000 2.000", "caption": "1024 ranks, 64 of them looked at"},
}


@pytest.mark.parametrize("mesh", A_RANK_READS)
def test_plan_for_a_mesh_tells_what_each_rank_reads(big, mesh, no_tensor_data):
    result = run("plan", big, "--no-model", "--mesh", mesh)
    assert result.exit_code == 0, result.output
    wanted = dict(A_RANK_READS[mesh])
    assert wanted.pop("caption", "") in " ".join(result.stdout.split())
    for label, numbers in wanted.items():
        assert value(result.stdout, label).replace("│", " ").split() == numbers.split(), label


def test_rows_that_lie_near_each_other_are_read_with_what_is_between_them(tmp_path):
    """A row of 16 KiB of each expert: slabs of 1 MiB, 32 rows and the 31 between them."""
    save_file({"experts.w": torch.zeros(1024, 2, 8192, dtype=torch.bfloat16)}, tmp_path / "model.safetensors")
    result = run("plan", tmp_path, "--no-model", "--mesh", "ep=1,fsdp=2")
    assert result.exit_code == 0, result.output
    wanted = {
        "holds, GB": "0.017",
        "reads, GB": "0.033",
        "reads a byte it holds, times": "1.969",
        "reads of neighbouring bytes": "32",
        "reads a file": "32.0",
    }
    for label, number in wanted.items():
        assert value(result.stdout, label).replace("│", " ").split() == [number] * 3, label


@pytest.mark.parametrize(
    "mesh", ["", "ep", "ep=", "ep=0", "ep=-2", "ep=2.5", "ep=two", "ep=2,", "ep=2,ep=4", "tp=2", "ep=2 fsdp=2", "64"]
)
def test_what_is_no_mesh_is_one_error_that_shows_one(plain, mesh):
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


def bytes_in(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.glob("*.safetensors")}


def value(stdout: str, label: str) -> str:
    """The right column of the row that begins with ``label``."""
    [row] = [line.strip("│ ") for line in stdout.splitlines() if line.startswith(f"│ {label}")]
    return row.removeprefix(label).strip("│ ")


@needs_transformers
def test_convert_and_back_gives_the_first_bytes_and_says_what_it_did(moe, tmp_path):
    grouped, back = tmp_path / "grouped", tmp_path / "back"
    result = run("convert", moe, grouped, "--layout", "nemo", "--max-shard-size", "30KB")
    assert result.exit_code == 0, result.output
    assert "read back and compared" in result.stdout
    files = bytes_in(grouped)
    assert value(result.stdout, "files") == str(len(files)) != "1"
    assert value(result.stdout, "of these finished before") == "0"
    for label in ("written", "speed", "seconds", "peak extra memory", "left out"):
        assert label in result.stdout
    result = run("convert", grouped, back, "--layout", "per_expert", "--source-layout", "nemo", "--threads", "1")
    assert result.exit_code == 0, result.output
    result = run("verify", moe, back, "--no-model")
    assert result.exit_code == 0, result.output
    assert "39 tensors in 1 files" in result.stdout


def test_a_dry_run_says_what_is_needed_and_writes_nothing(plain, no_tensor_data, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    result = run("convert", plain, tmp_path / "new" / "er", "--no-model", "--max-shard-size", "10B", "--dry-run")
    assert result.exit_code == 0, result.output
    assert "reads 0.000 GB" in result.stdout
    assert value(result.stdout, "files") == "2"
    for label in ("reads", "writes", "needs on the disk", "free there", "left out"):
        assert label in result.stdout
    assert sorted(tmp_path.rglob("*")) == before


def test_a_dry_run_fails_where_the_disk_has_no_room(plain, tmp_path, monkeypatch):
    monkeypatch.setattr(system, "free_bytes", lambda directory: 100)
    result = run("convert", plain, tmp_path / "new", "--no-model", "--dry-run")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: the disk has too little room\n")
    assert "found:    100" in result.stderr
    assert "needs on the disk" in result.stdout
    # What an unfinished work has taken there is free for its end, or for another one.
    (tmp_path / "new" / STAGING_NAME).mkdir(parents=True)
    (tmp_path / "new" / STAGING_NAME / "model.safetensors").write_bytes(bytes(5000))
    result = run("convert", plain, tmp_path / "new", "--no-model", "--dry-run")
    assert result.exit_code == 0, result.output
    assert value(result.stdout, "unfinished work there") == "yes"


def test_a_dry_run_fails_where_a_checkpoint_lies(plain):
    result = run("convert", plain, plain, "--no-model", "--dry-run")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: the directory holds a checkpoint already\n")


@needs_transformers
def test_tensors_that_are_carried_or_left_out_are_named(moe, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for path in moe.iterdir():
        (source / path.name).symlink_to(path)
    index = json.loads((moe / "model.safetensors.index.json").read_text())
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    save_file({name: torch.ones(2)}, source / "more.safetensors")
    index["weight_map"][name] = "more.safetensors"
    (source / "model.safetensors.index.json").unlink()
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    for arguments in (["--dry-run"], []):
        result = run("convert", source, tmp_path / "new", *arguments)
        assert result.exit_code == 0, result.output
        assert value(result.stdout, "carried as they are") == "1"
        assert f"    {name}\n" in result.stdout
    result = run("convert", source, tmp_path / "less", "--drop", "*.inv_freq")
    assert result.exit_code == 0, result.output
    assert value(result.stdout, "carried as they are") == "0"
    assert value(result.stdout, "left out") == "1"
    assert f"left out:\n    {name}\n" in result.stdout
    assert run("verify", source, tmp_path / "less", "--drop", "*.inv_freq").exit_code == 0
    for command in ("plan", "load"):
        result = run(command, source)
        assert result.exit_code == 0, result.output
        assert f"left out:\n    {name}\n" in result.stdout


@needs_transformers
def test_dropping_is_advised_where_a_carried_tensor_has_the_name_of_another_one(moe, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for path in moe.iterdir():
        (source / path.name).symlink_to(path)
    name = "model.layers.0.mlp.experts.gate_and_up_projs"
    save_file({name: torch.ones(2)}, source / "more.safetensors")
    index = json.loads((moe / "model.safetensors.index.json").read_text())
    index["weight_map"][name] = "more.safetensors"
    (source / "model.safetensors.index.json").unlink()
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    result = run("convert", source, tmp_path / "new", "--layout", "nemo")
    assert result.exit_code == 1
    assert name in result.stderr
    assert "leave them out with --drop" in result.stderr


def test_a_conversion_that_was_complete_says_so(plain, tmp_path):
    command = ["convert", plain, tmp_path / "new", "--no-model"]
    assert run(*command).exit_code == 0
    result = run(*command)
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("this conversion was complete")


def test_an_interrupted_conversion_says_so_and_the_same_command_goes_on(plain, tmp_path, monkeypatch):
    command = ["convert", plain, tmp_path / "new", "--no-model", "--max-shard-size", "10B"]
    stock, calls = system.create, []

    def interrupted(path):
        calls.append(path)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return stock(path)

    monkeypatch.setattr(system, "create", interrupted)
    result = run(*command)
    assert result.exit_code == 130
    assert result.stderr == "interrupted: the same command goes on with the files that are not finished\n"
    assert not bytes_in(tmp_path / "new")
    monkeypatch.setattr(system, "create", stock)
    result = run(*command)
    assert result.exit_code == 0, result.output
    assert value(result.stdout, "of these finished before") == "1"
    assert run("verify", plain, tmp_path / "new").exit_code == 0


@pytest.mark.parametrize(
    ("option", "key", "wanted"),
    [
        ([], "resume", True),
        (["--no-resume"], "resume", False),
        ([], "verify", True),
        (["--no-verify"], "verify", False),
        ([], "rules", None),
        (["--no-model"], "rules", []),
        (["--dtype", "float16"], "dtype", torch.float16),
        ([], "dequantize", False),
        (["--dequantize"], "dequantize", True),
        (["--max-shard-size", "1MB"], "max_shard_size", "1MB"),
        (["--checksums"], "checksums", True),
        (["--threads", "3"], "threads", 3),
        ([], "progress", False),
        (["--progress"], "progress", True),
    ],
)
def test_options_of_convert_reach_it(plain, tmp_path, monkeypatch, option, key, wanted):
    seen = {}

    def convert(source, destination, **arguments):
        seen.update(arguments)
        raise automodel_conv.UnsupportedError("seen")

    monkeypatch.setattr("automodel_conv.convert_checkpoint", convert)
    assert run("convert", plain, tmp_path / "new", *option).stderr == "error: seen\n"
    assert seen[key] == wanted


def test_interrupted_without_resume_the_message_names_the_other_option(plain, tmp_path, monkeypatch):
    def convert(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("automodel_conv.convert_checkpoint", convert)
    result = run("convert", plain, tmp_path / "new", "--no-resume")
    assert result.exit_code == 130
    assert "with --resume" in result.stderr


def test_verify_names_the_first_element_that_differs(plain, tmp_path):
    new = tmp_path / "new"
    assert run("convert", plain, new, "--no-model").exit_code == 0
    result = run("verify", plain, new)
    assert result.exit_code == 0, result.output
    assert "2 tensors in 1 files" in result.stdout
    file = new / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    result = run("verify", plain, new)
    assert result.exit_code == 1
    assert result.stderr.startswith("error: b is not what the source makes it\n")
    assert "[1] of F32 [2]" in result.stderr


def test_verify_alone_compares_with_checksums(plain, tmp_path):
    new = tmp_path / "new"
    assert run("verify", plain).exit_code == 1
    assert run("convert", plain, new, "--no-model", "--checksums").exit_code == 0
    result = run("verify", new)
    assert result.exit_code == 0, result.output
    assert "all have their checksums" in result.stdout
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
def test_convert_and_verify_draw_a_bar_when_asked(plain, tmp_path, command):
    new = tmp_path / "new"
    if command == "verify":
        assert run("convert", plain, new, "--no-model").exit_code == 0
    for shown in (True, False):
        result = run(command, plain, new, "--no-model", "--progress" if shown else "--no-progress")
        assert result.exit_code == 0, result.output
        assert (BARS[command] in result.stderr) == shown
        if command == "convert":
            new = tmp_path / "another"


@pytest.mark.parametrize("command", [("plan",), ("load",), ("verify",), ("convert", "new")], ids=lambda c: c[0])
def test_an_error_of_this_package_is_printed_without_a_traceback(tmp_path, command):
    result = run(command[0], tmp_path / "nothing.safetensors", *command[1:])
    assert result.exit_code == 1
    assert result.stderr.startswith("error: no such checkpoint\n  where:")
    assert "Traceback" not in result.output


WRONG = {
    "no mesh": (["plan", "{plain}", "--no-model", "--mesh", "garbage"], ["not a mesh"]),
    "no folder for JSON": (["plan", "{plain}", "--no-model", "--json", "/nonexistent/x"], ["--json", "No such file"]),
    "a folder for JSON": (["plan", "{plain}", "--no-model", "--json", "{new}/.."], ["--json", "directory"]),
    "no device": (["load", "{plain}", "--device", "gpu"], ["not a device", '"cpu"', "gpu"]),
    "a number below zero": (["load", "{plain}", "--device", "-1"], ["not a device", "-1"]),
    "a device that is not there": (["load", "{plain}", "--device", "cuda:99"], ["cannot load to cuda:99"]),
    "another kind of device": (["load", "{plain}", "--device", "mps"], ["cannot load to mps", '"cpu"']),
    "no data": (["load", "{plain}", "--device", "meta"], ["holds no data", "automodel-conv plan"]),
    "no dtype": (["load", "{plain}", "--dtype", "garbage"], ["garbage"]),
    "no numbers": (["convert", "{plain}", "{new}", "--no-model", "--dtype", "int8"], ["floating torch dtype"]),
    "no threads": (["convert", "{plain}", "{new}", "--threads", "0"], ["--threads"]),
    "no size": (["convert", "{plain}", "{new}", "--no-model", "--max-shard-size", "garbage"], ["not a size"]),
    "an endless size": (["convert", "{plain}", "{new}", "--no-model", "--max-shard-size", "9e999GB"], ["not a size"]),
    "a layout spelled alike": (["convert", "{plain}", "{new}", "--layout", "per-expert"], ["write 'per_expert'"]),
    "a layout that loads lack": (["load", "{plain}", "--layout", "per_expert"], ["convert --layout per_expert"]),
    "a file for a folder": (["convert", "{plain}", "{plain}/b", "--no-model"], ["cannot write to a directory"]),
    "no checksums": (["verify", "{plain}"], ["automodel-conv convert --checksums"]),
    "no config": (["convert", "{plain}", "{new}"], ["config.json", "--no-model"]),
    "no bytes to time": (["bench", "{plain}", "--no-model", "--most", "0"], ["not a size"]),
    "no weights to time": (["bench", "{plain}/b"], ["not in the safetensors format"]),
    "no folder for the demo": (["demo", "--directory", "/nonexistent"], ["cannot write to a directory"]),
    "a file for the demo": (["demo", "--directory", "{plain}/b"], ["cannot write to a directory"]),
}
PYTHONS_WORDS = re.compile(r"\b[a-z]\w*=|\w+\(\)|resume=|rules=")


@needs_transformers
@pytest.mark.parametrize(("arguments", "words"), WRONG.values(), ids=WRONG)
def test_what_a_command_cannot_use_is_one_error_in_its_words(plain, tmp_path, arguments, words):
    (plain / "b").write_text("a file")
    result = run(*(argument.format(plain=plain, new=tmp_path / "new") for argument in arguments))
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code in (1, 2)
    for word in words:
        assert word in result.stderr
    advice = result.stderr.partition("  do: ")[2]
    assert not PYTHONS_WORDS.search(advice), advice
    assert not (tmp_path / "new").exists()


@needs_transformers
def test_a_command_advises_the_options_that_it_has(moe, tmp_path):
    for file in moe.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 9}))
    plan, load, convert = run("plan", tmp_path), run("load", tmp_path), run("convert", tmp_path, tmp_path / "new")
    for result in (plan, load, convert):
        assert result.exit_code == 1
        assert "missing" in result.stderr
        assert "strict=" not in result.stderr
    assert "--no-strict loads what fits" in load.stderr
    assert "strict" not in plan.stderr + convert.stderr


@needs_transformers
def test_a_command_advises_no_option_of_another_one(moe, tmp_path):
    for file in moe.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"dtype": "int8"}))
    plan, load, convert = run("plan", tmp_path), run("load", tmp_path), run("convert", tmp_path, tmp_path / "new")
    for result, options in ((plan, {"--no-model"}), (load, {"--dtype"}), (convert, {"--no-model", "--dtype"})):
        assert result.exit_code == 1
        assert set(re.findall(r"--[\w-]+", result.stderr)) == options


def test_a_conversion_of_another_kind_is_started_anew_by_an_option(plain, tmp_path):
    staging = tmp_path / "new" / STAGING_NAME
    staging.mkdir(parents=True)
    (staging / "journal.jsonl").write_text('{"work": {"files": []}}\n')
    result = run("convert", plain, tmp_path / "new", "--no-model")
    assert "start again with --no-resume" in result.stderr
    assert "resume=" not in result.stderr


def test_every_option_that_errors_name_is_there():
    options = {option for command in get_command(app).commands.values() for p in command.params for option in p.opts}
    options |= {o for command in get_command(app).commands.values() for p in command.params for o in p.secondary_opts}
    said = " ".join([*words.IN_OPTIONS.values(), *words.IN_COMMANDS.values()])
    assert set(re.findall(r"--[\w-]+", said)) <= options


def test_any_other_exception_propagates(plain, monkeypatch):
    def broken(*args, **kwargs):
        raise ZeroDivisionError

    monkeypatch.setattr("automodel_conv.compile_plan", broken)
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
    assert all(command in usage.stdout for command in ("plan", "load", "convert", "verify", "demo"))
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
    monkeypatch.setattr(demo, "BIG", demo.TINY)
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
