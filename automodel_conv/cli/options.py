"""Arguments and options that several commands share."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from automodel_conv.planning.layouts import LAYOUTS, PER_EXPERT

if TYPE_CHECKING:
    import torch


PathArgument = Annotated[
    str,
    typer.Argument(metavar="PATH", help="A directory, an index file, a .safetensors file, or org/name."),
]
LayoutOption = Annotated[
    str | None,
    typer.Option(help=f"How routed experts shall lie: {', '.join(LAYOUTS)}. Default: the model's."),
]
ProgressOption = Annotated[bool | None, typer.Option(help="Show a bar. Default: on a terminal.")]
ThreadsOption = Annotated[int | None, typer.Option(min=1, help="Threads. Default: by the machine.")]
NewLayoutOption = Annotated[
    str | None,
    typer.Option(help=f"How routed experts shall lie: {', '.join([*LAYOUTS, PER_EXPERT])}. Default: the model's."),
]
SourceLayoutOption = Annotated[
    str | None,
    typer.Option(help="How grouped experts of the source lie. Default: as the files say, or else as the model's."),
]
NewDtypeOption = Annotated[
    str | None,
    typer.Option(help="Of floating tensors, such as bfloat16. Default: the source's."),
]
DequantizeOption = Annotated[
    bool,
    typer.Option("--dequantize", help="Decode what config.json says is quantized, to --dtype or bfloat16."),
]
DropOption = Annotated[
    list[str] | None,
    typer.Option(metavar="PATTERN", help="Leave out tensors of such names, as in 'mtp.*'. May be repeated."),
]
ModelOption = Annotated[
    bool,
    typer.Option("--model/--no-model", help="Names of the model of config.json, or those of the source."),
]


def shows(progress: bool | None) -> bool:
    """Whether to show a bar, by ``ProgressOption``."""
    return sys.stderr.isatty() if progress is None else progress


def dtype_named(name: str | None) -> torch.dtype | None:
    """The dtype that an option names."""
    if name is None:
        return None
    import torch

    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise typer.BadParameter(f"torch has no dtype {name!r}", param_hint="--dtype")
    return dtype
