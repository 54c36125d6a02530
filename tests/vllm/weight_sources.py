"""Suite: ranks of a sharded trainer drive the trainer's side of vLLM's weight transfer, without its transports.

What runs is vLLM's own code on a CPU: the checks of NCCL broadcast, the plan of M2N, and the ownership and the groups
of sharded RDT. Tensors that would be sent are compared with those of a save.
"""
# pyright: reportMissingImports=false

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("VLLM_TARGET_DEVICE", "cpu")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "CRITICAL")

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from vllm.distributed.weight_transfer.base import ModuleSource, layerwise_groups
from vllm.distributed.weight_transfer.m2n_common import MAX_TENSOR_DIMS, expected_local_shape, source_plan_digest
from vllm.distributed.weight_transfer.m2n_trainer import M2NTrainerWeightTransferEngine
from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerWeightTransferEngine

import automodel_conv as amc
from automodel_conv.errors import UnsupportedError
from automodel_conv.integrations.vllm import published_source
from automodel_conv.planning.divisions import Division, chunk
from automodel_conv.testing import assert_bytes_equal
from tests.distributed.models import Meshes, Published, local, published, read_all, rope_types, sharded
from tests.distributed.starting import send

TYPES = ["qwen3_moe", "deepseek_v3", "gpt_oss", *rope_types()]
KINDS = {2: ["none", "fsdp", "inner"], 4: ["hsdp", "fsdp over tensor", "experts x fsdp"]}


def prepare(directory: Path, world: int) -> dict[str, Published]:
    return {name: published(name, directory) for name in TYPES}


def rank(common: dict[str, Published], variant: str, directory: Path) -> None:
    meshes = Meshes()
    for name in TYPES:
        source = common[name]
        model = sharded(source, variant, meshes)
        amc.load_model(model, source.path)
        wanted = read_all(source.saved)
        try:
            sends_whole_tensors(model, wanted)
            gathers, accepted = sends_parts(model, wanted)
            of_module = gathers_of_module_source(model)
            without_gather = groups_by_layer(model, wanted)
        except Exception as error:
            raise AssertionError(name) from error
        send([name, gathers, of_module, accepted, without_gather])


class Sender:
    """A communicator that keeps what is sent, as NCCL would: the elements from ``data_ptr`` on."""

    def __init__(self) -> None:
        self.sent: list[Tensor] = []

    def broadcast(self, tensor: Tensor, src: int, stream: Any) -> None:
        assert tensor.is_contiguous()
        self.sent.append(tensor.detach().clone())


def sends_whole_tensors(model: nn.Module, wanted: dict[str, Tensor]) -> None:
    """Run the broadcast of NCCL twice, with other weights; rank 0 sends all tensors, and others gather."""
    source = published_source(model)
    is_sender = dist.get_rank() == 0
    engine = NCCLTrainerWeightTransferEngine(client=mock.Mock(), source=source, is_sender=is_sender, packed=False)
    assert all(meta.owners is None or meta.owners[0] == 0 for meta in source.metadata)
    for factor in (1, -2):
        scale(model, factor)
        engine.model_update_group = Sender()
        with mock.patch.object(torch.cuda, "current_stream"):
            engine._broadcast(source, source.metadata)
        if is_sender:
            sent = engine.model_update_group.sent
            assert {meta.name for meta in source.metadata} == wanted.keys()
            for meta, tensor in zip(source.metadata, sent, strict=True):
                assert_bytes_equal(tensor, scaled(wanted[meta.name], factor))
    scale(model, -0.5)


def scale(model: nn.Module, factor: float) -> None:
    parts = {local(tensor).data_ptr(): local(tensor) for tensor in model.state_dict().values()}  # tied ones once
    for part in parts.values():
        if part.is_floating_point():
            part.mul_(factor)


def scaled(tensor: Tensor, factor: float) -> Tensor:
    return tensor * factor if tensor.is_floating_point() else tensor


def sends_parts(model: nn.Module, wanted: dict[str, Tensor]) -> tuple[int, bool]:
    """Check the parts of this rank; return how many tensors are gathered for them, and whether M2N accepts them."""
    accepted = False
    with counted_gathers() as gathers:
        for owners in ("mesh", "holders"):
            source = published_source(model, owners=owners)
            try:
                pairs = source.iter_local()
            except UnsupportedError:
                continue
            metas = {meta.name: meta for meta in source.metadata}
            names = []
            for name, tensor in pairs:
                assert tensor.is_contiguous()
                assert_bytes_equal(tensor, part_of(metas[name], wanted[name]))
                names.append(name)
            assert names == source.owned_names(dist.get_rank())
            accepted |= is_planned_by_m2n(source)
    return gathers[0], accepted


