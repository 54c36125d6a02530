"""Tests of completion: the words for options, and the scripts in real shells."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.main import get_command

import automodel_conv
from automodel_conv.cli import completion
from automodel_conv.cli.app import app
from automodel_conv.dtypes import FLOATING, torch_dtype
from automodel_conv.planning.layouts import LAYOUTS

COMPLETED = [
    ("load --layout gp", ["gpt_oss"]),
    ("convert a b --layout per", ["per_expert"]),
    ("load a --layout per", []),
    ("plan a --source-layout ne", ["nemo"]),
    ("load a --dtype bf", ["bfloat16"]),
    ("verify a b --dtype float", ["float16", "float32", "float64"]),
    ("load a --device c", ["cpu"]),
    ("bench a --recipe kimi", ["kimi_k2", "kimi_k3"]),
    ("adapter convert a b --layout v", ["vllm"]),
    ("adapter merge a b c --layout ne", ["nemo"]),
    ("refit-plan a --dtype bf", ["bfloat16"]),
    ("ben", ["bench"]),
    ("adapter m", ["merge"]),
    ("load a --sour", ["--source-layout"]),
]


@pytest.fixture
def shell(tmp_path):
    """Return a function that runs a shell with the command on its path, and a home of its own."""
    command = tmp_path / "bin" / "automodel-conv"
    command.parent.mkdir()
    run = "import sys; sys.argv[0] = 'automodel-conv'; from automodel_conv.cli import main; sys.exit(main())"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -c "{run}" "$@"\n')
    command.chmod(0o755)
    path = f"{command.parent}{os.pathsep}{os.environ['PATH']}"
    root = str(Path(automodel_conv.__file__).parent.parent)
    environment = {**os.environ, "PATH": path, "HOME": str(tmp_path), "PYTHONPATH": root}

    def run_shell(name, script):
        if shutil.which(name) is None:
            pytest.skip(f"{name} is not installed")
        done = subprocess.run([name, "-c", script], capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        return done.stdout.split()

    return run_shell


def completed(line):
    """Return the words that typer would offer at the end of a line, in this process."""
    from typer._completion_classes import BashComplete

    *words, typed = line.split(" ")
    command = BashComplete(get_command(app), {}, "automodel-conv", "_AUTOMODEL_CONV_COMPLETE")
    return [item.value for item in command.get_completions(words, typed)]


@pytest.mark.parametrize(("line", "expected"), COMPLETED, ids=[line for line, _ in COMPLETED])
def test_values_of_options_are_completed(line, expected):
    assert completed(line)[: len(expected)] == expected
    assert all(word.startswith(line.rpartition(" ")[2]) for word in completed(line))


def test_bash_completes_in_a_shell(shell):
    script = """
        source <(_AUTOMODEL_CONV_COMPLETE=source_bash automodel-conv)
        COMP_WORDS=(automodel-conv load --layout vllm_t) COMP_CWORD=3
        _automodel_conv_completion automodel-conv
        printf '%s\\n' "${COMPREPLY[@]}"
    """
    assert shell("bash", script) == ["vllm_trtllm", "vllm_trtllm_padded"]


def test_fish_completes_in_a_shell(shell):
    script = (
        "_AUTOMODEL_CONV_COMPLETE=source_fish automodel-conv | source; complete -C 'automodel-conv load --layout gp'"
    )
    assert shell("fish", script) == ["gpt_oss"]


def test_zsh_gets_the_words_from_its_script(shell):
    script = """
        compdef() { }
        _arguments() { print -r -- "$@" }
        eval "$(_AUTOMODEL_CONV_COMPLETE=source_zsh automodel-conv)"
        words=(automodel-conv load --layout vllm_t) CURRENT=4
        _automodel_conv_completion
    """
    assert shell("zsh", script) == ["*:", ':(("vllm_trtllm"', '"vllm_trtllm_padded"))']


def test_dtypes_are_those_that_tensors_are_cast_to():
    names = [str(torch_dtype(code)).removeprefix("torch.") for code in FLOATING]
    assert {"auto", *names} == {*completion.dtypes()}


def test_layouts_to_load_lack_the_published_form():
    assert completion.layouts() == list(LAYOUTS)
    assert [*completion.layouts(), "per_expert"] == completion.new_layouts()


def test_gpus_are_completed_in_order(tmp_path, monkeypatch):
    for name in ("nvidia10", "nvidia0", "nvidia2", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    monkeypatch.setattr(completion, "Path", lambda folder: tmp_path)
    assert completion.devices() == ["cpu", "cuda:0", "cuda:2", "cuda:10"]
