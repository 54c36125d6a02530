"""The command line: ``automodel-conv plan | load | convert | verify | adapter | refit-plan | bench | demo``.

Each command imports its modules when it runs, so help does not import torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.filesize import decimal

import automodel_conv
from automodel_conv.cli import adapter, refit_command
from automodel_conv.cli.completion import devices, dtypes
from automodel_conv.cli.dry_run import print_dry_run
from automodel_conv.cli.options import (
    ChecksumsOption,
    DequantizeOption,
    DropOption,
    HtmlOption,
    JsonOption,
    LayoutOption,
    ModelOption,
    NewDtypeOption,
    NewLayoutOption,
    PathArgument,
    ProgressOption,
    RecipeOption,
    ResumeOption,
    ShardSizeOption,
    SourceArgument,
    SourceLayoutOption,
    StepsOption,
    ThreadsOption,
    VerifyOption,
    dtype_named,
    rules_of,
    show_progress,
    with_source_options,
)
from automodel_conv.cli.printing import (
    errors_of_output,
    output_width,
    print_if_grouped,
    print_kept_codes,
    print_names,
    print_table,
    refuse_unwritable,
    resumable,
    writes_option,
)
from automodel_conv.cli.words import Command, Commands
from automodel_conv.errors import UnknownTarget, count_of
from automodel_conv.files.remote.urls import without_secrets
from automodel_conv.files.source_options import SourceOptions
from automodel_conv.planning.layouts import PER_EXPERT

if TYPE_CHECKING:
    from automodel_conv.cli.demo import DemoModel


app = typer.Typer(
    cls=Commands,
    help="Load and convert Hugging Face Mixture-of-Experts checkpoints.",
    epilog="Exit status: 0 if all went well, 1 after an error, 2 if an option or argument is wrong, 130 after Ctrl-C.",
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)

DEMO_NOTES = """\
transformers: AutoModelForCausalLM.from_pretrained, as it comes.
automodel_conv: load_model, into the same model on the meta device.
Both end with the same model. "equal bytes" compares digests of all bytes of all tensors, after each load.

The files were just written, so both packages read the page cache, not a disk. Before each load, memory is touched and
freed, so that the time in which a virtual machine gets memory from its host does not count. automodel_conv uses huge
pages if they are faster; PyTorch uses them only if THP_MEM_ALLOC_ENABLE=1 is set. The difference is smaller if PyTorch
uses them too, if files come from a disk, or if the memory was not touched before: https://automodel-conv.github.io/automodel_conv/performance/

