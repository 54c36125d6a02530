"""Put errors in the words of the command line: the Python arguments that they advise become options."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

import typer
from typer.core import TyperGroup

from automodel_conv.errors import ConversionError

# Advice in Python's words (see ``errors.py``), and in those of the command line.
IN_OPTIONS = {
    "checksums=True": "--checksums",
    "dequantize=False": "leaving --dequantize out",
    "dequantize=True": "--dequantize",
    "drop=": "--drop",
    "dtype=": "--dtype",
    "layout": "--layout",
    "layout=": "--layout",
    "resume=False": "--no-resume",
    "rules": "--no-model",
    "rules=[]": "--no-model",
    "source_layout": "--source-layout",
    "source_layout=": "--source-layout",
    'source_layout="per_expert"': "--source-layout per_expert",
    'source_layout="transformers"': "--source-layout transformers",
    "strict=False": "--no-strict",
    "threads=": "--threads",
}
IN_COMMANDS = {
    "compile_plan(...)": "automodel-conv plan",
    "convert_checkpoint(..., checksums=True)": "automodel-conv convert --checksums",
    'convert_checkpoint(..., layout="per_expert")': "automodel-conv convert --layout per_expert",
    "convert_checkpoint(..., rules=[], dequantize=True)": "automodel-conv convert --no-model --dequantize",
}


class Commands(TyperGroup):
    """Errors of this package end a command with their text; others are bugs and keep a traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except ConversionError as error:
            command = self.commands.get(ctx.invoked_subcommand or "")
            parameters = [] if command is None else command.params
            options = {option for parameter in parameters for option in (*parameter.opts, *parameter.secondary_opts)}
            error.say(lambda said: _in_options(said, options))
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(1) from None


def _in_options(said: str, options: Container[str]) -> str | None:
    """How the user of a command with these options writes what an error says; None if it has no such option."""
    written = IN_OPTIONS.get(said)
    if written is not None and any(word in options for word in written.split()):
        return written
    return IN_COMMANDS.get(said)
