"""Tests of the source of weights beside a stand-in for vLLM; `make test-vllm` tests it with vLLM's own receivers."""

from __future__ import annotations

from functools import cached_property

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard

import automodel_conv as amc
from automodel_conv.distributed import ownership
from automodel_conv.errors import ConversionError, UnsupportedError
from automodel_conv.testing import address_valued, assert_bytes_equal
from tests.distributed.meshes import rank_of_mesh

E, I, H = 4, 2, 6  # noqa: E741


def source_of(_, module, **options):
    from automodel_conv.integrations.vllm import published_source

    return published_source(module, rules=rules(), **options)


def rules():
    return amc.get_checkpoint_conversion_mapping("qwen3_moe")


def model(wrap=lambda tensor: tensor):
    """Return two layers of experts between an embedding and a norm; ``wrap`` makes DTensors of their values."""
    layers = [nn.ModuleDict({"mlp": nn.ModuleDict({"experts": nn.Module()})}) for _ in range(2)]
    whole = nn.ModuleDict({"embed": nn.Module(), "norm": nn.Module(), "layers": nn.ModuleList(layers)})
    whole["embed"].register_parameter("weight", nn.Parameter(wrap(address_valued((8, H), torch.bfloat16))))
    whole["norm"].register_buffer("weight", address_valued((H,), torch.bfloat16))
    for number, layer in enumerate(layers):
        for name, shape in (("gate_up_proj", (E, 2 * I, H)), ("down_proj", (E, H, I))):
            values = address_valued(shape, torch.bfloat16, 1000 * number)
            layer["mlp"]["experts"].register_parameter(name, nn.Parameter(wrap(values)))
    return whole


@pytest.fixture
def on_ranks(monkeypatch):
    """Let the ranks of a fake group have the tensors of this one, and meshes of all ranks."""
    monkeypatch.setattr(ownership, "require_same_on_all", lambda *_: None)
    monkeypatch.setattr(ownership, "all_gather_bytes", lambda groups, data, what: [data])


def rows(mesh):
    """Return the model with all rows and all experts divided over a mesh."""

    def wrap(tensor):
        local = tensor.chunk(2)[mesh.get_coordinate()[0]].clone()
        return DTensor.from_local(local, mesh, [Shard(0)], run_check=False)

    return model(wrap)


def columns(mesh):
    """Return the model with the columns of its experts divided over the inner dimension of a mesh."""

    def wrap(tensor):
        if tensor.ndim < 3:
            return tensor
        local = tensor.chunk(2, 2)[mesh.get_coordinate()[1]].contiguous()
        return DTensor.from_local(local, mesh, [Replicate(), Shard(2)], run_check=False)

    return model(wrap)


def test_plain_tensors_belong_to_all_ranks(vllm):
    source = source_of(vllm, model())
    names = [meta.name for meta in source.metadata]
    assert len(names) == 2 + 2 * 3 * E
    assert all((meta.owners, meta.mesh_shape, meta.placements) == (None, None, None) for meta in source.metadata)
    assert source.owned_names(7) == names
    assert "layers.1.mlp.experts.3.up_proj.weight" in names


def test_both_passes_yield_what_metadata_declares(vllm):
    module = model()
    source = source_of(vllm, module)
    wanted = dict(amc.published_tensors(module, rules=rules()))
    for pairs in (source.iter_full(), source.iter_local()):
        for meta, (name, tensor) in zip(source.metadata, pairs, strict=True):
            assert (meta.name, meta.dtype, meta.shape) == (name, tensor.dtype, tuple(tensor.shape))
            assert_bytes_equal(tensor, wanted[name])
            assert tensor.data_ptr() == wanted[name].data_ptr()


def test_names_are_in_the_order_of_layers(vllm, tmp_path):
    module = nn.ModuleDict({"layers": nn.ModuleList(nn.Linear(2, 2) for _ in range(12))})
    save_file(module.state_dict(), tmp_path / "model.safetensors")  # 0, 1, 10, 11, 2, ...
    assert "layers.10.bias" in [name for name, _ in amc.published_tensors(module, reference=tmp_path)][:6]
    names = [meta.name for meta in source_of(vllm, module, reference=tmp_path).metadata]
    assert [int(name.split(".")[1]) for name in names] == [layer for layer in range(12) for _ in range(2)]


