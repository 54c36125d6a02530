"""Wrong options, arguments and commands, in the form of ``errors.message``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import typer

from automodel_conv.errors import Message, message

UsageError: Any = typer.BadParameter.__base__
"""The class of these errors: click's, or that of the copy of click in newer versions of typer."""
JSON_OPTION = "--json"
_NO_FILE = f"{JSON_OPTION} takes no file: write `{JSON_OPTION} > FILE`, or `plan --save FILE` for a plan to load with"


def usage_message(error: Any) -> Message:
    """Return what is wrong, and what was meant.

    Args:
        error: the ``UsageError``.
    """
    text = error.format_message().rstrip(".").replace("Input should be", "it must be")
    what, _, meant = text.partition(". Did you mean ")
    similar = getattr(error, "possibilities", None)
    if _is_of_a_command(error):
        what, meant = error.message, f"{error.option_name} after the command"
    elif similar:
        what, meant = error.message, " or ".join(sorted(similar))
    meant = meant.rstrip("?").replace("'", "")
    return message(what[:1].lower() + what[1:], do=f"write {meant}" if meant else None)


def _is_of_a_command(error: Any) -> bool:
    """Return whether an unknown option of a group is one of its commands'."""
    option = getattr(error, "option_name", None)
    commands = () if error.ctx is None else getattr(error.ctx.command, "commands", {}).values()
    return any(option in parameter.opts for command in commands for parameter in command.params)


def usage_text(error: Any, path: str) -> str:
    """Return the text of a wrong option, argument or command, with the usage of the command.

    Args:
        error: the ``UsageError``.
        path: the command or its group, if the error does not know it.
    """
    lines: list[str] = [usage_message(error)]
    if error.ctx is not None:
        path = error.ctx.command_path
        lines.append(f"  usage:    {' '.join(error.ctx.get_usage().partition(':')[2].split())}")
    lines.append(f"  help:     {path} --help")
    return "\n".join(lines)


@contextmanager
def no_file_for_json(args: Sequence[str]) -> Iterator[None]:
    """Say that ``--json`` takes no file if the arguments that the block parses give it one."""
    given = [*args]  # parsing empties the list
    try:
        yield
    except UsageError as error:
        follows = JSON_OPTION in given[:-1] and not given[given.index(JSON_OPTION) + 1].startswith("-")
        if any(arg.startswith(f"{JSON_OPTION}=") for arg in given) or (follows and "extra argument" in error.message):
            raise UsageError(_NO_FILE, error.ctx) from None
        raise
