"""The commands for adapters: ``automodel-conv adapter convert | merge | inspect``."""

from __future__ import annotations

import math
from typing import Annotated

import typer

import automodel_conv
from automodel_conv.cli import completion
from automodel_conv.cli.options import (
    ChecksumsOption,
    DequantizeOption,
    JsonOption,
    ProgressOption,
    ResumeOption,
    ShardSizeOption,
    ThreadsOption,
    VerifyOption,
    dtype_named,
    show_progress,
    with_source_options,
)
from automodel_conv.cli.printing import print_kept_codes, print_names, print_table, resumable
from automodel_conv.cli.words import Command, Commands
from automodel_conv.errors import listing
from automodel_conv.files.source_options import SourceOptions, SourceSettings
from automodel_conv.lora.forms import FORMS
from automodel_conv.planning.layouts import LAYOUTS, PER_EXPERT

app = typer.Typer(
    cls=Commands,
    help="Convert, merge and inspect adapters (LoRA) of Mixture-of-Experts models.",
)

_ADAPTER = "A directory, URL or org/name with adapter_config.json and adapter_model.safetensors."
_BASE = "The checkpoint of the base model: a directory, an index file, a .safetensors file, org/name, or a URL."
BaseOption = Annotated[str, typer.Option(metavar="BASE", help=_BASE)]
AdapterArgument = Annotated[str, typer.Argument(metavar="ADAPTER", help=_ADAPTER)]


@app.command(cls=Command)
@with_source_options
def convert(
    adapter: Annotated[str, typer.Argument(metavar="SOURCE", help=_ADAPTER)],
    destination: Annotated[
        str,
        typer.Argument(
            metavar="DESTINATION",
            help="A directory that is new or contains no adapter, s3://bucket/prefix or hf://org/name.",
        ),
    ],
    base: BaseOption,
    layout: Annotated[
        str, typer.Option(help=f"Form of the new adapter: {', '.join(FORMS)}.", autocompletion=completion.forms)
    ],
    source: SourceOptions,
    json: JsonOption = False,
    progress: ProgressOption = None,
) -> object:
    """Convert an adapter to another form."""
    from automodel_conv.cli.results.adapters import adapter_converted

    shown = show_progress(progress)
    report = automodel_conv.convert_adapter(
        adapter,
        destination,
        base=base,
        layout=layout,  # type: ignore[arg-type]
        progress=shown,
        **source,
    )
    if json:
        return adapter_converted(report)
    typer.echo(report)
    return None


@app.command(cls=Command)
@with_source_options
def merge(
    base: Annotated[str, typer.Argument(metavar="BASE", help=_BASE)],
    adapter: AdapterArgument,
    destination: Annotated[
        str,
        typer.Argument(
            metavar="DESTINATION",
            help="A directory that is new or contains no weights, s3://bucket/prefix or hf://org/name.",
        ),
    ],
    source: SourceOptions,
    weight: Annotated[float, typer.Option(help="Factor of what the adapter adds.")] = 1.0,
    further: Annotated[
        list[str] | None,
        typer.Option("--and", metavar="PATH=WEIGHT", help="Another adapter to add, with its weight. May be repeated."),
    ] = None,
    layout: Annotated[
        str | None,
        typer.Option(
            help=f"Layout of the routed experts: {', '.join([*LAYOUTS, PER_EXPERT])}. Default: the base's.",
            autocompletion=completion.new_layouts,
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Dtype of floating tensors: bfloat16, ... or auto. Default: the base's.",
            autocompletion=completion.dtypes,
        ),
    ] = None,
    dequantize: DequantizeOption = False,
    max_shard_size: ShardSizeOption = "5GB",
    resume: ResumeOption = True,
    verify: VerifyOption = True,
    checksums: ChecksumsOption = False,
    threads: ThreadsOption = None,
    json: JsonOption = False,
    progress: ProgressOption = None,
) -> object:
    """Merge adapters into a checkpoint, tensor by tensor, without loading the model.

    To continue after an interruption, repeat the command.
    """
    from automodel_conv.cli.results.conversions import converted
    from automodel_conv.cli.tables import converted_table

    adapters = [(adapter, weight), *map(weighted, further or ())]
    with resumable(resume):
        report = automodel_conv.merge_adapter(
            base,
            adapters,
            destination,
            layout=layout,  # type: ignore[arg-type]
            dtype=dtype_named(dtype),
            dequantize=dequantize,
            max_shard_size=max_shard_size,
            resume=resume,
            verify=verify,
            checksums=checksums,
            threads=threads,
            progress=show_progress(progress),
            **source,
        )
    if not json:
        print_table(converted_table(report, verify))
        print_names(report.carried, report.left_out)
    print_kept_codes(report.kept_codes, dtype)
    return converted(report, verify) if json else None


@app.command(cls=Command)
@with_source_options
def inspect(
    adapter: AdapterArgument,
    base: BaseOption,
    source: SourceOptions,
    json: JsonOption = False,
) -> object:
    """Print what an adapter changes, and whether the base model has it.

    Reads only headers. Ends with status 1 if a part of the adapter would have no effect.
    """
    from automodel_conv.cli.results.adapters import inspected
    from automodel_conv.cli.tables import adapter_table
    from automodel_conv.lora.inspecting import inspect_adapter

    summary = inspect_adapter(adapter, base, SourceSettings(**source))
    if not json:
        print_table(adapter_table(summary))
    if summary.problems:
        lines = [f"{len(summary.problems)} of {summary.modules} modules would have no effect:"]
        lines.append(listing(summary.problems))
        if summary.why_no_model is not None:
            lines.append(f"names of the model are not known: {summary.why_no_model}")
        typer.echo("\n".join(lines), err=True)
    if json:
        return inspected(summary)
    if summary.problems:
        raise typer.Exit(1)
    return None


def weighted(text: str) -> tuple[str, float]:
    """Return the path and the weight of ``PATH=WEIGHT``.

    Raises:
        typer.BadParameter: there is no weight, or it is not a number.
    """
    path, _, number = text.rpartition("=")
    try:
        weight = float(number)
    except ValueError:
        weight = math.nan
    if not path or not math.isfinite(weight):
        raise typer.BadParameter(f"{text!r} is not PATH=WEIGHT, such as other-adapter=0.3", param_hint="--and")
    return path, weight