def test_metadata_are_computed_once(vllm):
    source = source_of(vllm, model())
    assert source.metadata is source.metadata
    assert isinstance(type(source).metadata, cached_property)


def test_each_pass_reads_the_values_of_its_time(vllm):
    module = model()
    source = source_of(vllm, module)
    first = [tensor.clone() for _, tensor in source.iter_full()]
    with torch.no_grad():
        module["embed"].weight.mul_(2)
    assert_bytes_equal(dict(source.iter_full())["embed.weight"], module["embed"].weight)
    assert len(first) == len(source.metadata)
    module["embed"].weight = nn.Parameter(module["embed"].weight.float())
    text = r"expected:\n +embed\.weight: torch\.bfloat16 \[8, 6\]\n +found:\n +embed\.weight: torch\.float32"
    for pairs in (source.iter_full(), source.iter_local()):
        with pytest.raises(ConversionError, match=text):
            next(pairs)


def test_transposed_experts_are_views_in_a_whole_pass_and_contiguous_in_a_local_one(vllm):
    experts = nn.Module()
    experts.gate_and_up_projs = nn.Parameter(address_valued((E, H, 2 * I), torch.bfloat16))
    experts.down_projs = nn.Parameter(address_valued((E, I, H), torch.bfloat16, 500))
    module = nn.ModuleDict({"mlp": nn.ModuleDict({"experts": experts})})
    source = source_of(vllm, module, layout="nemo")
    whole, local = dict(source.iter_full()), dict(source.iter_local())
    for name, view in whole.items():
        assert not view.is_contiguous()
        assert local[name].is_contiguous()
        assert_bytes_equal(local[name], view)


@pytest.mark.parametrize("rank", range(2))
@pytest.mark.usefixtures("on_ranks")
def test_experts_belong_to_their_holders(vllm, rank):
    with rank_of_mesh(rank, (2,)) as mesh:
        source = source_of(vllm, rows(mesh), owners="holders")
        by_name = {meta.name: meta for meta in source.metadata}
        for expert in range(E):
            meta = by_name[f"layers.0.mlp.experts.{expert}.down_proj.weight"]
            assert (meta.owners, meta.mesh_shape, meta.placements) == ((expert // 2,), (1,), None)
        embed = by_name["embed.weight"]
        assert (embed.owners, embed.mesh_shape, len(embed.placements)) == ((0, 1), (2,), 1)
        wanted = dict(amc.published_tensors(model(), rules=rules()))
        local = dict(source.iter_local())
        assert list(local) == source.owned_names(rank)
        for name, tensor in local.items():
            assert_bytes_equal(tensor, wanted[name].chunk(2)[rank] if name == "embed.weight" else wanted[name])


@pytest.mark.parametrize("rank", range(4))
@pytest.mark.usefixtures("on_ranks")
def test_columns_of_experts_are_shards(vllm, rank):
    from vllm.distributed.weight_transfer import base

    with rank_of_mesh(rank, (2, 2)) as mesh:
        source = source_of(vllm, columns(mesh))
        for meta in source.metadata:
            if "experts" in meta.name:
                assert (meta.owners, meta.mesh_shape) == ((0, 1, 2, 3), (2, 2))
                assert meta.placements == (base.Replicate(), base.Shard(1))
        wanted = dict(amc.published_tensors(model(), rules=rules()))
        for name, tensor in source.iter_local():
            whole = wanted[name]
            assert_bytes_equal(tensor, whole.chunk(2, 1)[rank % 2].contiguous() if "experts" in name else whole)


@pytest.mark.usefixtures("on_ranks")
def test_local_pass_names_what_placements_cannot_state(vllm):
    with rank_of_mesh(0, (2,)) as mesh:
        source = source_of(vllm, rows(mesh))
        assert all(meta.owners in (None, (0, 1)) for meta in source.metadata)
        with pytest.raises(UnsupportedError, match=r"experts\.0\.gate_proj(.|\n)*24 such(.|\n)*owners=\"holders\""):
            source.iter_local()


def test_unknown_owners_are_refused(vllm):
    with pytest.raises(UnsupportedError, match="unknown owners='all'"):
        source_of(vllm, model(), owners="all")
