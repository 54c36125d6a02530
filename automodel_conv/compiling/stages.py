"""Compose the stages of a conversion, each of them a plan, and remove casts from a plan."""

from __future__ import annotations

from collections.abc import Sequence

from automodel_conv.planning.arrangement import PLAIN
from automodel_conv.planning.copies import SourceTable
from automodel_conv.planning.plan import CopyPlan
from automodel_conv.planning.quantization import arranged_plan


def arranging_stages(table: SourceTable) -> list[CopyPlan]:
    """Return the stage that views quantized sources as their weights; an empty list if all are stored as weights."""
    return [arranged_plan(table)] if any(decode.arrangement != PLAIN for decode in table.decodes.values()) else []


def composed(stages: Sequence[CopyPlan]) -> CopyPlan:
    """Return the plan that goes from the sources of the first stage to the targets of the last in one copy."""
    whole = stages[0]
    for stage in stages[1:]:
        whole = whole.then(stage)
    return whole


def without_casts(plan: CopyPlan) -> CopyPlan:
    """Return the plan without casts, except in targets whose sources differ in dtype or that transformers computes."""
    targets = []
    for target in plan.targets:
        dtypes = {plan.sources.dtypes[row] for row in target.sources}
        can_keep_dtype = target.fallback is None and len(dtypes) == 1
        targets.append(target._replace(dtype=dtypes.pop()) if can_keep_dtype else target)
    return CopyPlan(plan.sources, tuple(targets), plan.rules)
