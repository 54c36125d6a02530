"""The command ``automodel-conv refit-plan``."""

from __future__ import annotations

from typing import Annotated

import typer

from automodel_conv.cli.completion import dtypes
from automodel_conv.cli.options import JsonOption, StepsOption, dtype_named, show_progress, with_source_options
from automodel_conv.cli.printing import print_table
from automodel_conv.files.source_options import SourceOptions


@with_source_options
def refit_plan(
    path: Annotated[
        str,
        typer.Argument(
            metavar="PATH",
            help="A directory with config.json, with or without weights; or an index file, a .safetensors file, "
            "org/name or a URL.",
        ),
    ],
    trainer: Annotated[
        str, typer.Option(help="Mesh of the trainer: sizes of ep, fsdp, replicate, such as fsdp=64,ep=8.")
    ],
    engine: Annotated[
        str, typer.Option(help="Mesh of the engine: sizes of tp, ep, dp, replicate, such as tp=8,ep=32; ep is tp x dp.")
    ],
    source: SourceOptions,
    bucket_bytes: Annotated[
        str, typer.Option(help="Maximum size of a bucket: a number of bytes, or such as 256MiB.")
    ] = "256MiB",
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Dtype of the engine's floating tensors. Default: the one in config.json.", autocompletion=dtypes
        ),
    ] = None,
    json: JsonOption = False,
    progress: StepsOption = None,
) -> object:
    """Print what a refit would cost: bytes by rank and link, messages, rounds and memory.

    Reads only config.json and headers. The ranks need not exist.
    """
    from automodel_conv.cli.engine_mesh import parse_engine_mesh
    from automodel_conv.cli.forecast import parse_mesh
    from automodel_conv.cli.refit_plan import described_model, refit_plan
    from automodel_conv.cli.results.refits import refit_planned
    from automodel_conv.cli.steps import step_line
    from automodel_conv.cli.tables import divisions_table
    from automodel_conv.files.shards import parse_size

    meshes = parse_mesh(trainer), parse_engine_mesh(engine)
    bucket = parse_size(int(bucket_bytes) if bucket_bytes.isdecimal() else bucket_bytes)
    with step_line(show_progress(progress)) as begin_step:
        begin_step("headers")
        model = described_model(path, source, dtype_named(dtype))
        plan = refit_plan(model, *meshes, bucket, begin_step)
    if json:
        return refit_planned(plan)
    print_table(divisions_table(plan.divided))
    typer.echo(plan.forecast)
    if plan.busiest_link is not None:
        sender, receiver = plan.busiest_link
        typer.echo(f"the busiest link is from rank {sender} to rank {receiver}; ranks of the trainer come first")
    return None