def is_planned_by_m2n(source: Any) -> bool:
    """Run the plan of M2N, and compare it among ranks; return False if M2N does not accept such tensors."""
    everyone = tuple(range(dist.get_world_size()))
    for meta in source.metadata:
        placed = zip(meta.placements or (), meta.mesh_shape or (), strict=meta.placements is not None)
        splits = [(placement.dim, size) for placement, size in placed if hasattr(placement, "dim")]
        fits = 1 <= len(meta.shape) <= MAX_TENSOR_DIMS and all(meta.shape[dim] % size == 0 for dim, size in splits)
        if meta.owners not in (None, everyone) or len(splits) > 1 or not fits:
            return False
    engine = M2NTrainerWeightTransferEngine(client=mock.Mock(), source=source, is_sender=dist.get_rank() == 0)
    engine._prepare_source_plan(source, len(everyone))
    same_on_all(source_plan_digest(engine._wire_params))
    for meta, (name, tensor) in zip(engine._metas, source.iter_local(), strict=True):
        assert (meta.name, meta.dtype, expected_local_shape(meta)) == (name, tensor.dtype, tuple(tensor.shape))
    return True


def part_of(meta: Any, whole: Tensor) -> Tensor:
    """Return the part of a tensor that metadata state for this rank."""
    if meta.placements is None:
        return whole
    at = tuple(torch.tensor(meta.owners).reshape(meta.mesh_shape).eq(dist.get_rank()).nonzero()[0].tolist())
    division = Division(tuple(range(len(at))), tuple(getattr(placement, "dim", None) for placement in meta.placements))
    start, lengths = chunk(meta.shape, meta.mesh_shape, division, at)
    return whole[tuple(slice(low, low + size) for low, size in zip(start, lengths, strict=True))]


def gathers_of_module_source(model: nn.Module) -> int:
    """Return how many tensors vLLM's own source gathers in its local pass."""
    with counted_gathers() as gathers:
        for _ in ModuleSource(model).iter_local():
            pass
    return gathers[0]


def groups_by_layer(model: nn.Module, wanted: dict[str, Tensor]) -> int:
    """Run sharded RDT's ownership and groups; return how many expert tensors this rank publishes without a gather."""
    with mock.patch.dict(sys.modules, {"ray": mock.MagicMock()}):  # it transports, and none of it runs here
        from vllm.distributed.weight_transfer.sharded_rdt_trainer import ShardedRDTTrainerWeightTransferEngine

    source = published_source(model, owners="holders")
    engine = ShardedRDTTrainerWeightTransferEngine(
        client=mock.Mock(), source=source, is_sender=dist.get_rank() == 0, init_info=mock.Mock(rank=dist.get_rank())
    )
    engine._meta = list(source.metadata)
    names = [meta.name for meta in engine._meta]
    engine._groups = layerwise_groups(names)
    assert [name for group in engine._groups for name in group] == names
    world, this = engine._world_and_rank()
    engine._resolve_ownership(world, this)
    engine._server_name = f"server {this}"
    assert len(engine._all_gather_server_names(world, this)) == world  # compares the metadata of all ranks
    experts = 0
    own_memory = {local(tensor).untyped_storage().data_ptr() for tensor in model.state_dict().values()}
    for group, tensors in engine._iter_owned_groups():
        for name, tensor in zip(group, tensors, strict=True):
            assert_bytes_equal(tensor, wanted[name])
            experts += ".experts." in name and tensor.untyped_storage().data_ptr() in own_memory
    owned: list[Any] = [None] * world
    dist.all_gather_object(owned, sorted(engine._owned_names))
    assert set().union(*owned) == wanted.keys()
    return experts


def counted_gathers() -> Any:
    """Count the tensors that are gathered whole."""

    class Counted(list[int]):
        def __enter__(self) -> Counted:
            real = DTensor.full_tensor

            def full_tensor(tensor: DTensor, **options: Any) -> Tensor:
                self[0] += 1
                return real(tensor, **options)

            self._patch = mock.patch.object(DTensor, "full_tensor", full_tensor)
            self._patch.start()
            return self

        def __exit__(self, *_: object) -> None:
            self._patch.stop()

    return Counted([0])


def same_on_all(value: object) -> None:
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    assert all(other == value for other in values)
