"""Arguments and options that commands share."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from automodel_conv.planning.layouts import LAYOUTS, PER_EXPERT
from automodel_conv.recipes import RECIPES

if TYPE_CHECKING:
    import torch


PathArgument = Annotated[
    str,
    typer.Argument(
        metavar="PATH",
        help="A directory, an index file, a .safetensors file, or org/name; for plan and load, also a URL.",
    ),
]
SourceArgument = Annotated[
    str,
    typer.Argument(metavar="SOURCE", help="A directory, an index file, a .safetensors file, or org/name."),
]
LayoutOption = Annotated[
    str | None,
    typer.Option(help=f"Layout of the routed experts: {', '.join(LAYOUTS)}. Default: the model's."),
]
ProgressOption = Annotated[bool | None, typer.Option(help="Show a progress bar. Default: only on a terminal.")]
StepsOption = Annotated[
    bool | None,
    typer.Option(
        "--progress/--no-progress",
        help="Show the current step if planning takes longer than a second. Default: only on a terminal.",
    ),
]
ThreadsOption = Annotated[int | None, typer.Option(min=1, help="Number of threads. Default: chosen for this machine.")]
NewLayoutOption = Annotated[
    str | None,
    typer.Option(help=f"Layout of the routed experts: {', '.join([*LAYOUTS, PER_EXPERT])}. Default: the model's."),
]
SourceLayoutOption = Annotated[
    str | None,
    typer.Option(help="Layout of the source's grouped experts. Default: the one in its files, or else the model's."),
]
NewDtypeOption = Annotated[
    str | None,
    typer.Option(help="Dtype of floating tensors, such as bfloat16. Default: the source's."),
]
DequantizeOption = Annotated[
    bool,
    typer.Option("--dequantize", help="Decode tensors that config.json lists as quantized, to --dtype or its dtype."),
]
DropOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="PATTERN",
        help="Leave out tensors with matching names, such as 'model.layers.61.*'. An error if none match. "
        "May be repeated.",
    ),
]
ShardSizeOption = Annotated[str, typer.Option(help="Maximum size of an output file, such as 5GB or 300MiB.")]
ResumeOption = Annotated[bool, typer.Option(help="Continue interrupted work, or start again.")]
VerifyOption = Annotated[bool, typer.Option(help="Read each output file back and compare all of it.")]
ChecksumsOption = Annotated[bool, typer.Option("--checksums", help="Write a checksum for each tensor.")]
ModelOption = Annotated[
    bool,
    typer.Option("--model/--no-model", help="Use the names of the model in config.json, or those of the source."),
]

RecipeOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help=f"Use the rules of a recipe, for types that transformers does not have: {', '.join(sorted(RECIPES))}.",
    ),
]


def rules_of(model: bool, recipe: str | None) -> list[Any] | None:
    """Return the argument ``rules`` for the values of ``ModelOption`` and ``RecipeOption``.

    Raises:
        typer.BadParameter: there is no such recipe, or both options exclude the rules of the model.
    """
    if recipe is None:
        return None if model else []
    if not model:
        raise typer.BadParameter("it excludes --no-model, which keeps all names", param_hint="--recipe")
    if recipe not in RECIPES:
        raise typer.BadParameter(f"no recipe {recipe!r}, only {', '.join(sorted(RECIPES))}", param_hint="--recipe")
    return RECIPES[recipe]()


def show_progress(progress: bool | None) -> bool:
    """Return whether to show a progress bar, from the value of ``ProgressOption``."""
    return sys.stderr.isatty() if progress is None else progress


def dtype_named(name: str | None) -> torch.dtype | None:
    """Return the torch dtype that an option names.

    Raises:
        typer.BadParameter: torch has no such dtype.
    """
    if name is None:
        return None
    import torch

    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise typer.BadParameter(f"torch has no dtype {name!r}", param_hint="--dtype")
    return dtype
