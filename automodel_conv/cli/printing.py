"""Print tables and names to the terminal."""

from __future__ import annotations

import errno
import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import typer

from automodel_conv.errors import listing, printable

if TYPE_CHECKING:
    from pathlib import Path

    from rich.table import Table


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


@contextmanager
def writes_option(option: str, file: Path) -> Iterator[None]:
    """Print that the block wrote the file that an option names; ``typer.BadParameter`` if it cannot."""
    try:
        yield
    except OSError as error:
        raise typer.BadParameter(f"{error.strerror}: {error.filename}", param_hint=option) from None
    typer.echo(f"wrote {printable(str(file))}", err=True)


def refuse_unwritable(option: str, file: Path) -> None:
    """Raise ``typer.BadParameter`` if the file that an option names cannot be written, before work that takes long."""
    folder = file.parent
    if file.is_dir():
        number = errno.EISDIR
    elif not folder.is_dir():
        number = errno.ENOENT
    elif not os.access(file if file.exists() else folder, os.W_OK):
        number = errno.EACCES
    else:
        return
    raise typer.BadParameter(f"{os.strerror(number)}: {file}", param_hint=option)


@contextmanager
def errors_of_output() -> Iterator[None]:
    """Print one error if the block cannot write to stdout, such as to a file on a full disk, and exit."""
    try:
        yield
    except OSError as error:
        if not _stdout_fails():
            raise
        typer.echo(f"error: the output cannot be written: {error.strerror}", err=True)
        sys.exit(1)


def _stdout_fails() -> bool:
    """Return whether stdout refuses an empty line; what was printed to it is thrown away then."""
    if sys.stdout is None:
        return False
    try:
        typer.echo()
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())  # Python flushes stdout once more when it ends
        os.close(nowhere)
        return True
    return False


def output_width() -> int:
    """Return the columns of the terminal, or 100 if stdout is not a terminal."""
    is_terminal = sys.stdout is not None and sys.stdout.isatty()  # None: the shell closed it (>&-)
    return shutil.get_terminal_size().columns if is_terminal else 100


def print_table(table: Table) -> None:
    """Print a table as wide as the output; text that does not fit continues on the next line, and nothing is cut."""
    from rich.console import Console

    for column in table.columns:
        column.overflow = "fold"
    Console(width=output_width()).print(table)
