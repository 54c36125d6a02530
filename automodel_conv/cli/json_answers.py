"""``--json``: one JSON object on stdout, with the result of a command or with its error."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stdout
from typing import Any

import typer

from automodel_conv.cli.usage_errors import JSON_OPTION, UsageError, usage_message, usage_text
from automodel_conv.errors import ConversionError

# Exit status after Ctrl-C: 128 and the number of SIGINT, as shells report it.
_INTERRUPTED = 130
# Keys of the notes that the contexts of a command and of its groups share.
_ASKED, _ANSWERED, _COMMAND = (f"{__name__}.{key}" for key in ("asked", "answered", "command"))


def note_arguments(ctx: Any, args: Sequence[str]) -> None:
    """Note in the context of the program whether its arguments ask for JSON; they may be wrong."""
    options = args[: args.index("--")] if "--" in args else args
    ctx.meta[_ASKED] = any(option.partition("=")[0] == JSON_OPTION for option in options)


def note_command(ctx: Any) -> None:
    """Note the name of the command of a context, such as "adapter merge"."""
    names = []
    while ctx.parent is not None:
        names.append(ctx.info_name)
        ctx = ctx.parent
    ctx.meta[_COMMAND] = " ".join(reversed(names))


@contextmanager
def errors_as_json(ctx: Any) -> Iterator[None]:
    """Print the error that the block raises, if JSON is asked for; the error passes on.

    Bugs have a traceback instead.
    """
    try:
        yield
    except (ConversionError, UsageError, KeyboardInterrupt, typer.Exit) as error:
        is_problem = not isinstance(error, typer.Exit) or error.exit_code == _INTERRUPTED
        if is_problem and ctx.meta[_ASKED] and not ctx.meta.get(_ANSWERED):
            ctx.meta[_ANSWERED] = True
            _print_error(ctx, error)
        raise


def _print_error(ctx: Any, error: Any) -> None:
    from automodel_conv.cli.results.failures import failure_of, interruption, usage_failure
    from automodel_conv.cli.results.schema import envelope

    if isinstance(error, ConversionError):
        failure = failure_of(error)
    elif isinstance(error, UsageError):
        failure = usage_failure(usage_message(error), usage_text(error, ctx.command_path))
    else:
        failure = interruption()
    typer.echo(envelope(ctx.meta.get(_COMMAND), error=failure))


def print_result(ctx: Any, result: Any) -> None:
    """Print the result that a command returned.

    Raises:
        typer.Exit: the result shows a problem.
    """
    from automodel_conv.cli.results.schema import envelope

    typer.echo(envelope(ctx.meta[_COMMAND], result=result))
    if result.status:
        raise typer.Exit(result.status)


def without_stdout(json: bool) -> AbstractContextManager[Any]:
    """Return a context in which all that is printed goes to stderr, if JSON goes to stdout."""
    return redirect_stdout(sys.stderr) if json else nullcontext()
