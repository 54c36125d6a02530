"""Tests of gathered tensors as one rank sees them; ``test_ownership`` gathers with real processes."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from torch.distributed.tensor import DTensor, Replicate, Shard

from automodel_conv.distributed.gathering import WholeTensors, is_member
from automodel_conv.testing import assert_bytes_equal
from tests.distributed.meshes import rank_of_mesh


def test_plain_tensor_is_its_own_whole():
    tensor = torch.nn.Parameter(torch.ones(2, 3))
    assert is_member(tensor)
    whole = WholeTensors([tensor]).gather(0)
    assert whole.data_ptr() == tensor.data_ptr()
    assert not whole.requires_grad


def test_replicated_tensor_is_its_own_whole():
    with rank_of_mesh(1, (2, 2)) as mesh:
        tensor = DTensor.from_local(torch.ones(2, 3), mesh, [Replicate(), Replicate()], run_check=False)
        with mock.patch.object(DTensor, "full_tensor", side_effect=AssertionError):
            whole = WholeTensors([tensor]).gather(0)
        assert type(whole) is torch.Tensor
        assert whole.data_ptr() == tensor.to_local().data_ptr()


def test_sharded_tensor_is_gathered_once_until_it_is_released():
    with rank_of_mesh(1, (2,)) as mesh:
        tensors = [torch.zeros(1), DTensor.from_local(torch.ones(2, 3), mesh, [Shard(0)], run_check=False)]
        whole = WholeTensors(tensors)
        with mock.patch.object(DTensor, "full_tensor", side_effect=lambda: torch.ones(4, 3)) as gather:
            first = whole.gather(1)
            assert whole.gather(1) is first
            assert gather.call_count == 1
            whole.release([0])
            assert whole.gather(1) is first
            whole.release([0, 1])
            assert_bytes_equal(whole.gather(1), torch.ones(4, 3))
            assert gather.call_count == 2


def test_nothing_is_gathered_over_no_dimension():
    with rank_of_mesh(1, (2,)) as mesh:
        tensor = DTensor.from_local(torch.ones(2, 3), mesh, [Shard(0)], run_check=False)
        with mock.patch.object(DTensor, "redistribute", side_effect=AssertionError):
            local = WholeTensors([tensor]).gather(0, ())
        assert local.data_ptr() == tensor.to_local().data_ptr()


def test_tensor_is_gathered_over_one_dimension_and_over_all():
    with rank_of_mesh(1, (2, 2)) as mesh:
        tensor = DTensor.from_local(torch.ones(2, 3), mesh, [Shard(0), Shard(1)], run_check=False)
        whole = WholeTensors([tensor])
        assert whole.gather(0, (1,)).shape == (2, 6)
        assert whole.gather(0, (1,)) is whole.gather(0, (1,))
        assert whole.gather(0).shape == (4, 6)
        whole.release([0])
        assert whole.gather(0, (0,)).shape == (4, 3)


@pytest.mark.parametrize("ranks", [(0, 1), (2, 3)])
def test_only_ranks_of_the_mesh_are_members(ranks):
    with rank_of_mesh(1, (4,)):
        mesh = torch.distributed.device_mesh.DeviceMesh("cpu", torch.tensor(ranks))
        tensor = DTensor.from_local(torch.ones(2, 3), mesh, [Shard(0)], run_check=False)
        assert is_member(tensor) == (1 in ranks)


class Stream:
    """A stream of a GPU that records what it is told."""

    def __init__(self, log, name):
        self.log, self.name = log, name

    def record_event(self):
        self.log.append(f"{self.name} records")
        return f"event of {self.name}"

    def wait_event(self, event):
        self.log.append(f"{self.name} waits for {event}")


def test_each_stream_waits_until_a_tensor_is_gathered(monkeypatch):
    """vLLM's packed broadcast takes the tensors of one gathered tensor on one stream after the other."""
    log, current = [], []

    class OnGpu(torch.Tensor):
        is_cuda = True

        def record_stream(self, stream):
            log.append(f"memory is used by {stream.name}")

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: current[-1])
    with rank_of_mesh(1, (2,)) as mesh:
        tensor = DTensor.from_local(torch.ones(2, 3), mesh, [Shard(0)], run_check=False)
        whole = WholeTensors([tensor])
        with mock.patch.object(DTensor, "full_tensor", return_value=torch.ones(4, 3).as_subclass(OnGpu)):
            for name in ("first", "second"):
                current.append(Stream(log, name))
                whole.gather(0)
    assert log == [
        "first records",
        "first waits for event of first",
        "memory is used by first",
        "second waits for event of first",
        "memory is used by second",
    ]