The checkpoint is removed."""


def main() -> None:
    """Run the command line; the entry point of the console script."""
    with errors_of_output():
        app()


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        typer.echo(automodel_conv.__version__)
        raise typer.Exit()


@app.command(cls=Command)
@with_source_options
def plan(
    path: PathArgument,
    source: SourceOptions,
    layout: LayoutOption = None,
    source_layout: SourceLayoutOption = None,
    explain: Annotated[
        list[str] | None,
        typer.Option(help="Print every source of this target, with the elements that it fills. May be repeated."),
    ] = None,
    save: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the plan, as loaders take it, to this file.")
    ] = None,
    html: HtmlOption = None,
    model: Annotated[
        bool,
        typer.Option(
            "--model/--no-model",
            help="Plan for the model that config.json describes, or keep the names of the checkpoint.",
        ),
    ] = True,
    recipe: RecipeOption = None,
    mesh: Annotated[
        str | None,
        typer.Option(
            help="Print what each rank of this mesh would read: sizes of ep, fsdp, replicate, such as ep=64,fsdp=8."
        ),
    ] = None,
    json: JsonOption = False,
    progress: StepsOption = None,
) -> object:
    """Print the plan of a load: the sources, targets and bytes of each rule.

    Reads only headers, even for org/name.
    """
    from automodel_conv.cli.forecast import forecast, parse_mesh, regions_by_rank
    from automodel_conv.cli.results.plans import mesh_costs, plan_result
    from automodel_conv.cli.steps import step_line
    from automodel_conv.cli.tables import mesh_table

    layouts: dict[str, Any] = {"layout": layout, "source_layout": source_layout}
    sizes = None if mesh is None else parse_mesh(mesh)
    shows_steps = show_progress(progress)
    with step_line(shows_steps) as begin_step:
        begin_step("headers")
        checkpoint = automodel_conv.open_checkpoint(path, **source)
        begin_step("plan")
        compiled = automodel_conv.compile_plan(checkpoint, rules=rules_of(model, recipe), **layouts)
    costs = None
    if sizes is not None:
        with step_line(shows_steps) as begin_step:
            costs = forecast(checkpoint, compiled, sizes, begin_step)
    explained = explain or ()
    try:
        for target in explained:
            compiled.target(target)
    except UnknownTarget as error:
        raise typer.BadParameter(error.args[0], param_hint="--explain") from None
    if save is not None:
        text = compiled.to_json()
        with writes_option("--save", save):
            save.write_text(text, encoding="utf-8")
    if html is not None:
        ranks = None if costs is None or sizes is None else regions_by_rank(compiled, costs, sizes)
        with writes_option("--html", html):
            compiled.to_html(html, title=without_secrets(path), ranks=ranks)
    if json:
        return plan_result(compiled, explained, mesh_costs(costs, sizes) if costs and sizes else None)
    typer.echo(compiled.summary(output_width()))
    print_names((), compiled.left_out)
    if costs is not None:
        print_table(mesh_table(costs))
    for target in explained:
        typer.echo(f"\n{compiled.explain(target)}")
    return None


@app.command(cls=Command)
@with_source_options
def load(
    path: PathArgument,
    source: SourceOptions,
    layout: LayoutOption = None,
    source_layout: SourceLayoutOption = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Dtype of floating tensors: bfloat16, ... or auto. Default: the model's.", autocompletion=dtypes
        ),
    ] = None,
    recipe: RecipeOption = None,
    device: Annotated[str, typer.Option(help="Device to load to, such as cuda:0.", autocompletion=devices)] = "cpu",
    threads: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Reader threads. Default: chosen for this machine.")
    ] = None,
    strict: Annotated[bool, typer.Option(help="Fail unless names and shapes match the model.")] = True,
    verify: Annotated[
        bool,
        typer.Option("--verify", help="First compare all tensors with the checksums that `convert --checksums` wrote."),
    ] = False,
    html: HtmlOption = None,
    json: JsonOption = False,
    progress: ProgressOption = None,
) -> object:
    """Load a checkpoint into memory and print a report."""
    from automodel_conv.cli.results.loads import load_result
    from automodel_conv.cli.tables import report_table

    if html is not None:
        refuse_unwritable("--html", html)
    layouts: dict[str, Any] = {"layout": layout, "source_layout": source_layout}
    loaded = automodel_conv.load_state_dict(
        path,
        rules=rules_of(True, recipe),
        **layouts,
        dtype=dtype_named(dtype),
        device=device,
        threads=threads,
        strict=strict,
        verify=verify,
        progress=show_progress(progress),
        **source,
    )
    if not json:
        print_table(report_table(loaded.report, len(loaded)))
        print_names((), loaded.report.left_out)
    if html is not None:
        with writes_option("--html", html):
            loaded.report.to_html(html, title=without_secrets(path))
    return load_result(loaded.report, len(loaded)) if json else None


@app.command(cls=Command)
@with_source_options
def convert(
    path: SourceArgument,
    destination: Annotated[
        str,
        typer.Argument(
            metavar="DESTINATION",
            help="A directory that is new or contains no weights, s3://bucket/prefix or hf://org/name.",
        ),
    ],
    source: SourceOptions,
    layout: NewLayoutOption = None,
    source_layout: SourceLayoutOption = None,
    dtype: NewDtypeOption = None,
    dequantize: DequantizeOption = False,
    drop: DropOption = None,
    max_shard_size: ShardSizeOption = "5GB",
    model: ModelOption = True,
    recipe: RecipeOption = None,
    resume: ResumeOption = True,
    verify: VerifyOption = True,
    checksums: ChecksumsOption = False,
    threads: ThreadsOption = None,
    json: JsonOption = False,
    progress: ProgressOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be done; write nothing.")] = False,
) -> object:
    """Convert a checkpoint to another layout of its experts.

    To continue after an interruption, repeat the command.
    """
    from automodel_conv.cli.results.conversions import converted
    from automodel_conv.cli.tables import converted_table
    from automodel_conv.files.source_options import SourceSettings
    from automodel_conv.publishing.conversion import compile_conversion

    settings = SourceSettings(**source)

    arguments: dict[str, Any] = {
        "rules": rules_of(model, recipe),
        "layout": layout,
        "source_layout": source_layout,
        "dtype": dtype_named(dtype),
        "dequantize": dequantize,
        "drop": drop or (),
        "max_shard_size": max_shard_size,
        **source,
    }
    if dry_run:
        return print_dry_run(compile_conversion(path, **arguments), destination, settings, dtype, json)
    with resumable(resume):
        report = automodel_conv.convert_checkpoint(
            path,
            destination,
            **arguments,
            resume=resume,
            verify=verify,
            checksums=checksums,
            threads=threads,
            progress=show_progress(progress),
        )
    if not json:
        print_table(converted_table(report, verify))
        print_names(report.carried, report.left_out)
    print_kept_codes(report.kept_codes, dtype)
    if layout == PER_EXPERT:
        written = automodel_conv.open_checkpoint(destination, **settings.further(destination).source())
        print_if_grouped(written.names, written.directory)
    return converted(report, verify) if json else None


@app.command(cls=Command)
@with_source_options
def verify(
    path: SourceArgument,
    source: SourceOptions,
    destination: Annotated[
        str | None,
        typer.Argument(
            metavar="DESTINATION",
            help="The converted checkpoint. Without it, the source is compared with its own checksums.",
        ),
    ] = None,
    layout: NewLayoutOption = None,
    source_layout: SourceLayoutOption = None,
    dtype: NewDtypeOption = None,
    dequantize: DequantizeOption = False,
    drop: DropOption = None,
    model: ModelOption = True,
    recipe: RecipeOption = None,
    threads: ThreadsOption = None,
    json: JsonOption = False,
    progress: ProgressOption = None,
) -> object:
    """Check that a checkpoint is, bit for bit, the conversion of another one."""
    from automodel_conv.cli.results.loads import ComparedWithChecksums, ComparedWithSource
    from automodel_conv.execution.checksums import verify_checksums
    from automodel_conv.execution.cores import cores
    from automodel_conv.files.checkpoint import open_source
    from automodel_conv.files.source_options import SourceSettings
    from automodel_conv.verifying import compare_checkpoints

    settings = SourceSettings(**source)
    if destination is None:
        checkpoint = open_source(path, settings)
        nbytes = verify_checksums(checkpoint, cores() if threads is None else threads, show_progress(progress))
        if json:
            return ComparedWithChecksums(len(checkpoint.names), nbytes)
        typer.echo(f"{count_of(len(checkpoint.names), 'tensor')}, {decimal(nbytes)}: all match their checksums")
        return None
    verified = compare_checkpoints(
        path,
        destination,
        rules=rules_of(model, recipe),
        layout=layout,
        source_layout=source_layout,
        dtype=dtype_named(dtype),
        dequantize=dequantize,
        drop=drop or (),
        threads=threads,
        progress=show_progress(progress),
        **source,
    )
    written = open_source(destination, settings.further(destination))
    if json:
        return ComparedWithSource(len(written.names), len(written.files), verified.nbytes, verified.is_copy)
    same = "the source" if verified.is_copy else "a conversion of the source"
    tensors, files = count_of(len(written.names), "tensor"), count_of(len(written.files), "file")
    typer.echo(f"{tensors} in {files}, {decimal(verified.nbytes)}: bit-identical to {same}")
    return None


app.add_typer(adapter.app, name="adapter")
app.command("refit-plan", cls=Command)(refit_command.refit_plan)


@app.command("bench", cls=Command)
@with_source_options
def measure(
    path: PathArgument,
    source: SourceOptions,
    layout: LayoutOption = None,
    dtype: NewDtypeOption = None,
    model: ModelOption = True,
    recipe: RecipeOption = None,
    most: Annotated[str, typer.Option(help="Maximum bytes of tensors to time, such as 8GB.")] = "8GB",
    threads: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", help="Maximum number of threads or connections to time. Default: as for load."
        ),
    ] = None,
    cold: Annotated[bool, typer.Option("--cold", help="Drop the files from the page cache first.")] = False,
    json: JsonOption = False,
) -> object:
    """Measure loads of a checkpoint on this machine, compare them with its limit, and print what limits them.

    Of files that are not on this machine, ranges are read with 1, 4 and 16 connections for a few seconds, then a load.
    """
    from automodel_conv.cli.bench import advice, bench
    from automodel_conv.cli.remote_bench import remote_advice, remote_bench
    from automodel_conv.cli.results.benches import local_bench, remote_bench_result
    from automodel_conv.cli.tables import bench_tables, remote_bench_tables
    from automodel_conv.files.checkpoint import open_source
    from automodel_conv.files.shards import parse_size
    from automodel_conv.files.source_options import SourceSettings

    settings = SourceSettings(**source)
    what: dict[str, Any] = {"layout": layout, "dtype": dtype_named(dtype), "rules": rules_of(model, recipe)}
    if open_source(path, settings).is_remote:
        if cold:
            raise typer.BadParameter("files that are not on this machine have no page cache here", param_hint="--cold")
        found = remote_bench(path, settings, **what, most_bytes=parse_size(most), threads=threads)
        if json:
            return remote_bench_result(found)
        for table in remote_bench_tables(found):
            print_table(table)
        typer.echo(remote_advice(found))
        return None
    result = bench(
        path,
        settings,
        **what,
        most_bytes=parse_size(most),
        most_threads=threads,
        drop_cache=cold,
    )
    if json:
        return local_bench(result)
    for table in bench_tables(result):
        print_table(table)
    for text in advice(result):
        typer.echo(text)
    return None


@app.command("demo", cls=Command)
def compare(
    directory: Annotated[
        Path | None, typer.Option(help="Directory for 1 GB of temporary files. Default: the system's.")
    ] = None,
    html: HtmlOption = None,
    json: JsonOption = False,
) -> object:
    """Write a checkpoint of 1 GB, load it with transformers and with this package, and compare them.

    Needs 4 GB of free memory and 1 GB of disk space. All files are removed, except the page of the plan.
    """
    from automodel_conv.cli import demo
    from automodel_conv.cli.results.benches import demo_result

    folder = None if directory is None else str(directory)
    if json:
        return demo_result(demo.run_demo(demo.BIG, folder, typer.echo, html))
    if not show_demo(demo.BIG, folder, html):
        raise typer.Exit(1)
    return None


def show_demo(model: DemoModel, directory: str | None = None, html: Path | None = None) -> bool:
    """Run the demo, and print its progress and its table; return whether all bytes of all tensors were equal."""
    from automodel_conv.cli.demo import run_demo
    from automodel_conv.cli.tables import demo_table

    result = run_demo(model, directory, typer.echo, html)
    print_table(demo_table(result))
    for name in result.different[:10]:
        typer.echo(f"different: {name}", err=True)
    typer.echo(DEMO_NOTES)
    return not result.different
