"""The front door that tells whether a conversion went well."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from automodel_conv.compiling.carrying import dropped_rows
from automodel_conv.compiling.marks import stated_layout
from automodel_conv.doors import door
from automodel_conv.errors import (
    VerificationError,
    listing,
    message,
)
from automodel_conv.execution.comparing import compare_file
from automodel_conv.execution.file_slabs import FileSlabs
from automodel_conv.execution.writing import (
    split_scratch,
)
from automodel_conv.files.checkpoint import Checkpoint, open_downloaded, rows_by_file
from automodel_conv.files.shards import Shard, Spec
from automodel_conv.planning.plan import CopyPlan
from automodel_conv.progress import bytes_progress
from automodel_conv.publishing.conversion import DEFAULT_SCRATCH_BYTES, compile_conversion


@door("verifying")
def verify_checkpoint(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    rules: Iterable[Any] | None = None,
    layout: str | None = None,
    source_layout: str | None = None,
    dtype: torch.dtype | None = None,
    dequantize: bool = False,
    drop: str | Iterable[str] = (),
    threads: int | None = None,
    scratch_bytes: int | None = None,
    progress: bool = False,
) -> int:
    """Check that a checkpoint is, bit for bit, what ``convert_checkpoint`` would make of another one.

    Without ``layout``, the layout that the files of the destination name is taken; without rules and any layout, two
    checkpoints with the same names, but for those to be dropped, are compared as they are.

    Args:
        source, destination: the two checkpoints; which files their tensors lie in does not matter.
        rules, layout, source_layout, dtype, dequantize, drop, threads, scratch_bytes, progress: see
            ``convert_checkpoint``.

    Returns:
        The bytes that were compared: all of the destination's tensors.

    Raises:
        VerificationError: they differ; names the tensors, or the first element that does.
        CheckpointError, NameProblems, UnsupportedError, ReadError: see ``convert_checkpoint``.
    """
    drop = [drop] if isinstance(drop, str) else list(drop)
    checkpoint, other = open_downloaded(source), open_downloaded(destination)
    if layout is None and rules is None:
        said = stated_layout(other, None)
        keeps_all = source_layout is None and dtype is None
        as_they_are = keeps_all and _is_alike(checkpoint, other, said, drop)
        layout, rules = (None, []) if as_they_are else (said, None)
    conversion = compile_conversion(
        checkpoint,
        rules=rules,
        layout=layout,
        source_layout=source_layout,
        dtype=dtype,
        dequantize=dequantize,
        drop=drop,
    )
    plan = conversion.plan
    _compare_headers(plan, other)
    share = split_scratch(threads, DEFAULT_SCRATCH_BYTES if scratch_bytes is None else scratch_bytes, reads_files=True)
    at = [other.position[target.name] for target in plan.targets]
    places = [(other.file_ids[row], other.offsets[row]) for row in at]
    made = FileSlabs(checkpoint, plan.targets, places, plan.sources.decodes, share)
    with bytes_progress(plan.bytes_written, "verifying", progress) as advance:
        rows = rows_by_file(other)
        for file in made.by_file:
            with made.opened(file) as slabs:
                compare_file(slabs, other.sources[file], _file_of(other, file, rows[file]), share.threads, advance)
    return plan.bytes_written


def _is_alike(source: Checkpoint, other: Checkpoint, said: str | None, drop: Iterable[str]) -> bool:
    """Whether two checkpoints have the same names but for those to be dropped, and say the same of their experts."""
    dropped = dropped_rows(source.names, drop)
    kept = {name for row, name in enumerate(source.names) if row not in dropped}
    return said in (None, stated_layout(source, None)) and kept == set(other.names)


def _compare_headers(plan: CopyPlan, other: Checkpoint) -> None:
    wanted = {target.name: f"{target.dtype} {list(target.shape)}" for target in plan.targets}
    rows = zip(other.names, other.dtypes, other.shapes, strict=True)
    found = {name: f"{dtype} {list(shape)}" for name, dtype, shape in rows}
    lines = [f"{name}: missing" for name in wanted if name not in found]
    lines += [f"{name}: not in the source" for name in found if name not in wanted]
    both = wanted.keys() & found.keys()
    lines += [f"{n}: {found[n]} instead of {wanted[n]}" for n in wanted if n in both and found[n] != wanted[n]]
    if lines:
        raise VerificationError(
            message(
                f"{len(lines)} tensors differ in name, dtype or shape",
                where=other.path,
                found="\n" + listing(lines),
                do="check which layouts the two checkpoints are in",
            )
        )


def _file_of(checkpoint: Checkpoint, file: int, rows: Sequence[int]) -> Shard:
    specs = [Spec(checkpoint.names[row], checkpoint.dtypes[row], checkpoint.shapes[row]) for row in rows]
    return Shard(checkpoint.files[file], b"", tuple(specs), tuple(checkpoint.offsets[row] for row in rows))
