"""Tests of error texts on the command line: one line without a traceback, with the options of the command."""

import ast
import json
import re
from pathlib import Path

import pytest
from safetensors.torch import save_file
from typer.main import get_command

import automodel_conv as amc
from automodel_conv.cli import words
from automodel_conv.cli.app import app
from automodel_conv.cli.completion import new_layouts
from automodel_conv.cli.words import _in_options
from automodel_conv.files.staging import STAGING_NAME
from automodel_conv.recipes import RECIPES
from automodel_conv.upstream.registry import transformers_available
from tests.cli.support import run

needs_transformers = pytest.mark.skipif(not transformers_available(), reason="builds a transformers model")


@pytest.mark.parametrize("command", [("plan",), ("load",), ("verify",), ("convert", "new")], ids=lambda c: c[0])
def test_an_error_of_this_package_is_printed_without_a_traceback(tmp_path, command):
    result = run(command[0], tmp_path / "nothing.safetensors", *command[1:])
    assert result.exit_code == 1
    assert result.stderr.startswith("error: no such checkpoint\n  where:")
    assert "Traceback" not in result.output


WRONG = {
    "no mesh": (["plan", "{plain}", "--no-model", "--mesh", "garbage"], ["not a mesh"]),
    "no folder to save to": (["plan", "{plain}", "--no-model", "--save", "/nonexistent/x"], ["--save", "No such file"]),
    "a folder to save to": (["plan", "{plain}", "--no-model", "--save", "{new}/.."], ["--save", "directory"]),
    "no device": (["load", "{plain}", "--device", "gpu"], ["not a device: 'gpu'", "--device cpu loads to the CPU"]),
    "a number below zero": (["load", "{plain}", "--device", "-1"], ["not a device", "-1"]),
    "a device that is not there": (["load", "{plain}", "--device", "cuda:99"], ["cannot load to cuda:99"]),
    "another kind of device": (["load", "{plain}", "--device", "mps"], ["cannot load to mps", '"cpu"']),
    "no data": (["load", "{plain}", "--device", "meta"], ["holds no data", "automodel-conv plan"]),
    "no dtype": (["load", "{plain}", "--dtype", "garbage"], ["garbage"]),
    "no numbers": (["convert", "{plain}", "{new}", "--no-model", "--dtype", "int8"], ["no dtype 'int8'", "float64"]),
    "no threads": (["convert", "{plain}", "{new}", "--threads", "0"], ["--threads"]),
    "no size": (["convert", "{plain}", "{new}", "--no-model", "--max-shard-size", "garbage"], ["not a size"]),
    "an endless size": (["convert", "{plain}", "{new}", "--no-model", "--max-shard-size", "9e999GB"], ["not a size"]),
    "a misspelled layout": (["convert", "{plain}", "{new}", "--layout", "per-expert"], ["write 'per_expert'"]),
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
def test_wrong_arguments_are_one_error_with_command_line_terms(plain, tmp_path, arguments, words):
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
def test_command_advises_its_own_options(moe, tmp_path):
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
@pytest.mark.parametrize(
    ("layout", "other", "advice"),
    [
        ("nemo", "vllm", 'the names are those of the layout "nemo": pass --source-layout nemo\n'),
        ("vllm", "nemo", 'pass --source-layout: one of "vllm", "vllm_w31", "vllm_trtllm", '),
    ],
)
def test_command_advises_the_layouts_that_the_names_have(moe, tmp_path, layout, other, advice):
    grouped = dict(amc.load_state_dict(moe, layout=layout))
    (tmp_path / "config.json").write_bytes((moe / "config.json").read_bytes())
    save_file(grouped, tmp_path / "model.safetensors")
    for command in (["plan"], ["load"], ["load", "--source-layout", other], ["convert", str(tmp_path / "new")]):
        assert advice in run(command[0], tmp_path, *command[1:]).stderr


@needs_transformers
@pytest.mark.parametrize("command", ["plan", "load", "convert", "bench"])
def test_command_advises_a_recipe_by_its_option(plain, tmp_path, command):
    (plain / "config.json").write_text(json.dumps({"model_type": "kimi_k2"}))
    result = run(command, plain, *([tmp_path / "new"] if command == "convert" else []))
    assert "pass --recipe kimi_k2;" in result.stderr
    assert "rules" not in result.stderr


@needs_transformers
def test_recipe_of_several_types_is_advised_by_one_name(plain):
    for model_type in ("bailing_moe", "bailing_moe_v2"):
        (plain / "config.json").write_text(json.dumps({"model_type": model_type}))
        assert "pass --recipe bailing_moe;" in run("plan", plain).stderr


@needs_transformers
def test_command_without_a_recipe_points_to_python(plain):
    (plain / "config.json").write_text(json.dumps({"model_type": "nobodys"}))
    result = run("load", plain)
    assert "in Python, pass rules of your own: https://" in result.stderr
    assert "rules=" not in result.stderr


@needs_transformers
def test_command_advises_no_option_of_another_command(moe, tmp_path):
    for file in moe.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"dtype": "int8"}))
    plan, load, convert = run("plan", tmp_path), run("load", tmp_path), run("convert", tmp_path, tmp_path / "new")
    for result, options in ((plan, {"--no-model"}), (load, {"--dtype"}), (convert, {"--no-model", "--dtype"})):
        assert result.exit_code == 1
        assert set(re.findall(r"--[\w-]+", result.stderr)) == options


