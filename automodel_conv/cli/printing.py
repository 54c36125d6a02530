"""Print tables and names to the terminal."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import typer

from automodel_conv.errors import listing

if TYPE_CHECKING:
    from rich.table import Table


def print_names(carried: tuple[str, ...], left_out: tuple[str, ...]) -> None:
    """Print the names of tensors that were not converted."""
    if carried:
        typer.echo(f"carried as they are, since the model has no place for them:\n{listing(carried)}")
    if left_out:
        typer.echo(f"left out:\n{listing(left_out)}")


def print_table(table: Table) -> None:
    """Print a table, as wide as the terminal; 100 columns wide if stdout is not a terminal."""
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else 100).print(table)
