"""Tests of options that several commands share."""

import sys

import pytest
import torch
import typer

from automodel_conv.cli.options import dtype_named, show_progress
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
