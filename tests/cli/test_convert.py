"""Tests of the command ``convert``: round trips, dry runs, interruptions and repeated calls."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import automodel_conv
from automodel_conv.files import system
from automodel_conv.upstream.registry import transformers_available
from tests.cli.support import run, value

needs_transformers = pytest.mark.skipif(not transformers_available(), reason="builds a transformers model")


def bytes_in(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.glob("*.safetensors")}


@needs_transformers
def test_convert_and_back_restores_the_bytes_and_prints_a_report(moe, tmp_path):
    grouped, back = tmp_path / "grouped", tmp_path / "back"
    result = run("convert", moe, grouped, "--layout", "nemo", "--max-shard-size", "30KB")
    assert result.exit_code == 0, result.output
    assert "read back and compared" in result.stdout
    files = bytes_in(grouped)
    assert value(result.stdout, "files") == str(len(files)) != "1"
    assert value(result.stdout, "finished by an earlier call") == "0"
    for label in ("written", "speed", "seconds", "peak extra memory", "left out"):
        assert label in result.stdout
    result = run("convert", grouped, back, "--layout", "per_expert", "--source-layout", "nemo", "--threads", "1")
    assert result.exit_code == 0, result.output
    result = run("verify", moe, back, "--no-model")
    assert result.exit_code == 0, result.output
    assert "39 tensors in 1 file," in result.stdout


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
def test_dropping_is_advised_for_carried_tensors_with_duplicate_names(moe, tmp_path):
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


def test_repeated_conversion_reports_that_it_was_complete(plain, tmp_path):
    command = ["convert", plain, tmp_path / "new", "--no-model"]
    assert run(*command).exit_code == 0
    result = run(*command)
    assert result.exit_code == 0, result.output
    assert "complete already" in result.stdout
    assert "nothing was written" in result.stdout


def test_interrupted_conversion_is_reported_and_resumes(plain, tmp_path, monkeypatch):
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
    assert result.stderr == "interrupted: the same command continues with the unfinished files\n"
    assert not bytes_in(tmp_path / "new")
    monkeypatch.setattr(system, "create", stock)
    result = run(*command)
    assert result.exit_code == 0, result.output
    assert value(result.stdout, "finished by an earlier call") == "1"
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
def test_options_of_convert_are_passed_on(plain, tmp_path, monkeypatch, option, key, wanted):
    seen = {}

    def convert(source, destination, **arguments):
        seen.update(arguments)
        raise automodel_conv.UnsupportedError("seen")

    monkeypatch.setattr("automodel_conv.convert_checkpoint", convert)
    assert run("convert", plain, tmp_path / "new", *option).stderr.startswith("error: seen\n")
    assert seen[key] == wanted


def test_message_of_an_interruption_without_resume_names_the_option(plain, tmp_path, monkeypatch):
    def convert(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("automodel_conv.convert_checkpoint", convert)
    result = run("convert", plain, tmp_path / "new", "--no-resume")
    assert result.exit_code == 130
    assert "with --resume" in result.stderr