def test_conversion_of_another_kind_restarts_with_an_option(plain, tmp_path):
    staging = tmp_path / "new" / STAGING_NAME
    staging.mkdir(parents=True)
    (staging / "journal.jsonl").write_text('{"work": {"files": []}}\n')
    result = run("convert", plain, tmp_path / "new", "--no-model")
    assert "start again with --no-resume" in result.stderr
    assert "resume=" not in result.stderr


def all_commands(group):
    """Yield the commands of a group and of the groups in it."""
    for command in group.commands.values():
        yield from all_commands(command) if hasattr(command, "commands") else [command]


def test_every_option_named_in_errors_exists():
    commands = list(all_commands(get_command(app)))
    options = {option for command in commands for p in command.params for option in (*p.opts, *p.secondary_opts)}
    advice = " ".join([*words.IN_OPTIONS.values(), *words.IN_COMMANDS.values()])
    assert set(re.findall(r"--[\w-]+", advice)) <= options


COMMANDS = ["plan", "load", "convert", "verify", "adapter", "adapter merge", "refit-plan", "bench", "demo", ""]


@pytest.mark.parametrize("command", COMMANDS)
def test_h_prints_the_help_of_every_command(command):
    short, long = run(*command.split(), "-h"), run(*command.split(), "--help")
    assert short.exit_code == 0, short.output
    assert short.stdout == long.stdout
    assert "Usage:" in short.stdout


@pytest.mark.parametrize("command", ["", "adapter"])
def test_group_without_a_command_prints_its_help(command):
    result = run(*command.split())
    assert result.exit_code == 0
    assert result.stdout == run(*command.split(), "--help").stdout


def test_help_states_the_exit_status():
    assert "Exit status: 0 if all went well, 1 after an error, 2 if" in " ".join(run("-h").stdout.split())


USAGE = {
    "a misspelled command": (["lod"], "no such command 'lod'", "write load"),
    "a misspelled command of a group": (["adapter", "mrge"], "no such command 'mrge'", "write merge"),
    "no argument": (["load"], "missing argument 'PATH'", None),
    "one argument too many": (["load", "a", "b"], "got unexpected extra argument", None),
    "a misspelled option": (["load", "a", "--laoyut", "x"], "no such option: --laoyut", "write --layout or"),
    "an option of no command": (["--foo"], "no such option: --foo", None),
    "a number below one": (["load", "a", "--threads", "0"], "invalid value for '--threads': ", None),
    "no such dtype": (
        ["load", "a", "--dtype", "bf16"],
        "invalid value for --dtype: no dtype",
        "write --dtype bfloat16",
    ),
}


