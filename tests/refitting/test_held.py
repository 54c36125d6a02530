"""Tests of what a rank of a refit holds: the region of each tensor, and the plan that publishes them."""

from __future__ import annotations

import pytest
import torch
from torch.distributed.tensor import DTensor, Partial, Shard

from automodel_conv.errors import CoverageError, UnsupportedError
from automodel_conv.planning.regions import box, whole
from automodel_conv.refitting.held import held, own_experts, trained
from tests.distributed.meshes import rank_of_mesh
from tests.planning.parts import held as elements_of
from tests.planning.parts import numbered
from tests.refitting.support import module


@pytest.mark.parametrize(
    ("experts", "runs"),
    [
        (None, None),
        (range(8, 16), ((8, 8),)),
        ([0], ((0, 1),)),
        ([], ()),
        (range(1, 8, 3), ((1, 1), (4, 1), (7, 1))),
        ([5, 6, 0, 1, 9], ((5, 2), (0, 2), (9, 1))),
        ((3, 2, 1), ((3, 1), (2, 1), (1, 1))),
    ],
    ids=str,
)
def test_experts_are_runs_in_their_order(experts, runs):
    assert own_experts(experts) == runs


@pytest.mark.parametrize("experts", [[-1], ["0"], [0.5], [None], 3, [[1]]], ids=str)
def test_what_is_no_number_of_an_expert_is_refused(experts):
    with pytest.raises(UnsupportedError, match="experts= is not a list of experts"):
        own_experts(experts)


def test_plain_tensors_are_whole_and_shards_have_their_region():
    with rank_of_mesh(1, (2,)) as mesh:
        shard = DTensor.from_local(torch.ones(2, 3), mesh, [Shard(0)], run_check=False, shape=(5, 3), stride=(3, 1))
        found = held({"a": torch.zeros(4, 2), "b": shard}, None, 0)
        assert found.regions["a"] == whole((4, 2))
        assert found.regions["b"] == box((5, 3), (3, 0), (2, 3))
        table = found.table
        assert ([*table.names], [*table.dtypes], [*table.shapes]) == (["a", "b"], ["F32"] * 2, [(4, 2), (5, 3)])
        assert found.local("b").data_ptr() == shard.to_local().data_ptr()


def test_own_experts_are_rows_of_the_whole_tensor_in_their_order():
    tensors = {"layers.0.experts.down_proj": torch.zeros(3, 2, 2), "norm": torch.zeros(3)}
    found = held(tensors, [4, 5, 1], 6)
    region = found.regions["layers.0.experts.down_proj"]
    assert region.shape == (6, 2, 2)
    assert elements_of(region, numbered((6, 2, 2))) == [*range(16, 24), *range(4, 8)]
    assert found.regions["norm"] == whole((3,))
    assert found.table.shapes[0] == (6, 2, 2)


def test_biases_of_own_experts_are_divided_too():
    found = held({"experts.down_proj_bias": torch.zeros(2, 4), "experts.gate_up_proj": torch.zeros(2, 0, 4)}, [1, 3], 4)
    assert found.regions["experts.down_proj_bias"].shape == (4, 4)
    assert found.regions["experts.gate_up_proj"].shape == (4, 0, 4)


@pytest.mark.parametrize("shape", [(2, 2, 2), (4, 2, 2), ()], ids=str)
def test_another_number_of_experts_is_refused(shape):
    with pytest.raises(CoverageError, match="down_proj does not hold the experts that experts= names"):
        held({"experts.down_proj": torch.zeros(shape)}, range(3), 6)


def test_tensors_without_data_and_partial_sums_are_refused():
    with pytest.raises(UnsupportedError, match="a has no data"):
        held({"a": torch.zeros(2, device="meta")}, None, 0)
    with rank_of_mesh(0, (2,)) as mesh:
        partial = DTensor.from_local(torch.ones(2), mesh, [Partial()], run_check=False)
        with pytest.raises(UnsupportedError, match="partial sums"):
            held({"a": partial}, None, 0)


def test_values_of_plain_experts_are_sampled():
    def samples(values, name="experts.down_proj"):
        return held({name: values}, None, 0).samples()

    one, other = torch.zeros(4, 300, 300), torch.zeros(4, 300, 300)
    assert samples(one) == samples(other)
    other[0, 0, 5] = 1
    assert samples(one) != samples(other)
    assert samples(torch.zeros(4), "norm") == samples(torch.zeros(0, 2, 2)) == {}
    transposed = torch.arange(8.0).reshape(2, 2, 2)
    assert samples(transposed) == samples(transposed.transpose(1, 2).contiguous().transpose(1, 2))


def test_module_of_no_type_is_published_under_its_names():
    made = module({"a": torch.zeros(2, 3), "b.c": torch.zeros(4, dtype=torch.int64)})
    found = trained(made, [], None, None, 0)
    assert [target.name for target in found.plan.targets] == ["a", "b.c"]
    assert [target.dtype for target in found.plan.targets] == ["F32", "I64"]
    assert {*found.held.tensors} == {"a", "b.c"}


def test_tied_parameters_are_published_once():
    made = module({"a": torch.zeros(2, 3)})
    made.b = made.a
    assert [target.name for target in trained(made, [], None, None, 0).plan.targets] == ["a"]
