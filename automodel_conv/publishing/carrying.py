"""Tensors that a save copies from the model's source checkpoint because the model has no place for them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from torch import nn

from automodel_conv.compiling.carrying import carried_targets, unclaimed_rows
from automodel_conv.compiling.decoded import decoded_table
from automodel_conv.execution.file_slabs import FileSlabs
from automodel_conv.execution.writing import ScratchSplit
from automodel_conv.files.checkpoint import Checkpoint
from automodel_conv.planning.code_names import has_codes
from automodel_conv.planning.copies import SourceTable, Target
from automodel_conv.planning.plan import CopyPlan
from automodel_conv.planning.wanted import TargetSpec


class Carried(NamedTuple):
    """Tensors of a checkpoint that are copied to new files."""

    checkpoint: Checkpoint
    """The checkpoint that the tensors are read from."""
    table: SourceTable
    """The sources of the checkpoint."""
    targets: tuple[Target, ...]
    """The tensors as they will be written."""

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the tensors as they will be written."""
        return tuple(target.name for target in self.targets)

    @property
    def left_out(self) -> tuple[str, ...]:
        """Names of tensors that decoding makes unnecessary, and of tensors that the index does not name."""
        parts = {part for decode in self.table.decodes.values() for part in decode.parts}
        return self.checkpoint.left_out(sorted(self.table.hidden - parts))

    def slabs(self, places: Sequence[tuple[int, int]], share: ScratchSplit) -> FileSlabs:
        """Return the slabs that write the tensors; for ``places`` see ``slab_schedule``."""
        return FileSlabs(self.checkpoint, self.targets, places, self.table.decodes, share)


def carried_from(
    source: Checkpoint,
    plan: CopyPlan,
    model: nn.Module | None,
    rules: Iterable[Any] | None,
    layout: str | None,
    dtype: str | None,
) -> Carried:
    """Return the tensors of a checkpoint that no rule consumes, to be written in addition to the targets of a plan.

    Args:
        source: checkpoint that the model was loaded from.
        plan: plan that saves the tensors in memory.
        model, rules, layout: see ``saving_plan``.
        dtype: dtype code of decoded tensors; None: bfloat16, or the dtype that the scales determine.

    Raises:
        NameProblems: a carried tensor has the name of a target of ``plan``.
        QuantizationError, UnsupportedError: the checkpoint is malformed, or cannot be decoded.
    """
    saved = plan.sources
    table = SourceTable.from_checkpoint(source) if has_codes(saved) else decoded_table(source, needs_values=False)
    specs = {n: TargetSpec(d, s) for n, d, s in zip(saved.names, saved.dtypes, saved.shapes, strict=True)}
    table, rows = unclaimed_rows(source, table, model, rules, layout, specs)
    return Carried(source, table, tuple(carried_targets(table, rows, dtype, plan.targets)))
