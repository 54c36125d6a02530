"""Tests of ``--json``: each command prints one object that follows the schema, for results and for errors."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from typer.main import get_command

import automodel_conv
from automodel_conv.cli.app import app
from automodel_conv.cli.results.schema import RESULTS
from automodel_conv.upstream.registry import transformers_available
from tests.cli.answers import PROGRAM, ROOT, answer, process
from tests.cli.support import GATE_UP, run

needs_transformers = pytest.mark.skipif(not transformers_available(), reason="builds a transformers model")

TINY_DEMO = (
    "-c",
    "from automodel_conv.cli import demo; demo.BIG = demo.TINY; from automodel_conv.cli import main; main()",
)
INTERRUPTED = (
    "-c",
    "import os, signal, automodel_conv as amc; amc.load_state_dict = amc.merge_adapter = "
    "lambda *arguments, **options: os.kill(os.getpid(), signal.SIGINT); from automodel_conv.cli import main; main()",
)


@pytest.fixture(scope="module")
def adapter(moe, tmp_path_factory):
    """Write an adapter for one projection of one expert."""
    directory = tmp_path_factory.mktemp("adapter")
    module = "base_model.model.model.layers.0.mlp.experts.1.down_proj"
    rows, columns = 64, 32
    tensors = {f"{module}.lora_A.weight": torch.ones(4, columns), f"{module}.lora_B.weight": torch.ones(rows, 4)}
    save_file(tensors, directory / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none", "target_modules": ["down_proj"]}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory


@pytest.fixture(scope="module")
def converted(moe, tmp_path_factory):
    """Convert the checkpoint to a layout, with checksums."""
    directory = tmp_path_factory.mktemp("converted") / "nemo"
    automodel_conv.convert_checkpoint(moe, directory, layout="nemo", checksums=True)
    return directory


CASES = {
    "plan": ["{moe}", "--explain", GATE_UP, "--mesh", "ep=3,fsdp=2", "--save", "{new}/plan", "--html", "{new}/page"],
    "load": ["{moe}", "--progress"],
    "convert": ["{moe}", "{new}/a", "--no-model", "--progress"],
    "convert, a dry run": ["{moe}", "{new}/a", "--no-model", "--dry-run"],
    "verify": ["{moe}", "{moe}", "--no-model", "--progress"],
    "verify, one checkpoint": ["{converted}"],
    "adapter convert": ["{adapter}", "{new}/a", "--base", "{moe}", "--layout", "vllm"],
    "adapter merge": ["{moe}", "{adapter}", "{new}/a", "--progress"],
    "adapter inspect": ["{adapter}", "--base", "{moe}"],
    "refit-plan": ["{moe}", "--trainer", "fsdp=2", "--engine", "tp=2", "--progress"],
    "bench": ["{moe}", "--no-model", "--threads", "1"],
    "demo": ["--directory", "{new}"],
}


def test_cases_are_all_commands():
    assert {case.partition(",")[0] for case in CASES} == RESULTS.keys() == set(dict(commands(get_command(app))))


def commands(group, above=""):
    """Yield the name and the command of each command, also of those of groups."""
    for name, command in group.commands.items():
        yield from commands(command, f"{name} ") if hasattr(command, "commands") else [(above + name, command)]


def test_each_command_has_the_option_with_the_same_text():
    texts = {
        option.help for _, command in commands(get_command(app)) for option in command.params if option.name == "json"
    }
    counts = [sum("--json" in option.opts for option in command.params) for _, command in commands(get_command(app))]
    assert len(texts) == 1
    assert set(counts) == {1}


@needs_transformers
@pytest.mark.parametrize("case", CASES)
def test_a_process_prints_one_object_that_follows_the_schema(case, moe, adapter, converted, tmp_path):
    command = case.partition(",")[0]
    places = {"moe": moe, "adapter": adapter, "converted": converted, "new": tmp_path}
    arguments = [argument.format(**places) for argument in CASES[case]]
    done = process(*command.split(), *arguments, "--json", program=TINY_DEMO if command == "demo" else PROGRAM)
    assert done.returncode == 0, done.stderr
    value = answer(done.stdout)
    assert value["schema_version"] == 1
    assert value["command"] == command
    assert value["automodel_conv"] == automodel_conv.__version__
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "command", "kind"),
    [
        (["load", "{plain}/nothing", "--json"], "load", "CheckpointError"),
        (["verify", "{plain}", "--json"], "verify", "VerificationError"),
        (["plan", "{plain}", "--no-model", "--mesh", "wrong", "--json"], "plan", "UnsupportedError"),
        (["adapter", "inspect", "{plain}", "--base", "{plain}", "--json"], "adapter inspect", "CheckpointError"),
        (["convert", "{plain}", "{plain}", "--no-model", "--json"], "convert", "DestinationError"),
        (["convert", "{plain}", "{plain}", "--no-model", "--dry-run", "--json"], "convert", "DestinationError"),
    ],
)
def test_error_has_its_parts_and_the_same_text_as_without_json(plain, arguments, command, kind):
    given = [argument.format(plain=plain) for argument in arguments]
    result, without = run(*given), run(*given[:-1])
    value = answer(result.stdout)
    assert (value["command"], value["error"]["type"]) == (command, kind)
    assert (result.exit_code, result.stderr) == (without.exit_code, without.stderr) == (1, result.stderr)
    error = value["error"]
    assert result.stderr == f"error: {error['text']}\n"
    assert error["text"].startswith(f"{error['what']}\n")
    assert error["help"].endswith(f"/errors/#{kind.lower()}")
    if error["do"]:
        assert f"  do:       {'; '.join(error['do'])}\n" in error["text"]


def test_advice_has_the_options_of_the_command(plain):
    (plain / "config.json").write_text("{}")
    [advice] = [
        do for do in answer(run("convert", plain, plain / "new", "--json").stdout)["error"]["do"] if "--no-model" in do
    ]
    assert "rules" not in advice


@needs_transformers
def test_names_that_do_not_fit_are_whole_lists(moe, tmp_path):
    for path in moe.iterdir():
        (tmp_path / path.name).symlink_to(path)
    config = json.loads((moe / "config.json").read_text())
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 9}))
    error = answer(run("load", tmp_path, "--json").stdout)["error"]
    missing = error["names"]["missing"]
    assert error["type"] == "NameProblems"
    assert len(missing) > 60  # more than the text lists
    assert {name.split(".")[2] for name in missing} == {str(layer) for layer in range(2, 9)}
    assert any("--no-strict" in do for do in error["do"])


WRONG = {
    "an unknown option": (["load", "{plain}", "--unknown"], "load", "--unknown"),
    "no path": (["load"], "load", "PATH"),
    "a wrong value": (["load", "{plain}", "--threads", "none"], "load", "--threads"),
    "a value that the command refuses": (["load", "{plain}", "--dtype", "Tensor"], "load", "Tensor"),
    "an unknown target": (["plan", "{plain}", "--no-model", "--explain", "x"], "plan", "x"),
    "a file that cannot be written": (
        ["plan", "{plain}", "--no-model", "--save", "/nowhere/x"],
        "plan",
        "No such file",
    ),
    "an unknown command": (["lode", "{plain}"], None, "lode"),
    "an unknown command of a group": (["adapter", "lode"], None, "lode"),
    "an option of no command": (["--unknown", "load"], None, "--unknown"),
    "an option of a group": (["adapter", "--unknown"], None, "--unknown"),
    "no command": ([], None, "--json"),
}


@pytest.mark.parametrize(("arguments", "command", "word"), WRONG.values(), ids=WRONG)
def test_wrong_arguments_are_an_error_of_status_2(plain, arguments, command, word):
    result = run(*(argument.format(plain=plain) for argument in arguments), "--json")
    assert result.exit_code == 2
    value = answer(result.stdout)
    assert (value["command"], value["error"]["type"]) == (command, "UsageError")
    assert word in value["error"]["what"]
    assert word in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["plan", "{plain}", "--no-model", "--json", "plan.json"],
        ["plan", "--json", "plan.json", "{plain}"],
        ["plan", "{plain}", "--json=plan.json"],
        ["adapter", "inspect", "{plain}", "--base", "{plain}", "--json", "summary.json"],
        ["refit-plan", "{plain}", "--trainer", "fsdp=2", "--engine", "tp=2", "--json", "forecast.json"],
    ],
)
def test_former_option_with_a_file_says_what_to_write(plain, arguments, monkeypatch):
    monkeypatch.chdir(plain)
    before = sorted(plain.iterdir())
    result = run(*(argument.format(plain=plain) for argument in arguments))
    assert result.exit_code == 2
    what = answer(result.stdout)["error"]["what"]
    assert what.startswith("--json takes no file")
    assert "--save FILE" in what
    assert sorted(plain.iterdir()) == before


def test_another_wrong_argument_after_the_option_keeps_its_own_error(plain):
    what = answer(run("plan", "--json", plain, "--unknown").stdout)["error"]["what"]
    assert "--unknown" in what
    assert "takes no file" not in what


@pytest.mark.parametrize(("command", "paths"), [("load", 1), ("adapter merge", 3)])
def test_interrupted_process_prints_that_and_ends_with_130(plain, command, paths):
    """The signal comes from the system, in the middle of the work."""
    done = process(*command.split(), *[plain] * paths, "--no-progress", "--json", program=INTERRUPTED)
    assert done.returncode == 130
    value = answer(done.stdout)
    assert (value["command"], value["error"]["type"]) == (command, "Interrupted")
    assert "Traceback" not in done.stderr
    assert ("the same command continues" in done.stderr) == (command == "adapter merge")


@pytest.mark.parametrize("path", ["{plain}", "{plain}/nothing"])
def test_reader_of_stdout_that_ends_early_is_no_bug(plain, path):
    reader, writer = os.pipe()
    os.close(reader)
    arguments = ("plan", path.format(plain=plain), "--no-model", "--json")
    with open(writer, "w") as stdout:
        done = process(*arguments, capture_output=False, stdout=stdout, stderr=subprocess.PIPE)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "BrokenPipe" not in done.stderr


def test_what_other_code_prints_goes_to_stderr(plain, monkeypatch):
    compile_plan = automodel_conv.compile_plan

    def printing(*arguments, **options):
        print("from a package")
        return compile_plan(*arguments, **options)

    monkeypatch.setattr("automodel_conv.compile_plan", printing)
    result = run("plan", plain, "--no-model", "--json")
    answer(result.stdout)
    assert result.stderr == "from a package\n"


def test_bug_has_a_traceback_and_prints_nothing(plain, monkeypatch):
    def broken(*arguments, **options):
        raise ZeroDivisionError

    monkeypatch.setattr("automodel_conv.compile_plan", broken)
    result = run("plan", plain, "--json")
    assert isinstance(result.exception, ZeroDivisionError)
    assert result.stdout == ""


def test_path_that_is_not_utf8_is_printed(tmp_path):
    path = os.path.join(os.fsencode(tmp_path), b"caf\xe9")
    done = subprocess.run(
        [sys.executable, *PROGRAM, "plan", path, "--json"], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 1, done.stderr
    assert os.fsencode(answer(done.stdout)["error"]["where"]) == path


def test_path_of_the_name_of_the_option_asks_for_no_json(plain, monkeypatch):
    monkeypatch.chdir(plain)
    (plain / "model.safetensors").rename(plain / "--json")
    result = run("plan", "--no-model", "--", "--json")
    assert result.exit_code == 1
    assert result.stdout == ""


def test_help_is_printed_with_json_too():
    assert run("plan", "--json", "--help").stdout == run("plan", "--help").stdout
