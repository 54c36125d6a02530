"""Ranks that read their parts of experts, without processes."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import Shard

import automodel_conv as amc
from automodel_conv.execution.buffers import allocate
from automodel_conv.execution.host import load_to_host
from automodel_conv.planning.sharding import placed
from automodel_conv.testing import POISON, assert_bytes_equal


def assert_ranks_read_their_parts(directory: Path, whole: Mapping[str, Tensor], **options: Any) -> None:
    """Check the parts of four ranks: two halves of the experts, each divided along the next dimension."""
    checkpoint = amc.open_checkpoint(directory)
    plan = amc.compile_plan(checkpoint, **options)
    experts = [target for target in plan.targets if ".experts." in target.name and len(target.shape) == 3]
    assert experts
    for coordinate in itertools.product(range(2), range(2)):
        regions = {t.name: placed(t.shape, (2, 2), coordinate, (Shard(0), Shard(1))) for t in experts}
        mine = plan.shard(regions)
        buffers = allocate(mine.targets)
        for name in regions:
            buffers[name].view(torch.uint8).fill_(POISON)
        load_to_host(mine, checkpoint, buffers, threads=1)
        for target in experts:
            first, second = ([slice(at, at + n) for at, n in runs] for runs in regions[target.name].runs[:2])
            part = torch.cat([torch.cat([whole[target.name][f, s] for s in second], 1) for f in first])
            assert_bytes_equal(buffers[target.name], part)
