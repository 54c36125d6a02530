"""Tests of the texts of wrong options, arguments and commands."""

import pytest
import typer

from automodel_conv.cli.usage_errors import UsageError, no_file_for_json, usage_message, usage_text
from tests.cli.support import run


def test_first_line_says_what_is_wrong_and_the_next_ones_what_to_do(plain):
    text = run("plan", plain, "--layuot", "nemo").stderr
    first, do, usage, help_ = text.splitlines()
    assert first == "error: no such option: --layuot"
    assert do == "  do:       write --layout or --source-layout"
    assert usage.startswith("  usage:    ")
    assert usage.endswith("plan [OPTIONS] PATH")
    assert help_.endswith("plan --help")


def test_option_of_a_command_before_the_command_is_told_its_place(plain):
    text = run("--json", "plan", plain).stderr
    assert text.splitlines()[:2] == ["error: no such option: --json", "  do:       write --json after the command"]
    assert "write --version" in run("--versoin").stderr
    assert "do:" not in run("--nonsense").stderr


def test_parts_are_apart():
    message = usage_message(typer.BadParameter("No dtype 'x'. Did you mean 'bfloat16'?", param_hint="--dtype"))
    assert "no dtype" in message.parts.what.lower()
    assert message.advice == ("write bfloat16",)
    assert usage_message(typer.BadParameter("wrong")).advice == ()


def test_error_without_a_command_has_no_usage():
    assert usage_text(UsageError("It is wrong."), "program plan") == "it is wrong\n  help:     program plan --help"


@pytest.mark.parametrize(
    ("args", "error", "replaced"),
    [
        (["a", "--json", "b"], "Got unexpected extra argument (b)", True),
        (["--json", "b", "a"], "Got unexpected extra argument (a)", True),
        (["a", "--json=b"], "Option '--json' does not take a value.", True),
        (["--json", "a"], "No such option: --other", False),
        (["a", "b", "--json"], "Got unexpected extra argument (b)", False),
        (["a", "--json", "--threads"], "Option '--threads' requires an argument.", False),
        (["a", "b"], "Got unexpected extra argument (b)", False),
        ([], "Missing argument 'PATH'.", False),
    ],
)
def test_only_an_option_with_a_file_is_told_that_it_takes_none(args, error, replaced):
    with pytest.raises(UsageError) as found, no_file_for_json(args):
        raise UsageError(error)
    assert found.value.message.startswith("--json takes no file") == replaced
    assert (found.value.message == error) != replaced


def test_arguments_that_are_right_pass():
    with no_file_for_json(["a", "--json"]):
        pass
