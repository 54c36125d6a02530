"""Suite: transformers' own tensor-parallel loads, and this package's loads of the same models with the same shards."""

from __future__ import annotations

import os
import re
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard
from transformers.distributed import DistributedConfig

import automodel_conv as amc
from automodel_conv.testing import POISON
from tests.distributed.models import (
    TRANSPOSING,
    Meshes,
    Published,
    assert_holds,
    local,
    part_of,
    placed_by,
    published,
    rope_types,
    sharded,
)
from tests.distributed.starting import send

RIGHT = ["mixtral", "qwen3_moe", "deepseek_v3"]


def prepare(directory: Path, world: int) -> dict[str, Published]:
    checkpoints = {name: published(name, directory, vocab_size=66 * world) for name in RIGHT}  # 5.17: equal shares
    return checkpoints | {name: published(name, directory) for name in (TRANSPOSING, *rope_types())}


def rank(common: dict[str, Published], variant: str, directory: Path) -> None:
    number, world = str(dist.get_rank()), str(dist.get_world_size())
    os.environ |= {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": world}  # transformers reads these
    for name, source in common.items():
        permuted = [k for k in source.full if "vision" in k and k.endswith(("q_proj.weight", "k_proj.weight"))]
        plan = "auto"
        if name in rope_types():
            plan = {re.sub(r"\.\d+\.", ".*.", k.removesuffix(".weight")): "colwise" for k in permuted}
        model = stock(source, plan)
        if isinstance(model, str):
            send({"name": name, "refused": model})
            model = sharded_by_plan(source)
        else:
            state = model.state_dict()
            if not any(isinstance(tensor, DTensor) for tensor in state.values()):
                send({"name": name, "plain": True})
                continue
            wrong = [
                key
                for key, tensor in state.items()
                if not torch.equal(local(tensor), part_of(source.full[key], tensor).to(tensor.dtype))
            ]
            send({"name": name, "wrong": wrong, "permuted": permuted})
            for tensor in state.values():
                local(tensor).reshape(-1).view(torch.uint8).fill_(POISON)
        amc.load_model(model, source.path)
        assert_holds(model.state_dict(), source)


def stock(source: Published, plan: str | dict[str, str]) -> nn.Module | str:
    """Return the model that transformers loads, or the text of its error."""
    if "tp_size" in DistributedConfig.__dataclass_fields__:
        how = {"distributed_config": DistributedConfig(tp_size=dist.get_world_size(), tp_plan=plan)}
    else:  # before 5.17
        how = {"tp_plan": plan}
    try:
        return type(source.model).from_pretrained(source.path, **how)
    except RuntimeError as error:
        return str(error)


def sharded_by_plan(source: Published) -> nn.Module:
    """Return the model sharded by the tensor-parallel plan: gate and up each cut in their rows, down in its columns."""
    model = sharded(source, "none", Meshes())

    def rule(name, parameter):
        if name.endswith("gate_up_proj"):
            return [_StridedShard(1, split_factor=2)]
        if name.endswith("experts.down_proj"):
            return [Shard(2)]
        return [Shard(0)] if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")) else [Replicate()]

    placed_by(model, Meshes()(dist.get_world_size()), rule)
    return model
