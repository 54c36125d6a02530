"""Texts of the command line: usage lines, and errors in which the Python arguments that they advise become options."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from automodel_conv.errors import ConversionError
from automodel_conv.planning.layouts import LAYOUTS, PER_EXPERT
from automodel_conv.recipes import RECIPES

# Arguments as errors write them in braces (see ``errors.py``), and the options of the command line for them.
IN_OPTIONS = {
    "checksums=True": "--checksums",
    "dequantize=": "--dequantize",
    "dequantize=False": "leaving --dequantize out",
    "dequantize=True": "--dequantize",
    "drop=": "--drop",
    "dtype=": "--dtype",
    "layout": "--layout",
    "layout=": "--layout",
    "resume=False": "--no-resume",
    "rules": "--no-model or --recipe",
    "rules=[]": "--no-model",
    "source_layout": "--source-layout",
    "source_layout=": "--source-layout",
    "storage_options=": "--storage-option",
    "strict=False": "--no-strict",
    "threads=": "--threads",
    "variant": "--variant",
    **{f'source_layout="{name}"': f"--source-layout {name}" for name in (*LAYOUTS, PER_EXPERT)},
}
IN_COMMANDS = {
    "compile_plan(...)": "automodel-conv plan",
    "load_state_dict(...)": "automodel-conv load",
    "merge_adapter(...)": "automodel-conv adapter merge",
    "convert_checkpoint(..., checksums=True)": "automodel-conv convert --checksums",
    'convert_checkpoint(..., layout="per_expert")': "automodel-conv convert --layout per_expert",
    "convert_checkpoint(..., rules=[], dequantize=True)": "automodel-conv convert --no-model --dequantize",
}

_RECIPES = "rules=automodel_conv.recipes."


class Command(TyperCommand):
    """A command whose usage names required arguments without braces, as usual; newer versions of typer add braces."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        pieces = super().collect_usage_pieces(ctx)
        return [piece[1:-1] if piece.startswith("{") and piece.endswith("}") else piece for piece in pieces]


class Commands(TyperGroup):
    """Commands that print an error of this package and exit; other exceptions are bugs and keep their traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except ConversionError as error:
            command = self.commands.get(ctx.invoked_subcommand or "")
            parameters = [] if command is None else command.params
            options = {option for parameter in parameters for option in (*parameter.opts, *parameter.secondary_opts)}
            error.say(lambda argument: _in_options(argument, options))
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(1) from None


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
