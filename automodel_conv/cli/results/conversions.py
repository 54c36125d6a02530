"""The results of ``convert`` and ``adapter merge``, and of a dry run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from automodel_conv.cli.results.loads import Place
from automodel_conv.cli.results.plans import Rule, rules_of_plan
from automodel_conv.cli.results.result import Result, filled

if TYPE_CHECKING:
    from automodel_conv.publishing.conversion import Conversion
    from automodel_conv.publishing.convert_report import ConvertReport


class Converted(Result, frozen=True, tag_field="kind", tag="conversion"):
    """The result of ``convert`` and of ``adapter merge``: the fields of a ``ConvertReport``."""

    files: tuple[str, ...]
    """Names of the weight files."""
    bytes_written: int
    """Bytes of the weight files that this call wrote."""
    files_resumed: int
    """Number of files that an earlier call had finished."""
    was_complete: bool
    """Whether the destination was complete already, so that nothing was written."""
    verified: bool
    """Whether each file was read back and compared (`--verify`)."""
    gb_per_s: float
    """10^9 bytes written per second of the phase `write`."""
    seconds: float
    """Duration of the call."""
    phases: Mapping[str, float]
    """Seconds by phase: `plan`, `write`, `verify` and `finish`; together they are `seconds`."""
    peak_extra_bytes: int
    """Upper bound of the memory used."""
    adapted: tuple[str, ...]
    """Names of tensors that an adapter changed."""
    carried: tuple[str, ...]
    """Names of tensors that the model has no place for, written unchanged."""
    left_out: tuple[str, ...]
    """Names of source tensors that nothing uses."""
    unindexed: tuple[Place, ...]
    """Tensors that were not read because the index does not map them to that file."""
    kept_codes: tuple[str, ...]
    """Names of tensors that were written as codes, with their scales."""
    files_copied: tuple[str, ...]
    """Paths of the files next to the weights that were copied."""


def converted(report: ConvertReport, verified: bool) -> Converted:
    """Return the result of a conversion."""
    unindexed = tuple(Place(*place) for place in report.unindexed)
    return filled(Converted, report, verified=verified, unindexed=unindexed)


class DryRun(Result, frozen=True, tag_field="kind", tag="dry_run"):
    """The result of ``convert --dry-run``: what a conversion would do, if nothing keeps it from doing so."""

    rules: tuple[Rule, ...]
    """What each rule fills."""
    bytes_read: int
    """Source bytes that are read."""
    bytes_written: int
    """Bytes of all tensors that are written."""
    files: int
    """Number of files that are written."""
    needed_bytes: int
    """Bytes that the disk must have free."""
    free_bytes: int
    """Bytes that the disk has free."""
    unfinished: bool
    """Whether the destination holds unfinished work."""
    carried: tuple[str, ...]
    """Names of tensors that the model has no place for, written unchanged."""
    left_out: tuple[str, ...]
    """Names of source tensors that nothing uses."""
    kept_codes: tuple[str, ...]
    """Names of tensors that are written as codes, with their scales."""


def dry_run(conversion: Conversion, needed_bytes: int, free_bytes: int, unfinished: bool) -> DryRun:
    """Return what a conversion would do on a disk with so many free bytes."""
    plan = conversion.plan
    return DryRun(
        rules=rules_of_plan(plan),
        bytes_read=plan.bytes_read,
        bytes_written=plan.bytes_written,
        files=len(conversion.shards),
        needed_bytes=needed_bytes,
        free_bytes=free_bytes,
        unfinished=unfinished,
        carried=conversion.carried,
        left_out=conversion.left_out,
        kept_codes=conversion.kept_codes,
    )
