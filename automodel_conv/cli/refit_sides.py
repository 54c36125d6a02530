"""The tensors that the ranks of a trainer and of an engine would hold, from a model without data."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from math import prod
from typing import Any, NamedTuple

from torch import nn
from torch.distributed.tensor import Replicate

from automodel_conv.cli.engine_mesh import Division, EngineMesh, Shape, division_of, region_on
from automodel_conv.cli.forecast import coordinate_of, placements
from automodel_conv.compiling.to_checkpoint import saving_plan
from automodel_conv.compiling.to_model import loading_plan
from automodel_conv.planning.composition import table_of
from automodel_conv.planning.copies import SourceTable
from automodel_conv.planning.layouts import holds_grouped_experts, own_layout
from automodel_conv.planning.plan import CopyPlan
from automodel_conv.planning.regions import Region
from automodel_conv.planning.sharding import placed
from automodel_conv.publishing.saved import saved_tensors
from automodel_conv.refitting.agreement import Published
from automodel_conv.refitting.elsewhere import published_by
from automodel_conv.upstream.models import expert_layouts, model_targets

ENGINE_LAYOUT = "vllm"


def trainer_parts(model: nn.Module, mesh: Mapping[str, int], least_bytes: int) -> Published:
    """Return what the ranks of a trainer hold of a model: parameters and persistent buffers.

    Parameters are divided as ``cli.forecast`` states.

    Args:
        model: the model, even on the meta device.
        mesh: size of each dimension of the mesh by name.
        least_bytes: see ``owned_parts``.

    Raises:
        NameProblems: the rules of the model do not fit its names.
    """
    specs = model_targets(model)
    names = list(saved_tensors(model))
    table = SourceTable(names, [specs[name].dtype for name in names], [specs[name].shape for name in names])
    saving = saving_plan(table, model=model)
    layout = None
    if any(holds_grouped_experts(target.name) for target in saving.targets):
        layout = own_layout(expert_layouts(model).values())
    regions = _trainer_regions(table, mesh, {name for name, _ in model.named_buffers()})
    return published_by(saving, regions, layout, least_bytes)


def _trainer_regions(table: SourceTable, mesh: Mapping[str, int], buffers: Collection[str]) -> list[list[Region]]:
    """Return, for each rank, the region that it holds of each tensor.

    Each rank holds whole buffers. Source: torch 2.13.0, ``fully_shard``, which divides parameters only.
    """
    sizes = tuple(mesh.values())
    coordinates = [coordinate_of(rank, sizes) for rank in range(prod(sizes))]
    seen: dict[tuple[Shape, tuple[Any, ...]], list[Region]] = {}
    columns = []
    for name, shape in zip(table.names, table.shapes, strict=True):
        own = (Replicate(),) * len(sizes) if name in buffers else tuple(placements(name, shape, mesh))
        if (shape, own) not in seen:
            seen[shape, own] = [placed(shape, sizes, coordinate, own) for coordinate in coordinates]
        columns.append(seen[shape, own])
    return [[column[rank] for column in columns] for rank in range(len(coordinates))]


class EngineTensors(NamedTuple):
    """The tensors of an engine."""

    plan: CopyPlan
    """From the tensors of the checkpoint to the whole tensors."""
    divisions: Mapping[str, Division]
    """How each is divided, by name."""
    regions: list[dict[str, Region]]
    """For each rank, the region of each tensor that it holds, by name."""


def engine_tensors(model: nn.Module, published: Published, mesh: EngineMesh) -> EngineTensors:
    """Return the tensors of an engine that serves a model, with routed experts in the layout of vLLM.

    Args:
        model: the model, even on the meta device.
        published: what the trainer holds.
        mesh: the ranks of the engine.

    Raises:
        UnsupportedError: the ranks do not divide a tensor as vLLM needs it; or the layout of the experts is not known.
    """
    layout = ENGINE_LAYOUT if expert_layouts(model) else None
    table = table_of(published.plan.targets)
    plan, problems = loading_plan(table, model=model, layout=layout, source_layout=published.layout)
    problems.raise_unless_fit("the trainer's tensors and the engine's model")
    shapes = {target.name: target.shape for target in plan.targets}
    divisions = {name: division_of(name, shape, mesh, type(model).__name__) for name, shape in shapes.items()}
    heads = _kv_heads(model)
    regions = [
        {name: region_on(name, shapes, divisions[name], mesh, rank, heads) for name in shapes}
        for rank in range(mesh.ranks)
    ]
    return EngineTensors(plan, divisions, regions)


def _kv_heads(model: nn.Module) -> int | None:
    """Return the number of heads of keys and values that a model's config states; None if it states none."""
    config: Any = getattr(model, "config", None)
    heads = None if config is None else getattr(config.get_text_config(), "num_key_value_heads", None)
    return heads if isinstance(heads, int) else None
