"""Tests of bytes from rank to rank in one process; ``refit_toys.py`` sends them between several."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from automodel_conv.distributed.point_to_point import exchange_bytes, start_batch, wait_for

CPU = torch.device("cpu")


@pytest.fixture
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_bytes_for_this_rank_come_back(group):
    assert exchange_bytes(group, {0: b"abc\x00"}, CPU, "a test") == {0: b"abc\x00"}


def test_empty_bytes_are_not_sent(group):
    assert exchange_bytes(group, {0: b""}, CPU, "a test") == {}
    assert exchange_bytes(group, {}, CPU, "a test") == {}


def test_batch_of_nothing_waits_for_nothing(group):
    assert start_batch(group, [], []) == []
    wait_for([])
