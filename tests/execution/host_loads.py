"""Loads to the host, with checks."""

from __future__ import annotations

from torch import Tensor

from automodel_conv.dtypes import torch_dtype
from automodel_conv.execution import host as cpu
from automodel_conv.execution.host import load_to_host
from automodel_conv.files.checkpoint import Checkpoint
from automodel_conv.planning.plan import CopyPlan
from automodel_conv.testing import Guarded, assert_bytes_equal, guarded


def outputs(plan: CopyPlan) -> dict[str, Guarded]:
    return {t.name: guarded(t.shape, torch_dtype(t.dtype)) for t in plan.targets}


def check_load(plan: CopyPlan, checkpoint: Checkpoint, expected: dict[str, Tensor], **options: int) -> cpu.LoadStats:
    guards = outputs(plan)
    stats = load_to_host(plan, checkpoint, {n: g.tensor for n, g in guards.items()}, **options)
    for name, guard in guards.items():
        guard.check()
        assert_bytes_equal(guard.tensor, expected[name])
    return stats