@pytest.mark.parametrize(("arguments", "what", "do"), USAGE.values(), ids=USAGE)
def test_wrong_usage_is_one_error_with_status_2(arguments, what, do):
    result = run(*arguments)
    assert result.exit_code == 2
    assert not result.stdout
    assert result.stderr.startswith(f"error: {what}")
    assert ("  do:       " in result.stderr) == (do is not None)
    assert f"  do:       {do or ''}" in result.stderr or do is None
    assert "\n  usage:    " in result.stderr
    assert result.stderr.splitlines()[-1].startswith("  help:     ")
    assert result.stderr.endswith(" --help\n")


IN_BRACES = re.compile(r"\{([a-z_]\w*(?:=[^{}]*|\(\.\.\.[^{}]*)?)\}")
# Advice that only Python can follow: a command has no such option, so its errors leave the advice out.
ONLY_PYTHON = {
    *("adapter=", 'adapter="merged"', "bucket_bytes=", "carry", "experts", "experts=", "key_mapping=", "kind"),
    "loader",
    *("memory_budget", "memory_map=False", "model", "model=", 'owners="holders"', "plan", "reference", "reference="),
    *("rules=", "rules=[...]", 'rules=automodel_conv.get_checkpoint_conversion_mapping("...")', "scratch_bytes="),
    *('save_checkpoint(..., adapter="merged")', 'save_checkpoint(..., adapter="only")', "trace_cache"),
}
# Advice whose value is computed, by its beginning: every value that is possible has words.
COMPUTED = {
    'layout="...': [f'layout="{name}"' for name in new_layouts()],
    "rules=automodel_conv.recipes....": [f"rules=automodel_conv.recipes.{f.__name__}()" for f in RECIPES.values()],
}


def texts_of(path):
    """Yield the texts of a module, without docstrings; a computed part of one is an ellipsis."""
    tree = ast.parse(path.read_text())
    inner, docs = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            inner |= {id(part) for part in node.values}
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            docs.add(id(node.value))
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(part.value if isinstance(part, ast.Constant) else "..." for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inner | docs:
            yield node.value


def advised_arguments():
    """Return every argument in braces in the texts of functions; those of the command line need no words."""
    package = Path(amc.__file__).parent
    files = [file for file in package.rglob("*.py") if package / "cli" not in file.parents]
    return {argument for file in files for text in texts_of(file) for argument in IN_BRACES.findall(text)}


def test_every_advised_argument_has_words_on_the_command_line_or_is_pythons():
    options = {option for command in all_commands(get_command(app)) for p in command.params for option in p.opts}
    found = advised_arguments()
    assert {"resume=False", "node_cache=", "dequantize=True", 'layout="..."'} <= found
    for argument in sorted(found - ONLY_PYTHON):
        for one in COMPUTED.get(next((start for start in COMPUTED if argument.startswith(start)), ""), [argument]):
            words = _in_options(one, options | {"--no-resume", "--no-strict", "--no-model"})
            assert words is not None, f"{one}: no words in cli/words.py, and not in ONLY_PYTHON"
            assert not PYTHONS_WORDS.search(words)


def test_arguments_that_only_python_has_are_left_out_of_errors():
    assert ONLY_PYTHON <= advised_arguments()
    for argument in ONLY_PYTHON:
        assert _in_options(argument, set()) is None, argument


def test_any_other_exception_propagates(plain, monkeypatch):
    def broken(*args, **kwargs):
        raise ZeroDivisionError

    monkeypatch.setattr("automodel_conv.compile_plan", broken)
    assert isinstance(run("plan", plain).exception, ZeroDivisionError)


def test_command_prints_the_entry_of_its_error_last_and_once(tmp_path):
    result = run("load", tmp_path / "nothing")
    assert result.stderr.startswith("error: no such checkpoint\n")
    assert result.stderr.splitlines()[-1].endswith(
        "https://automodel-conv.github.io/automodel_conv/errors/#checkpointerror"
    )
    assert result.stderr.count("help:") == 1
