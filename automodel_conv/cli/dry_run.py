"""Dry runs: print what a conversion would do."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer
from rich.filesize import decimal

from automodel_conv.cli.printing import output_width, print_if_grouped, print_kept_codes, print_names, print_table
from automodel_conv.errors import DestinationError, listing, message
from automodel_conv.files.write_errors import no_room_error
from automodel_conv.planning.layouts import PER_EXPERT

if TYPE_CHECKING:
    from automodel_conv.cli.results.conversions import DryRun
    from automodel_conv.files.source_options import SourceSettings
    from automodel_conv.publishing.conversion import Conversion


def print_dry_run(
    conversion: Conversion, destination: str, settings: SourceSettings, dtype: str | None, json: bool = False
) -> DryRun | None:
    """Print what a conversion would do, or return it if it is printed as JSON; raise if it could not be done.

    Raises:
        DestinationError: the destination contains a checkpoint already.
        WriteError: the disk has too little free space.
    """
    from automodel_conv.cli.results.conversions import dry_run
    from automodel_conv.files.disk_space import disk_space_of
    from automodel_conv.files.shards import is_checkpoint
    from automodel_conv.files.uploads.folder_by_path import folder_of

    folder = folder_of(destination, settings)
    plan, room = conversion.plan, disk_space_of(folder.directory)
    at_once = folder.most_on_disk(conversion.shards)
    present = [name for name in folder.names() if is_checkpoint(name)] if folder.is_remote else room.existing_weights
    result = dry_run(conversion, sum(shard.nbytes for shard in at_once), room.free_bytes, room.unfinished)
    if not json:
        _print(plan.summary(output_width()), result)
    print_kept_codes(result.kept_codes, dtype)
    if conversion.naming.layout == PER_EXPERT:
        print_if_grouped((target.name for target in plan.targets), conversion.checkpoint.directory)
    if present and not result.unfinished:
        raise DestinationError(
            message(
                "the directory holds a checkpoint already",
                where=folder.name,
                found="\n" + listing(present),
                do="choose another directory, or remove these files first",
            )
        )
    if result.free_bytes < result.needed_bytes:
        raise no_room_error(folder.directory, result.needed_bytes, len(at_once), result.free_bytes)
    return result if json else None


def _print(summary: str, result: DryRun) -> None:
    """Print the summary of a plan, and a table of what its conversion would do."""
    from automodel_conv.cli.tables import two_columns

    typer.echo(summary)
    table = two_columns()
    table.add_row("reads", decimal(result.bytes_read))
    table.add_row("writes", decimal(result.bytes_written))
    table.add_row("files", str(result.files))
    table.add_row("needs on the disk", decimal(result.needed_bytes))
    table.add_row("free on the disk", decimal(result.free_bytes))
    table.add_row("carried as they are", str(len(result.carried)))
    table.add_row("left out", str(len(result.left_out)))
    if result.kept_codes:
        table.add_row("kept as codes", str(len(result.kept_codes)))
    if result.unfinished:
        table.add_row("unfinished work", "yes")
    print_table(table)
    print_names(result.carried, result.left_out)
