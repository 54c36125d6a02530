"""Tensors that a save copies from the model's source checkpoint because the model has no place for them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from torch import nn

from automodel_conv.compiling.carrying import carried_targets, unclaimed_rows
from automodel_conv.compiling.decoded import decoded_table
from automodel_conv.execution.file_slabs import FileSlabs
from automodel_conv.execution.writing import Budget
from automodel_conv.files.checkpoint import Checkpoint
from automodel_conv.planning.code_names import has_codes
from automodel_conv.planning.copies import SourceTable, Target
from automodel_conv.planning.plan import CopyPlan
from automodel_conv.planning.wanted import TargetSpec


class Carried(NamedTuple):
    """Tensors of a checkpoint that go to new files; ``table`` is what it offers."""

    checkpoint: Checkpoint
    table: SourceTable
    targets: tuple[Target, ...]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(target.name for target in self.targets)

    @property
    def left_out(self) -> tuple[str, ...]:
        """Tensors that only a quantized model needs, where codes are decoded, and those that no index names."""
        parts = {part for decode in self.table.decodes.values() for part in decode.parts}
        return self.checkpoint.left_out(sorted(self.table.hidden - parts))

    def slabs(self, places: Sequence[tuple[int, int]], share: Budget) -> FileSlabs:
        """The slabs that write them; for ``places`` see ``slab_schedule``."""
        return FileSlabs(self.checkpoint, self.targets, places, self.table.decodes, share)


def carried_from(
    source: Checkpoint,
    plan: CopyPlan,
    model: nn.Module | None,
    rules: Iterable[Any] | None,
    layout: str | None,
    dtype: str | None,
) -> Carried:
    """The tensors of a checkpoint that no rule takes, to be written beside what ``plan`` makes of tensors in memory.

    Args:
        model, rules, layout: see ``saving_plan``.
        dtype: of what is decoded; None: bfloat16, or as the scales say.

    Raises:
        NameProblems: a tensor to be carried has the name of one that ``plan`` makes.
        QuantizationError, UnsupportedError: the checkpoint is broken, or cannot be decoded.
    """
    saved = plan.sources
    table = SourceTable.of(source) if has_codes(saved) else decoded_table(source, needs_values=False)
    has = {n: TargetSpec(d, s) for n, d, s in zip(saved.names, saved.dtypes, saved.shapes, strict=True)}
    table, rows = unclaimed_rows(source, table, model, rules, layout, has)
    return Carried(source, table, tuple(carried_targets(table, rows, dtype, plan.targets)))
