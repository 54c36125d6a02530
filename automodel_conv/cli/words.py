"""Texts of the command line: usage lines, and errors in which the Python arguments that they advise become options.

All errors have the form of ``errors.message``, wrong options too: the first line says what is wrong.
"""

from __future__ import annotations

from collections.abc import Container, Iterator
from contextlib import contextmanager
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from automodel_conv.cli.json_answers import (
    errors_as_json,
    note_arguments,
    note_command,
    print_result,
    without_stdout,
)
from automodel_conv.cli.usage_errors import UsageError, no_file_for_json, usage_text
from automodel_conv.errors import ConversionError
from automodel_conv.planning.layouts import LAYOUTS, PER_EXPERT
from automodel_conv.recipes import RECIPES

# Arguments as errors write them in braces (see ``errors.py``), and the options of the command line for them.
IN_OPTIONS = {
    "checksums=True": "--checksums",
    "dequantize=": "--dequantize",
    "dequantize=False": "leaving --dequantize out",
    "dequantize=True": "--dequantize",
    'device="cpu"': "--device cpu",
    "drop=": "--drop",
    "dtype=": "--dtype",
    "layout": "--layout",
    "layout=": "--layout",
    "max_shard_size=": "--max-shard-size",
    "node_cache=": "--node-cache",
    "resume=False": "--no-resume",
    "rules": "--no-model or --recipe",
    "rules=[]": "--no-model",
    "source_layout": "--source-layout",
    "source_layout=": "--source-layout",
    "storage_options=": "--storage-option",
    "strict=False": "--no-strict",
    "subfolder=": "--subfolder",
    "threads=": "--threads",
    "variant": "--variant",
    **{f'layout="{name}"': f"--layout {name}" for name in (*LAYOUTS, PER_EXPERT)},
    **{f'source_layout="{name}"': f"--source-layout {name}" for name in (*LAYOUTS, PER_EXPERT)},
}
IN_COMMANDS = {
    "compile_plan(...)": "automodel-conv plan",
    "load_state_dict(...)": "automodel-conv load",
    "merge_adapter(...)": "automodel-conv adapter merge",
    "convert_checkpoint(..., checksums=True)": "automodel-conv convert --checksums",
    'convert_checkpoint(..., layout="per_expert")': "automodel-conv convert --layout per_expert",
    'convert_checkpoint(..., layout="transformers", source_layout=...)': (
        "automodel-conv convert --layout transformers --source-layout LAYOUT"
    ),
    "convert_checkpoint(..., rules=[], dequantize=True)": "automodel-conv convert --no-model --dequantize",
}

_RECIPES = "rules=automodel_conv.recipes."


class Command(TyperCommand):
    """A command whose errors advise its own options, and whose usage names required arguments without braces.

    Newer versions of typer add braces.
    """

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        pieces = super().collect_usage_pieces(ctx)
        return [piece[1:-1] if piece.startswith("{") and piece.endswith("}") else piece for piece in pieces]

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        note_command(ctx)
        with no_file_for_json(args):
            return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        try:
            with without_stdout(ctx.params["json"]):
                return super().invoke(ctx)
        except ConversionError as error:
            options = {option for parameter in self.params for option in (*parameter.opts, *parameter.secondary_opts)}
            error.say(lambda argument: _in_options(argument, options))
            raise


class Commands(TyperGroup):
    """Commands that print errors of this package and wrong options, and exit; other exceptions keep their traceback.

    A command returns its result if that is printed as JSON.
    """

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        """Return the context of these arguments; without any, that of the help."""
        if not args and not extra.get("resilient_parsing"):
            args = ["--help"]
        with _usage_errors(info_name or ""):
            return super().make_context(info_name, args, parent, **extra)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if ctx.parent is None:
            note_arguments(ctx, args)
        with errors_as_json(ctx):
            return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        try:
            with _usage_errors(ctx.command_path), errors_as_json(ctx):
                result = super().invoke(ctx)
        except ConversionError as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(1) from None
        if result is not None and ctx.parent is None:
            print_result(ctx, result)
        return result


@contextmanager
def _usage_errors(path: str) -> Iterator[None]:
    """Print a wrong option, argument or command, and exit with status 2; ``path`` names the command or its group."""
    try:
        yield
    except UsageError as error:
        typer.echo(f"error: {usage_text(error, path)}", err=True)
        raise typer.Exit(2) from None


def _in_options(argument: str, options: Container[str]) -> str | None:
    """Return how a command with these options writes an argument of Python; None if it has no such option."""
    option = _recipe_option(argument) if argument.startswith(_RECIPES) else IN_OPTIONS.get(argument)
    if option is not None and any(word in options for word in option.split()):
        return option
    return IN_COMMANDS.get(argument)


def _recipe_option(argument: str) -> str | None:
    """Return the option for the rules of a recipe; None if only Python has them."""
    names = (name for name, recipe in RECIPES.items() if argument == f"{_RECIPES}{recipe.__name__}()")
    return next((f"--recipe {name}" for name in names), None)
