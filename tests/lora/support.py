"""A small base model of experts without transformers, and adapters for it, in memory and on disk."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from automodel_conv.dtypes import dtype_code
from automodel_conv.lora.adapter import PREFIX, Adapter, adapter_of
from automodel_conv.lora.base import Base, Loading
from automodel_conv.lora.config import config_of
from automodel_conv.planning.copies import SourceTable
from automodel_conv.planning.deltas import Block, Delta
from tests.planning.plans import ALTERNATE, JOIN, MERGE, SWAP, plan_of, targets_of

SETTINGS: dict[str, Any] = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "peft_version": "0.21.2"}
"""Settings of an adapter whose scale is 2."""
EXPERTS, HIDDEN, INNER = 3, 8, 5
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


class Held:
    """The tensors of an adapter in memory."""

    def __init__(self, tensors: Mapping[str, Tensor]):
        self.names, self._tensors = list(tensors), list(tensors.values())
        self.dtypes = [dtype_code(tensor.dtype) or str(tensor.dtype) for tensor in self._tensors]
        self.shapes = [tuple(tensor.shape) for tensor in self._tensors]

    def read(self, rows: Sequence[int]) -> list[Tensor]:
        return [self._tensors[row] for row in rows]


def dyadic(*shape: int, seed: int = 0) -> Tensor:
    """Return quarters from -1 to 1 in float32, of which products and sums are exact."""
    return torch.randint(-4, 5, shape, generator=torch.Generator().manual_seed(seed)) / 4


def lora(module: str, outputs: int, inputs: int, rank: int = 2, *, count: int = 1, seed: int = 0) -> dict[str, Tensor]:
    """Return the two tensors of a module, or of a stack of ``count`` matrices, under the names of PEFT."""
    return {
        f"{PREFIX}{module}.lora_A.weight": dyadic(count * rank, inputs, seed=2 * seed),
        f"{PREFIX}{module}.lora_B.weight": dyadic(outputs, rank * count, seed=2 * seed + 1),
    }


def per_expert(experts: Sequence[int] = range(EXPERTS), rank: int = 2, *, hidden: int = HIDDEN, inner: int = INNER):
    """Return the tensors of an adapter with a module for each projection of some experts."""
    tensors = {}
    for expert in experts:
        for number, name in enumerate(PROJECTIONS):
            outputs, inputs = (hidden, inner) if name == "down_proj" else (inner, hidden)
            tensors |= lora(f"mlp.experts.{expert}.{name}", outputs, inputs, rank, seed=10 * expert + number)
    return tensors


def in_memory(tensors: Mapping[str, Tensor], **settings: Any) -> Adapter:
    """Return an adapter that is not on disk."""
    return adapter_of("memory", config_of(SETTINGS | settings, "memory"), Held(tensors))


def write_adapter(directory: Path, tensors: Mapping[str, Tensor], **settings: Any) -> Path:
    """Write an adapter as PEFT does."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "adapter_config.json").write_text(json.dumps(SETTINGS | settings))
    save_file(dict(tensors), directory / "adapter_model.safetensors")
    return directory


def product_of(tensors: Mapping[str, Tensor], module: str, scale: float = 2.0) -> Tensor:
    """Return ``scale * B @ A`` of a module in float64."""
    a, b = (tensors[f"{PREFIX}{module}.lora_{part}.weight"].double() for part in "AB")
    return scale * (b @ a)


class Experts(nn.Module):
    """Stacks of matrices; ``kind`` is "linear", "transposed", or "interleaved", which is transposed as well."""

    def __init__(self, kind: str, count: int, hidden: int, inner: int):
        super().__init__()
        self.is_transposed, self.is_concatenated, self.has_gate = kind != "linear", kind != "interleaved", True
        shapes = [(count, 2 * inner, hidden), (count, hidden, inner)]
        if self.is_transposed:
            shapes = [(count, columns, rows) for count, rows, columns in shapes]
        self.gate_up_proj, self.down_proj = (nn.Parameter(torch.zeros(shape)) for shape in shapes)


def toy_base(kind: str = "linear", *, count: int = EXPERTS, hidden: int = HIDDEN, inner: int = INNER) -> Base:
    """Return a base model: published experts, a linear layer, an embedding, a router and a norm."""
    model = nn.Module()
    model.mlp = nn.Module()
    model.mlp.experts = Experts(kind, count, hidden, inner)
    model.mlp.gate = nn.Module()
    model.mlp.gate.weight = nn.Parameter(torch.zeros(count, hidden))
    model.q_proj, model.embed, model.norm = nn.Linear(hidden, 6, bias=False), nn.Embedding(7, hidden), nn.LayerNorm(3)
    plain = {"q_proj.weight": (6, hidden), "embed.weight": (7, hidden), "norm.weight": (3,)}
    plain["mlp.gate.weight"] = (count, hidden)
    names = {name: [f"mlp.experts.{e}.{name}.weight" for e in range(count)] for name in PROJECTIONS}
    shapes = {name: (inner, hidden) for group in ("gate_proj", "up_proj") for name in names[group]}
    shapes |= dict.fromkeys(names["down_proj"], (hidden, inner)) | plain
    table = SourceTable(list(shapes), ["F32"] * len(shapes), list(shapes.values()))
    turned = {"linear": [], "transposed": [SWAP], "interleaved": [ALTERNATE, SWAP]}[kind]
    down = turned and [SWAP]
    groups = [names["gate_proj"], names["up_proj"]]
    targets = targets_of(table, groups, [MERGE, JOIN, *turned], ["mlp.experts.gate_up_proj"], "F32")
    targets += targets_of(table, [names["down_proj"]], [MERGE, *down], ["mlp.experts.down_proj"], "F32")
    targets += [target for name in plain for target in targets_of(table, [[name]], [], [name], "F32")]
    plan = plan_of(table, targets)
    base = Base("toy", table, lambda: Loading(model, plan))
    base.published = plan.inverse()  # type: ignore[misc]  # there are no rules for the type of this model
    return base


def base_of_matrices(**shapes: tuple[int, ...]) -> Base:
    """Return a base model of which only the checkpoint is known; "__" in a name is a dot."""
    from automodel_conv.errors import UnsupportedError, message

    def no_model() -> Loading:
        raise UnsupportedError(message("no config"))

    names = [name.replace("__", ".") for name in shapes]
    return Base("matrices", SourceTable(names, ["F32"] * len(names), list(shapes.values())), no_model)


def values_of(blocks: Sequence[Block], products: Mapping[int, Tensor], shape: Sequence[int]) -> Tensor:
    """Return a tensor that is the sum of blocks, given each delta's product ``[stack, rows, columns]``."""
    result = torch.zeros(prod(shape), dtype=torch.float64)
    for block in blocks:
        part = products[block.delta][block.matrix][block.row_slice, block.column_slice]
        place = result.as_strided(part.shape, (block.row_stride, block.column_stride), block.offset)
        place += part
    return result.view(*shape)


def product_of_delta(delta: Delta, adapter: Adapter) -> Tensor:
    """Return ``scale * B @ A`` of each matrix of a delta in float64."""
    assert delta.b is not None
    a, b = (tensor.double() for tensor in adapter.tensors.read([delta.a, delta.b]))
    count, rows, columns = delta.shape
    a, b = a.view(count, delta.rank, columns), b.view(rows, delta.rank, count).permute(2, 0, 1)
    return delta.scale * (b @ a)
