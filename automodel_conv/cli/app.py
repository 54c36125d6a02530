"""The command line: ``automodel-conv plan | load | convert | verify | bench | demo``.

A command imports what it needs when it is called, so that help comes without torch.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Container
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

import automodel_conv
from automodel_conv.errors import ConversionError, DestinationError, UnknownTarget, WriteError, listing, message

if TYPE_CHECKING:
    import torch
    from rich.table import Table

    from automodel_conv.cli.demo import DemoModel
    from automodel_conv.publishing.conversion import Conversion

# Advice in Python's words (see ``errors.py``), and in those of the command line.
_IN_OPTIONS = {
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
_IN_COMMANDS = {
    "compile_plan(...)": "automodel-conv plan",
    "convert_checkpoint(..., checksums=True)": "automodel-conv convert --checksums",
    'convert_checkpoint(..., layout="per_expert")': "automodel-conv convert --layout per_expert",
    "convert_checkpoint(..., rules=[], dequantize=True)": "automodel-conv convert --no-model --dequantize",
}


class _Commands(TyperGroup):
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
    written = _IN_OPTIONS.get(said)
    if written is not None and any(word in options for word in written.split()):
        return written
    return _IN_COMMANDS.get(said)


app = typer.Typer(
    cls=_Commands,
    help="Loads and converts Hugging Face Mixture-of-Experts checkpoints.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

_PathArgument = Annotated[
    str,
    typer.Argument(metavar="PATH", help="A directory, an index file, a .safetensors file, or org/name."),
]
_LayoutOption = Annotated[
    str | None,
    typer.Option(help="How routed experts shall lie: transformers, nemo, gpt_oss, vllm. Default: the model's."),
]
_ProgressOption = Annotated[bool | None, typer.Option(help="Show a bar. Default: on a terminal.")]
_ThreadsOption = Annotated[int | None, typer.Option(min=1, help="Threads. Default: by the machine.")]
_NewLayoutOption = Annotated[
    str | None,
    typer.Option(
        help="How routed experts shall lie: transformers, nemo, gpt_oss, vllm, per_expert. Default: the model's."
    ),
]
_SourceLayoutOption = Annotated[
    str | None,
    typer.Option(help="How grouped experts of the source lie. Default: as the files say, or else as the model's."),
]
_NewDtypeOption = Annotated[
    str | None,
    typer.Option(help="Of floating tensors, such as bfloat16. Default: the source's."),
]
_DequantizeOption = Annotated[
    bool,
    typer.Option("--dequantize", help="Decode what config.json says is quantized, to --dtype or bfloat16."),
]
_DropOption = Annotated[
    list[str] | None,
    typer.Option(metavar="PATTERN", help="Leave out tensors of such names, as in 'mtp.*'. May be repeated."),
]
_ModelOption = Annotated[
    bool,
    typer.Option("--model/--no-model", help="Names of the model of config.json, or those of the source."),
]


def main() -> None:
    """The console entry."""
    app()


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        typer.echo(automodel_conv.__version__)
        raise typer.Exit()


@app.command()
def plan(
    path: _PathArgument,
    layout: _LayoutOption = None,
    source_layout: _SourceLayoutOption = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of org/name.")] = None,
    explain: Annotated[
        list[str] | None,
        typer.Option(help="A target: print every source of it with its region. May be repeated."),
    ] = None,
    json: Annotated[Path | None, typer.Option(help="Write the plan to this file.")] = None,
    model: Annotated[
        bool,
        typer.Option(
            "--model/--no-model",
            help="Plan for the model of config.json, or keep the names as they are.",
        ),
    ] = True,
    mesh: Annotated[
        str | None,
        typer.Option(help="What each rank would read: sizes of ep, fsdp, replicate, as in ep=64,fsdp=8."),
    ] = None,
) -> None:
    """Print where every byte of a checkpoint goes. Reads headers only, of org/name too."""
    from automodel_conv.cli.forecast import forecast, parse_mesh
    from automodel_conv.cli.tables import mesh_table

    sizes = None if mesh is None else parse_mesh(mesh)
    checkpoint = automodel_conv.open_checkpoint(path, revision=revision)
    compiled = automodel_conv.compile_plan(
        checkpoint, rules=None if model else [], layout=layout, source_layout=source_layout
    )
    typer.echo(compiled.summary())
    _name((), compiled.left_out)
    if sizes is not None:
        _print(mesh_table(forecast(checkpoint, compiled, sizes)))
    for target in explain or ():
        try:
            text = compiled.explain(target)
        except UnknownTarget as error:
            raise typer.BadParameter(str(error), param_hint="--explain") from None
        typer.echo(f"\n{text}")
    if json is not None:
        try:
            json.write_text(compiled.to_json(), encoding="utf-8")
        except OSError as error:
            raise typer.BadParameter(str(error), param_hint="--json") from None


@app.command()
def load(
    path: _PathArgument,
    layout: _LayoutOption = None,
    source_layout: _SourceLayoutOption = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="Of floating tensors, such as bfloat16. Default: the model's."),
    ] = None,
    device: Annotated[str, typer.Option(help="Where to, such as cuda:0.")] = "cpu",
    threads: Annotated[int | None, typer.Option(min=1, help="Reader threads. Default: by the machine.")] = None,
    strict: Annotated[bool, typer.Option(help="Fail unless names and shapes fit.")] = True,
    verify: Annotated[bool, typer.Option("--verify", help="First compare all tensors with their checksums.")] = False,
    progress: _ProgressOption = None,
) -> None:
    """Load a checkpoint into memory and print how that went."""
    from automodel_conv.cli.tables import report_table

    loaded = automodel_conv.load_state_dict(
        path,
        layout=layout,
        source_layout=source_layout,
        dtype=_dtype(dtype),
        device=device,
        threads=threads,
        strict=strict,
        verify=verify,
        progress=_shows(progress),
    )
    _print(report_table(loaded.report, len(loaded)))
    _name((), loaded.report.left_out)


@app.command()
def convert(
    source: _PathArgument,
    destination: Annotated[str, typer.Argument(help="A directory, new or without weights in it.")],
    layout: _NewLayoutOption = None,
    source_layout: _SourceLayoutOption = None,
    dtype: _NewDtypeOption = None,
    dequantize: _DequantizeOption = False,
    drop: _DropOption = None,
    max_shard_size: Annotated[str, typer.Option(help="Of a file, such as 5GB or 300MiB.")] = "5GB",
    model: _ModelOption = True,
    resume: Annotated[bool, typer.Option(help="Go on with what an earlier call has finished, or start anew.")] = True,
    verify: Annotated[bool, typer.Option(help="Read each file back and compare it with the source.")] = True,
    checksums: Annotated[bool, typer.Option("--checksums", help="Write a checksum of each tensor.")] = False,
    threads: _ThreadsOption = None,
    progress: _ProgressOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Tell what would be done; write nothing.")] = False,
) -> None:
    """Write a checkpoint anew with its experts in another layout. Interrupted, the same command goes on."""
    from automodel_conv.cli.tables import converted_table
    from automodel_conv.publishing.conversion import compile_conversion

    what: dict[str, Any] = {
        "rules": None if model else [],
        "layout": layout,
        "source_layout": source_layout,
        "dtype": _dtype(dtype),
        "dequantize": dequantize,
        "drop": drop or (),
        "max_shard_size": max_shard_size,
    }
    if dry_run:
        _tell(compile_conversion(source, **what), destination)
        return
    try:
        report = automodel_conv.convert_checkpoint(
            source,
            destination,
            **what,
            resume=resume,
            verify=verify,
            checksums=checksums,
            threads=threads,
            progress=_shows(progress),
        )
    except KeyboardInterrupt:
        same = "the same command" if resume else "the same command, with --resume,"
        typer.echo(f"interrupted: {same} goes on with the files that are not finished", err=True)
        raise typer.Exit(130) from None
    if report.was_complete:
        typer.echo("this conversion was complete: all of it was compared with the source, and nothing was written")
    _print(converted_table(report, verify))
    _name(report.carried, report.left_out)


@app.command()
def verify(
    source: _PathArgument,
    destination: Annotated[
        str | None,
        typer.Argument(help="What was made of it. Left out: the source is compared with its own checksums."),
    ] = None,
    layout: _NewLayoutOption = None,
    source_layout: _SourceLayoutOption = None,
    dtype: _NewDtypeOption = None,
    dequantize: _DequantizeOption = False,
    drop: _DropOption = None,
    model: _ModelOption = True,
    threads: _ThreadsOption = None,
    progress: _ProgressOption = None,
) -> None:
    """Check that a checkpoint is, bit for bit, what convert would make of another one."""
    from automodel_conv.execution.checksums import verify_checksums
    from automodel_conv.execution.cores import cores
    from automodel_conv.files.checkpoint import open_downloaded

    if destination is None:
        checkpoint = open_downloaded(source)
        nbytes = verify_checksums(checkpoint, cores() if threads is None else threads)
        typer.echo(f"{len(checkpoint.names)} tensors, {nbytes / 1e9:.3f} GB: all have their checksums")
        return
    nbytes = automodel_conv.verify_checkpoint(
        source,
        destination,
        rules=None if model else [],
        layout=layout,
        source_layout=source_layout,
        dtype=_dtype(dtype),
        dequantize=dequantize,
        drop=drop or (),
        threads=threads,
        progress=_shows(progress),
    )
    made = open_downloaded(destination)
    typer.echo(
        f"{len(made.names)} tensors in {len(made.files)} files, {nbytes / 1e9:.3f} GB: "
        "all are, bit for bit, what the source makes them"
    )


@app.command("bench")
def measure(
    path: _PathArgument,
    layout: _LayoutOption = None,
    dtype: _NewDtypeOption = None,
    model: _ModelOption = True,
    most: Annotated[str, typer.Option(help="Bytes of tensors that are timed, such as 8GB.")] = "8GB",
    threads: Annotated[int | None, typer.Option(min=1, help="Up to so many. Default: the default of loads.")] = None,
    cold: Annotated[
        bool, typer.Option("--cold", help="First let the system forget what it holds of the files.")
    ] = False,
) -> None:
    """Measure loads of a checkpoint on this machine, against its roof, and say what bounds them."""
    from automodel_conv.cli.bench import advice, bench
    from automodel_conv.cli.tables import bench_tables
    from automodel_conv.files.shards import parse_size

    found = bench(
        path,
        layout=layout,
        dtype=_dtype(dtype),
        use_model=model,
        most_bytes=parse_size(most),
        most_threads=threads,
        drop_cache=cold,
    )
    for table in bench_tables(found):
        _print(table)
    for text in advice(found):
        typer.echo(text)


@app.command("demo")
def compare(
    directory: Annotated[
        Path | None, typer.Option(help="Where to put 1 GB for a minute. Default: the system's.")
    ] = None,
) -> None:
    """Load a new checkpoint of 1 GB with transformers and with this package, and compare them."""
    from automodel_conv.cli import demo

    if not show_demo(demo.BIG, None if directory is None else str(directory)):
        raise typer.Exit(1)


def show_demo(model: DemoModel, directory: str | None = None) -> bool:
    """Run the demo and print its table; returns whether all tensors were equal, bit for bit."""
    from automodel_conv.cli.demo import run_demo
    from automodel_conv.cli.tables import demo_table

    typer.echo("writing a Mixture-of-Experts checkpoint with transformers, then loading it with both ...")
    result = run_demo(model, directory)
    typer.echo(
        f"{result.files} files, {result.file_bytes / 1e9:.2f} GB, "
        f"written in {result.write_seconds:.0f} s to {result.directory}"
    )
    _print(demo_table(result))
    for name in result.different[:10]:
        typer.echo(f"different: {name}", err=True)
    typer.echo("the files are removed")
    return not result.different


def _tell(conversion: Conversion, destination: str) -> None:
    """Print what a conversion would do.

    Raises:
        DestinationError: the destination holds a checkpoint already.
        WriteError: there is too little room.
    """
    from automodel_conv.cli.tables import two_columns
    from automodel_conv.files.room import room_in

    directory = os.path.abspath(destination)
    plan, room = conversion.plan, room_in(directory)
    typer.echo(plan.summary())
    table = two_columns()
    table.add_row("reads", f"{plan.bytes_read / 1e9:.3f} GB")
    table.add_row("writes", f"{plan.bytes_written / 1e9:.3f} GB")
    table.add_row("files", str(len(conversion.shards)))
    table.add_row("needs on the disk", f"{conversion.bytes_needed / 1e9:.3f} GB")
    table.add_row("free there", f"{room.free_bytes / 1e9:.3f} GB")
    table.add_row("carried as they are", str(len(conversion.carried)))
    table.add_row("left out", str(len(conversion.left_out)))
    if room.unfinished:
        table.add_row("unfinished work there", "yes")
    _print(table)
    _name(conversion.carried, conversion.left_out)
    if room.in_the_way:
        raise DestinationError(
            message(
                "the directory holds a checkpoint already",
                where=directory,
                found="\n" + listing(room.in_the_way),
                do="choose another directory, or remove these files first",
            )
        )
    if room.free_bytes < conversion.bytes_needed:
        raise WriteError(
            message(
                "the disk has too little room",
                where=directory,
                expected=f"{conversion.bytes_needed} bytes for {len(conversion.shards)} files",
                found=room.free_bytes,
            )
        )


def _name(carried: tuple[str, ...], left_out: tuple[str, ...]) -> None:
    if carried:
        typer.echo(f"carried as they are, since the model has no place for them:\n{listing(carried)}")
    if left_out:
        typer.echo(f"left out:\n{listing(left_out)}")


def _shows(progress: bool | None) -> bool:
    return sys.stderr.isatty() if progress is None else progress


def _dtype(name: str | None) -> torch.dtype | None:
    if name is None:
        return None
    import torch

    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise typer.BadParameter(f"torch has no dtype {name!r}", param_hint="--dtype")
    return dtype


def _print(table: Table) -> None:
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else 100).print(table)
