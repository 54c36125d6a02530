"""Compose the stages of a conversion, each of which is a plan, and remove casts from a plan."""

from __future__ import annotations

from collections.abc import Sequence

from automodel_conv.planning.copies import SourceTable
from automodel_conv.planning.plan import CopyPlan
from automodel_conv.planning.quantization import untransposed_plan


def untranspose_stages(table: SourceTable) -> list[CopyPlan]:
    """The stage that is needed where quantized sources are stored transposed."""
    return [untransposed_plan(table)] if any(decode.stored_transposed for decode in table.decodes.values()) else []


def composed(stages: Sequence[CopyPlan]) -> CopyPlan:
    """The plan from the sources of the first stage straight to the targets of the last."""
    whole = stages[0]
    for stage in stages[1:]:
        whole = whole.then(stage)
    return whole


def without_casts(plan: CopyPlan) -> CopyPlan:
    """The plan without casts, but where the sources of one target differ, or upstream's own code makes it."""
    targets = []
    for target in plan.targets:
        dtypes = {plan.sources.dtypes[row] for row in target.sources}
        casts = target.fallback is None and len(dtypes) == 1
        targets.append(target._replace(dtype=dtypes.pop()) if casts else target)
    return CopyPlan(plan.sources, tuple(targets), plan.rules)
