"""The command line: ``automodel-conv plan | load | demo``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from typer.core import TyperGroup

import automodel_conv
from automodel_conv.demo import BIG as DEMO_MODEL
from automodel_conv.demo import RUNS, DemoModel, DemoResult, run_demo
from automodel_conv.errors import ConversionError, UnknownTarget
from automodel_conv.loading import LoadReport, compile_plan, load_state_dict


class _Commands(TyperGroup):
    """Errors of this package end a command with their text; others are bugs and keep a traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except ConversionError as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(1) from None


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
) -> None:
    """Print where every byte of a checkpoint goes. Reads headers only."""
    compiled = compile_plan(path, rules=None if model else [], layout=layout)
    typer.echo(compiled.summary())
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
    dtype: Annotated[
        str | None,
        typer.Option(help="Of floating tensors, such as bfloat16. Default: the model's."),
    ] = None,
    device: Annotated[str, typer.Option(help="Where to, such as cuda:0.")] = "cpu",
    threads: Annotated[int | None, typer.Option(min=1, help="Reader threads. Default: by the machine.")] = None,
    strict: Annotated[bool, typer.Option(help="Fail unless names and shapes fit.")] = True,
    progress: Annotated[bool | None, typer.Option(help="Show a bar. Default: on a terminal.")] = None,
) -> None:
    """Load a checkpoint into memory and print how that went."""
    loaded = load_state_dict(
        path,
        layout=layout,
        dtype=_dtype(dtype),
        device=device,
        threads=threads,
        strict=strict,
        progress=sys.stderr.isatty() if progress is None else progress,
    )
    _print(_report_table(loaded.report, len(loaded)))


@app.command()
def demo(
    directory: Annotated[
        Path | None, typer.Option(help="Where to put 1 GB for a minute. Default: the system's.")
    ] = None,
) -> None:
    """Load a new checkpoint of 1 GB with transformers and with this package, and compare them."""
    if not show_demo(DEMO_MODEL, None if directory is None else str(directory)):
        raise typer.Exit(1)


def show_demo(model: DemoModel, directory: str | None = None) -> bool:
    """Run the demo and print its table; returns whether all tensors were equal, bit for bit."""
    typer.echo("writing a Mixture-of-Experts checkpoint with transformers, then loading it with both ...")
    result = run_demo(model, directory)
    typer.echo(
        f"{result.files} files, {result.file_bytes / 1e9:.2f} GB, "
        f"written in {result.write_seconds:.0f} s to {result.directory}"
    )
    _print(_demo_table(result))
    for name in result.different[:10]:
        typer.echo(f"different: {name}", err=True)
    typer.echo("the files are removed")
    return not result.different


def _dtype(name: str | None) -> torch.dtype | None:
    if name is None:
        return None
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise typer.BadParameter(f"torch has no dtype {name!r}", param_hint="--dtype")
    return dtype


def _report_table(report: LoadReport, tensors: int) -> Table:
    table = Table(show_header=False, caption="plan includes importing transformers, where needed")
    table.add_column()
    table.add_column(justify="right")
    table.add_row("tensors", str(tensors))
    table.add_row("read", f"{report.bytes_read / 1e9:.3f} GB")
    table.add_row("speed", f"{report.gb_per_s:.2f} GB/s")
    for phase, seconds in report.seconds.items():
        table.add_row(f"seconds: {phase}", f"{seconds:.3f}")
    table.add_row("peak extra memory, at most", f"{report.peak_extra_bytes / 2**20:.1f} MiB")
    table.add_row("made by transformers' own code", str(len(report.fallbacks)))
    if report.copied_by_kernels or report.copied_by_torch:
        table.add_row("copies on the device by kernels", str(report.copied_by_kernels))
        table.add_row("copies on the device by torch", str(report.copied_by_torch))
    if report.without_kernels is not None:
        table.add_row("no kernels, because", report.without_kernels)
    table.add_row("missing", str(len(report.missing_keys)))
    table.add_row("unexpected", str(len(report.unexpected_keys)))
    table.add_row("wrong shape", str(len(report.mismatched_keys)))
    return table


def _demo_table(result: DemoResult) -> Table:
    table = Table(
        "loaded with", caption=f"median of {RUNS} new processes; memory is the peak above the level after imports"
    )
    for title in ("seconds", "GB/s", "peak allocated GB", "peak resident GB", "bit-exact"):
        table.add_column(title, justify="right")
    for method, load in result.loads.items():
        exact = "" if method == "transformers" else "no" if result.different else "yes"
        table.add_row(
            method,
            f"{load.seconds:.2f}",
            f"{result.file_bytes / 1e9 / load.seconds:.2f}",
            _gigabytes(load.anonymous_bytes),
            _gigabytes(load.resident_bytes),
            exact,
        )
    return table


def _gigabytes(nbytes: int | None) -> str:
    return "-" if nbytes is None else f"{nbytes / 1e9:.2f}"


def _print(table: Table) -> None:
    Console(width=None if sys.stdout.isatty() else 100).print(table)
