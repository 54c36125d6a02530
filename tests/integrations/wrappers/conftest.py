"""Fixtures: a process group of one rank, and a model to wrap."""

from __future__ import annotations

import pytest
import torch.distributed as dist


@pytest.fixture(scope="module", autouse=True)
def one_rank(tmp_path_factory):
    store = dist.FileStore(str(tmp_path_factory.mktemp("store") / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory):
    from tests.integrations.wrappers.support import Published  # needs transformers

    return Published("mixtral", tmp_path_factory.mktemp("mixtral"))
