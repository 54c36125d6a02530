"""Tests of passes over published tensors: each needs its sources only while its targets are due."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor, Shard
from torch.multiprocessing.reductions import StorageWeakRef

from automodel_conv.planning.sharding import placed
from automodel_conv.planning.views import held_part
from automodel_conv.publishing.named_tensors import Gather, named_tensors
from automodel_conv.testing import assert_bytes_equal
from tests.distributed.meshes import rank_of_mesh

E, I, H = 4, 2, 3  # noqa: E741


def sharded(mesh):
    """Return a model of two layers of experts, divided by experts."""
    model = nn.ModuleList(nn.ModuleDict({"mlp": nn.ModuleDict({"experts": nn.Module()})}) for _ in range(2))
    for layer in model:
        for name, shape in (("gate_up_proj", (E // 2, 2 * I, H)), ("down_proj", (E // 2, H, I))):
            local = DTensor.from_local(torch.rand(shape), mesh, [Shard(0)], run_check=False)
            layer["mlp"]["experts"].register_parameter(name, nn.Parameter(local))
    return model


@pytest.fixture
def rules():
    conversion = pytest.importorskip("transformers.conversion_mapping", reason="has the rules")
    return conversion.get_checkpoint_conversion_mapping("qwen3_moe")


def test_one_gathered_tensor_is_kept_at_a_time(rules):
    gathered: list[StorageWeakRef] = []
    most = 0

    def full_tensor(tensor):
        nonlocal most
        whole = torch.ones(tensor.shape)
        gathered.append(StorageWeakRef(whole.untyped_storage()))
        most = max(most, kept())
        return whole

    def kept():
        return sum(not storage.expired() for storage in gathered)

    with rank_of_mesh(0, (2,)) as mesh, mock.patch.object(DTensor, "full_tensor", full_tensor):
        named = named_tensors(sharded(mesh), rules=rules)
        for _, tensor in named.whole(named.plan.targets):
            assert kept() == 1
            del tensor
    assert len(gathered) == 4  # each is gathered once
    assert (most, kept()) == (1, 0)


def test_held_targets_are_not_gathered(rules):
    with rank_of_mesh(1, (2,)) as mesh:
        model = sharded(mesh)
        named = named_tensors(model, rules=rules)
        down = [target for target in named.plan.targets if target.name.endswith("down_proj.weight")]
        region = placed((E, H, I), (2,), (1,), [Shard(0)])
        parts = {target.name: held_part(target.shape, target.copies, region) for target in down}
        own = [target for target in down if parts[target.name].shape == target.shape]
        with mock.patch.object(DTensor, "full_tensor", side_effect=AssertionError):
            tensors = dict(named.whole(own, {target.name: Gather((), parts[target.name]) for target in own}))
        assert [name for name in tensors if name.startswith("0.")] == [
            "0.mlp.experts.2.down_proj.weight",
            "0.mlp.experts.3.down_proj.weight",
        ]
        local = model[0]["mlp"]["experts"].down_proj.to_local()
        assert_bytes_equal(tensors["0.mlp.experts.3.down_proj.weight"], local[1].detach(), strides=True)
