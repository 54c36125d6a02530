"""Tests of options that several commands share."""

import sys
from pathlib import Path

import pytest
import torch
import typer

from automodel_conv.cli.options import dtype_named, rules_of, show_progress, storage_options
from automodel_conv.errors import UnsupportedError
from automodel_conv.recipes import RECIPES
from tests.cli.support import run


@pytest.mark.parametrize("is_terminal", [False, True])
def test_bar_is_shown_on_a_terminal_by_default(monkeypatch, is_terminal):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal)
    assert show_progress(None) is is_terminal
    assert show_progress(True)
    assert not show_progress(False)


def test_a_dtype_is_named_as_in_torch():
    assert dtype_named(None) is None
    assert dtype_named("bfloat16") is dtype_named("torch.bfloat16") is torch.bfloat16
    assert dtype_named("auto") == "auto"


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("float33", "float32"),
        ("bf16", "bfloat16"),
        ("BF16", "bfloat16"),
        ("fp16", "float16"),
        ("Tensor", None),
        ("int8", None),
        ("", None),
    ],
)
def test_unknown_dtype_suggests_the_one_that_is_meant(name, meant):
    with pytest.raises(typer.BadParameter, match="no dtype") as caught:
        dtype_named(name)
    assert repr(name) in str(caught.value)
    assert caught.value.param_hint == "--dtype"
    assert str(caught.value).partition("  do:       ")[2] == ("" if meant is None else f"write --dtype {meant}")


def test_threads_below_one_are_refused_by_the_command_line(plain):
    result = run("load", plain, "--threads", "0")
    assert result.exit_code == 2
    assert "--threads" in result.stderr


def test_rules_are_those_of_the_model_none_or_a_recipe(monkeypatch):
    monkeypatch.setitem(RECIPES, "nobodys", lambda: ["a rule"])
    assert rules_of(True, None) is None
    assert rules_of(False, None) == []
    assert rules_of(True, "nobodys") == ["a rule"]


@pytest.mark.parametrize(
    ("model", "recipe", "error"), [(False, "kimi_k2", "--no-model"), (True, "kimi_k", "write --recipe kimi_k")]
)
def test_recipe_that_is_unknown_or_contradicted_names_the_option(model, recipe, error):
    with pytest.raises(typer.BadParameter, match=error) as caught:
        rules_of(model, recipe)
    assert caught.value.param_hint == "--recipe"


@pytest.mark.parametrize("command", ["plan", "load", "convert", "verify", "bench"])
def test_recipe_is_an_option_of_every_command_that_plans(plain, command):
    result = run(command, plain, *(["new"] if command in ("convert", "verify") else []), "--recipe", "nobodys")
    assert result.exit_code == 2
    assert "--recipe" in result.stderr
    assert "deepseek_v41" in result.stderr


def test_storage_options_are_json_or_texts():
    texts = ["anon=true", "key=AKIA=", 'client_kwargs={"endpoint_url": "http://h:1"}', 'secret="123"', "n=5", "e="]
    assert storage_options(texts) == {
        "anon": True,
        "key": "AKIA=",
        "client_kwargs": {"endpoint_url": "http://h:1"},
        "secret": "123",
        "n": 5,
        "e": "",
    }


@pytest.mark.parametrize(
    ("text", "error"), [("hidden", "KEY=VALUE"), ("=hidden", "KEY=VALUE"), ("key={hidden", "the value of key")]
)
def test_malformed_storage_option_is_refused_without_its_value(text, error):
    with pytest.raises(typer.BadParameter, match=error) as caught:
        storage_options([text])
    assert caught.value.param_hint == "--storage-option"
    assert "hidden" not in str(caught.value)


COMMANDS = [
    ("plan", "open_checkpoint", ["A"]),
    ("load", "load_state_dict", ["A"]),
    ("convert", "convert_checkpoint", ["A", "new"]),
    ("adapter convert", "convert_adapter", ["A", "new", "--base", "b", "--layout", "vllm"]),
    ("adapter merge", "merge_adapter", ["A", "b", "new"]),
]


@pytest.mark.parametrize(("command", "function", "arguments"), COMMANDS, ids=[name for name, *_ in COMMANDS])
def test_options_of_sources_are_passed_on(command, function, arguments, monkeypatch):
    seen = {}

    def remember(*args, **options):
        seen.update(options, path=args[0])
        raise UnsupportedError("enough")

    monkeypatch.setattr(f"automodel_conv.{function}", remember)
    given = {"revision": "r", "token": "hidden", "cache_dir": Path("c"), "subfolder": "s", "variant": "v"}
    words = [word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", value)]
    more = ["--local-files-only", "--storage-option", "anon=true", "--node-cache", "n", "--storage-option", "a=b"]
    result = run(*command.split(), *arguments, *words, *more)
    assert "enough" in result.stderr
    assert "hidden" not in result.output
    expected = given | {
        "path": "A",
        "local_files_only": True,
        "storage_options": {"anon": True, "a": "b"},
        "node_cache": Path("n"),
    }
    assert {name: seen[name] for name in expected} == expected


@pytest.mark.parametrize("command", ["verify", "bench", "refit-plan", "adapter inspect"])
def test_options_of_sources_are_options_of_all_commands_that_read(command, plain):
    further = {"refit-plan": ["--trainer", "fsdp=1", "--engine", "tp=1"], "adapter inspect": ["--base", "b"]}
    result = run(*command.split(), plain, *further.get(command, []), "--subfolder", "../up")
    assert result.exit_code == 1
    assert "no subfolder" in result.stderr


@pytest.mark.parametrize("command", ["load", "convert", "verify", "bench", "plan", "adapter merge"])
def test_help_of_80_columns_cuts_no_word(command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    shown = run(*command.split(), "--help").stdout
    assert "vllm_trtllm_padded" in shown
    assert "…" not in shown
