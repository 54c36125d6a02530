"""Print tables and names to the terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import typer

from automodel_conv.errors import listing

if TYPE_CHECKING:
    from pathlib import Path

    from rich.table import Table


def count_of(number: int, noun: str) -> str:
    """Return a number with its noun: "1 file", "2 files"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def print_names(carried: tuple[str, ...], left_out: tuple[str, ...]) -> None:
    """Print the names of tensors that were not converted."""
    if carried:
        typer.echo(f"carried as they are, since the model has no place for them:\n{listing(carried)}")
    if left_out:
        typer.echo(f"left out:\n{listing(left_out)}")


def print_if_grouped(names: Iterable[str], directory: str) -> None:
    """Print that experts are grouped in the published form of a type, if they are.

    Args:
        names: names of the tensors in the published form.
        directory: directory with the ``config.json`` of the model.
    """
    from automodel_conv.files.config import model_type_of
    from automodel_conv.planning.layouts import PER_EXPERT, holds_grouped_experts

    if any(map(holds_grouped_experts, names)):
        model_type = model_type_of(directory) or "this model"
        typer.echo(f"{model_type} is published with grouped experts: {PER_EXPERT} leaves them grouped")


def print_kept_codes(kept_codes: tuple[str, ...], dtype: str | None) -> None:
    """Print that a dtype does not apply to codes, if there are any."""
    if kept_codes and dtype is not None:
        typer.echo("--dtype casts neither codes nor their scales: --dequantize decodes them to it")


@contextmanager
def resumable(resume: bool) -> Iterator[None]:
    """Print how to continue if Ctrl-C interrupts the block, and exit.

    Args:
        resume: whether the same command continues.
    """
    try:
        yield
    except KeyboardInterrupt:
        command = "the same command" if resume else "the same command, with --resume,"
        typer.echo(f"interrupted: {command} continues with the unfinished files", err=True)
        raise typer.Exit(130) from None


def write_json(file: Path, text: str) -> None:
    """Write the file that ``--json`` names.

    Raises:
        typer.BadParameter: it cannot be written.
    """
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise typer.BadParameter(str(error), param_hint="--json") from None


def print_table(table: Table) -> None:
    """Print a table, as wide as the terminal; 100 columns wide if stdout is not a terminal."""
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else 100).print(table)
