"""Helpers that run the command line in this process and read its output."""

from typer.testing import CliRunner

from automodel_conv.cli.app import app

GATE_UP = "model.layers.1.mlp.experts.gate_up_proj"


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def value(stdout: str, label: str) -> str:
    """Return the right column of the row that begins with ``label``."""
    [row] = [line.strip("│ ") for line in stdout.splitlines() if line.startswith(f"│ {label}")]
    return row.removeprefix(label).strip("│ ")
