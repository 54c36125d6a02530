"""Choose the rank that reads each replicated part of a DTensor and sends it to the others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from automodel_conv.distributed.placements import is_distributed, is_first_replica, is_replicated
from automodel_conv.planning.plan import CopyPlan


def targets_to_read(plan: CopyPlan, state: Mapping[str, Tensor], broadcast: bool) -> tuple[CopyPlan, list[str]]:
    """Return the plan of the targets that this rank reads, and the names of targets that ranks send to each other."""
    if not broadcast:
        return plan, []
    names = [target.name for target in plan.targets if target.name in state]
    shared = [name for name in names if is_distributed(state[name]) and is_replicated(state[name])]
    received = {name for name in shared if not is_first_replica(state[name])}
    return replace(plan, targets=tuple(t for t in plan.targets if t.name not in received)), shared
