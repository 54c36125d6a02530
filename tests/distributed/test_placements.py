"""Tests of DTensors and their meshes, as one rank of several sees them."""

import pytest
import torch
from torch.distributed.tensor import DTensor, Replicate, Shard

from automodel_conv.distributed.placements import (
    all_as_distributed,
    as_distributed,
    is_distributed,
    is_first_replica,
    is_replicated,
    local_of,
    meshes_of,
)
from tests.distributed.meshes import rank_of_mesh


def sharded(mesh, *placements, local=(2, 3)):
    return DTensor.from_local(torch.ones(local), mesh, placements, run_check=False)


def test_a_plain_tensor_has_no_mesh_and_is_its_own_local_part():
    tensor = torch.ones(2)
    assert not is_distributed(tensor)
    assert local_of(tensor) is tensor
    assert meshes_of([tensor]) == []


def test_the_local_part_is_in_the_same_memory():
    with rank_of_mesh(1, (4,)) as mesh:
        tensor = sharded(mesh, Shard(0))
        assert is_distributed(tensor)
        assert tensor.shape == (8, 3)
        assert local_of(tensor).shape == (2, 3)
        assert local_of(tensor).data_ptr() == tensor._local_tensor.data_ptr()


def test_each_mesh_comes_once_in_the_order_of_its_first_tensor():
    with rank_of_mesh(0, (2, 2), "dp", "tp") as mesh:
        one, two = mesh["tp"], mesh["dp"]
        tensors = [torch.ones(1), sharded(one, Shard(0)), sharded(two, Shard(0)), sharded(one, Replicate())]
        assert meshes_of(tensors) == [one, two]


@pytest.mark.parametrize(
    ("placements", "first"),
    [
        ((Replicate(), Replicate()), {0}),
        ((Replicate(), Shard(0)), {0, 1}),
        ((Shard(0), Replicate()), {0, 2}),
        ((Shard(0), Shard(1)), {0, 1, 2, 3}),
    ],
    ids=str,
)
def test_the_first_replica_is_at_the_start_of_every_replicated_dimension(placements, first):
    found = set()
    for rank in range(4):
        with rank_of_mesh(rank, (2, 2)) as mesh:
            tensor = sharded(mesh, *placements)
            if is_first_replica(tensor):
                found.add(rank)
            assert is_replicated(tensor) == (len(first) < 4)
    assert found == first


def test_a_mesh_of_one_rank_replicates_nothing():
    with rank_of_mesh(0, (1,)) as mesh:
        tensor = sharded(mesh, Replicate())
        assert not is_replicated(tensor)
        assert is_first_replica(tensor)


def test_a_rank_outside_of_the_mesh_is_no_replica():
    from torch.distributed.device_mesh import DeviceMesh

    with rank_of_mesh(3, (4,)):
        inner = DeviceMesh("cpu", [0, 1])
        assert not is_first_replica(sharded(inner, Replicate()))


def test_a_local_tensor_becomes_a_dtensor_with_the_whole_shape_even_if_shards_are_uneven():
    with rank_of_mesh(1, (2,)) as mesh:
        like = DTensor.from_local(torch.zeros(2, 3), mesh, [Shard(0)], run_check=False, shape=(5, 3), stride=(3, 1))
        local = torch.arange(6.0).reshape(2, 3)
        made = as_distributed(local, like)
        assert (made.shape, made.placements, made.device_mesh) == ((5, 3), (Shard(0),), mesh)
        assert local_of(made).data_ptr() == local.data_ptr()


def test_names_that_share_a_tensor_still_share_it():
    with rank_of_mesh(0, (2,)) as mesh:
        state = {"a": sharded(mesh, Shard(0)), "b": sharded(mesh, Shard(0)), "plain": torch.ones(1)}
        one, plain = torch.zeros(2, 3), torch.zeros(1)
        made = all_as_distributed({"a": one, "b": one, "plain": plain, "new": plain}, state)
        assert made["a"] is made["b"]
        assert is_distributed(made["a"])
        assert made["plain"] is made["new"] is plain
