"""Arguments and options that commands share."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from difflib import get_close_matches
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from automodel_conv.cli import completion
from automodel_conv.errors import UnsupportedError, message
from automodel_conv.files.source_options import SourceOptions
from automodel_conv.planning.layouts import LAYOUTS, PER_EXPERT
from automodel_conv.recipes import RECIPES

if TYPE_CHECKING:
    import torch


PathArgument = Annotated[
    str,
    typer.Argument(
        metavar="PATH",
        help="A directory, an index file, a .safetensors file, org/name, or a URL.",
    ),
]
SourceArgument = Annotated[
    str,
    typer.Argument(metavar="SOURCE", help="A directory, an index file, a .safetensors file, org/name, or a URL."),
]
LayoutOption = Annotated[
    str | None,
    typer.Option(
        help=f"Layout of the routed experts: {', '.join(LAYOUTS)}. Default: the model's.",
        autocompletion=completion.layouts,
    ),
]
ProgressOption = Annotated[bool | None, typer.Option(help="Show a progress bar. Default: only on a terminal.")]
StepsOption = Annotated[
    bool | None,
    typer.Option(
        "--progress/--no-progress",
        help="Show the current step if planning takes longer than a second. Default: only on a terminal.",
    ),
]
ThreadsOption = Annotated[
    int | None, typer.Option(min=1, metavar="N", help="Number of threads. Default: chosen for this machine.")
]
NewLayoutOption = Annotated[
    str | None,
    typer.Option(
        help=f"Layout of the routed experts: {', '.join([*LAYOUTS, PER_EXPERT])}. Default: the model's.",
        autocompletion=completion.new_layouts,
    ),
]
SourceLayoutOption = Annotated[
    str | None,
    typer.Option(
        help="Layout of the source's grouped experts. Default: the one in its files, or else the model's.",
        autocompletion=completion.new_layouts,
    ),
]
NewDtypeOption = Annotated[
    str | None,
    typer.Option(
        help="Dtype of floating tensors: bfloat16, ... or auto. Default: the source's.",
        autocompletion=completion.dtypes,
    ),
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
HtmlOption = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Write a page that shows it, for a browser, to this file.")
]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print one JSON object to stdout, with the result or the error.")
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
        autocompletion=completion.recipes,
    ),
]


_PANEL = "Where the checkpoint is"


def _source_options(
    revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit of org/name.", rich_help_panel=_PANEL)
    ] = None,
    token: Annotated[
        str | None,
        typer.Option(help="Token for the Hub. Default: the one that `hf auth login` stored.", rich_help_panel=_PANEL),
    ] = None,
    cache_dir: Annotated[
        Path | None, typer.Option(help="Cache of the Hub. Default: HF_HUB_CACHE.", rich_help_panel=_PANEL)
    ] = None,
    subfolder: Annotated[str, typer.Option(help="Folder of the checkpoint below PATH.", rich_help_panel=_PANEL)] = "",
    variant: Annotated[
        str | None,
        typer.Option(help="Variant of the files, as in model.fp16.safetensors.", rich_help_panel=_PANEL),
    ] = None,
    local_files_only: Annotated[
        bool,
        typer.Option("--local-files-only", help="Read org/name only from the cache.", rich_help_panel=_PANEL),
    ] = False,
    storage_option: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE",
            help="Option for the protocol of a URL, as fsspec takes it, such as anon=true. VALUE is JSON, or a text. "
            "May be repeated.",
            rich_help_panel=_PANEL,
        ),
    ] = None,
    node_cache: Annotated[
        Path | None,
        typer.Option(
            help="Directory on this machine that keeps the bytes of files behind URLs.", rich_help_panel=_PANEL
        ),
    ] = None,
) -> SourceOptions:
    """Return the options that were given on the command line."""
    options = SourceOptions(
        revision=revision,
        token=token,
        cache_dir=cache_dir,
        subfolder=subfolder,
        variant=variant,
        local_files_only=local_files_only,
        storage_options=storage_options(storage_option or ()),
        node_cache=node_cache,
    )
    return {name: value for name, value in options.items() if value}  # type: ignore[return-value]


def with_source_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate a command with the parameter ``source``, which is filled by options for each of ``SourceOptions``."""
    shared = inspect.signature(_source_options, eval_str=True).parameters
    own = inspect.signature(command, eval_str=True).parameters
    parameters = [*(parameter for name, parameter in own.items() if name != "source"), *shared.values()]

    @wraps(command)
    def called(**values: Any) -> Any:
        return command(source=_source_options(**{name: values.pop(name) for name in shared}), **values)

    called.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    called.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return called


def storage_options(texts: Iterable[str]) -> dict[str, Any]:
    """Return the values of ``--storage-option`` by their keys; a value that is not JSON is a text.

    Raises:
        typer.BadParameter: there is no key, or an object or a list is not JSON. The value, which may be a secret, is
            not shown.
    """
    options: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise typer.BadParameter("expected KEY=VALUE, such as anon=true", param_hint="--storage-option")
        try:
            options[key] = json.loads(value)
        except (ValueError, RecursionError):
            if value.startswith(("{", "[", '"')):
                raise typer.BadParameter(f"the value of {key} is not JSON", param_hint="--storage-option") from None
            options[key] = value
    return options


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
        raise no_such("recipe", recipe, sorted(RECIPES), "--recipe")
    return RECIPES[recipe]()


def show_progress(progress: bool | None) -> bool:
    """Return whether to show a progress bar, from the value of ``ProgressOption``."""
    return sys.stderr.isatty() if progress is None else progress


def dtype_named(name: str | None) -> torch.dtype | str | None:
    """Return the torch dtype that an option names, or "auto".

    Raises:
        typer.BadParameter: tensors cannot be cast to a dtype of this name.
    """
    if name is None:
        return None
    from automodel_conv.upstream.given_dtypes import given_dtype, similar_name

    try:
        return given_dtype(name)
    except UnsupportedError:
        raise no_such("dtype", name, completion.dtypes(), "--dtype", similar_name(name)) from None


def no_such(kind: str, name: str, known: Sequence[str], option: str, similar: str | None = None) -> typer.BadParameter:
    """Return the error for the name of something that does not exist.

    Args:
        kind: what the name is of.
        name: the name.
        known: the names that exist.
        option: the option that has the name.
        similar: the name to suggest. None: the one of ``known`` that looks like it, if there is one.
    """
    if similar is None:
        similar = next(iter(get_close_matches(name.lower(), known, 1)), None)
    do = f"write {option} {similar}" if similar else None
    return typer.BadParameter(message(f"no {kind} {name!r}", expected=", ".join(known), do=do), param_hint=option)
