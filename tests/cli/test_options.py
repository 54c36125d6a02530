"""Tests of options that several commands share."""

import sys

import pytest
import torch
import typer

from automodel_conv.cli.options import dtype_named, rules_of, show_progress
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
    assert dtype_named("bfloat16") is torch.bfloat16


@pytest.mark.parametrize("name", ["float33", "Tensor", "", "torch.float32"])
def test_malformed_dtype_error_names_the_option(name):
    with pytest.raises(typer.BadParameter, match="has no dtype") as caught:
        dtype_named(name)
    assert repr(name) in str(caught.value)
    assert caught.value.param_hint == "--dtype"


def test_threads_below_one_are_refused_by_the_command_line(plain):
    result = run("load", plain, "--threads", "0")
    assert result.exit_code == 2
    assert "--threads" in result.stderr


def test_rules_are_those_of_the_model_none_or_a_recipe(monkeypatch):
    monkeypatch.setitem(RECIPES, "nobodys", lambda: ["a rule"])
    assert rules_of(True, None) is None
    assert rules_of(False, None) == []
    assert rules_of(True, "nobodys") == ["a rule"]


@pytest.mark.parametrize(("model", "recipe", "error"), [(False, "kimi_k2", "--no-model"), (True, "kimi", "kimi_k2")])
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
