"""Ranks that read their parts of weights, without processes."""

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
    """Check the parts of four ranks: two halves of each weight or stack, divided further along the next dimension."""
    checkpoint = amc.open_checkpoint(directory)
    plan = amc.compile_plan(checkpoint, **options)
    weights = [target for target in plan.targets if len(target.shape) in (2, 3)]
    assert any(".experts." in target.name for target in weights)
    for coordinate in itertools.product(range(2), range(2)):
        regions = {t.name: placed(t.shape, (2, 2), coordinate, (Shard(0), Shard(1))) for t in weights}
        mine = plan.shard(regions)
        buffers = allocate(mine.targets)
        for name in regions:
            buffers[name].view(torch.uint8).fill_(POISON)
        load_to_host(mine, checkpoint, buffers, threads=1)
        for target in weights:
            part = whole[target.name]
            for dim, runs in enumerate(regions[target.name].runs):
                index = [at for start, length in runs for at in range(start, start + length)]
                part = part.index_select(dim, torch.tensor(index, dtype=torch.int64))
            assert_bytes_equal(buffers[target.name], part)
