"""The tensors that this rank of a refit holds, and which part of a whole tensor each one is."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from automodel_conv.compiling.experts import refuse_missing_experts
from automodel_conv.compiling.to_checkpoint import saving_plan
from automodel_conv.distributed.placements import is_distributed, local_of
from automodel_conv.errors import CoverageError, UnsupportedError, listing, message
from automodel_conv.planning.copies import SourceTable
from automodel_conv.planning.kept_codes import refuse_codes_without_scales
from automodel_conv.planning.layouts import holds_grouped_experts, own_layout
from automodel_conv.planning.plan import CopyPlan
from automodel_conv.planning.regions import Region
from automodel_conv.planning.sharding import region_of
from automodel_conv.publishing.saved import refuse_unlike_stored, saved_tensors
from automodel_conv.upstream.models import expert_layouts, state_table

# Values of each expert that are compared with those on other ranks.
_SAMPLED = 16


@dataclass(frozen=True)
class Held:
    """Tensors of this rank by name, and the region of a whole tensor that each one is."""

    tensors: Mapping[str, Tensor]
    regions: Mapping[str, Region]

    @property
    def table(self) -> SourceTable:
        """Names, dtypes and shapes of the whole tensors."""
        table = state_table(self.tensors)
        return SourceTable(table.names, table.dtypes, [self.regions[name].shape for name in table.names])

    def local(self, name: str) -> Tensor:
        """Return the memory of this rank's part of a tensor."""
        return local_of(self.tensors[name].detach())

    def samples(self) -> dict[str, str]:
        """Return a digest of some values of each expert in each plain tensor of grouped experts, by name."""
        return {
            name: _digest(tensor.detach())
            for name, tensor in self.tensors.items()
            if holds_grouped_experts(name) and not is_distributed(tensor) and tensor.numel()
        }


def _digest(tensor: Tensor) -> str:
    values = tensor.flatten(1)[:, :_SAMPLED] if tensor.ndim > 1 else tensor
    data = values.contiguous().cpu().reshape(-1).view(torch.uint8)
    return hashlib.blake2b(data.numpy().tobytes(), digest_size=8).hexdigest()


def own_experts(experts: Sequence[int] | None) -> tuple[tuple[int, int], ...] | None:
    """Return the numbers of a rank's own experts as runs ``(first, count)``.

    Raises:
        UnsupportedError: they are no numbers of experts.
    """
    if experts is None:
        return None
    numbers = list(experts) if isinstance(experts, Iterable) else [experts]
    if not isinstance(experts, Iterable) or not all(isinstance(number, int) and number >= 0 for number in numbers):
        found = f"{experts!r}"
        raise UnsupportedError(
            message("experts= is not a list of experts", expected="their numbers, such as range(8, 16)", found=found)
        )
    runs = (list(run) for _, run in groupby(enumerate(numbers), lambda item: item[1] - item[0]))
    return tuple((run[0][1], len(run)) for run in runs)


def held(tensors: Mapping[str, Tensor], experts: Sequence[int] | None, num_experts: int) -> Held:
    """Return the tensors of a rank with their regions.

    Args:
        tensors: tensors by name. Plain ones are whole, except grouped experts if ``experts`` is given.
        experts: numbers of the experts that plain tensors of grouped experts hold, in their order.
        num_experts: number of all experts.

    Raises:
        UnsupportedError: a tensor has no data, or is a partial sum.
        CoverageError: a tensor has another number of experts than ``experts``.
    """
    refuse_unlike_stored(tensors)
    runs = own_experts(experts)
    regions = {}
    for name, tensor in tensors.items():
        region = region_of(tensor)
        if runs is not None and holds_grouped_experts(name) and not is_distributed(tensor):
            region = _of_experts(name, tensor, runs, num_experts)
        regions[name] = region
    if runs is not None and not any(holds_grouped_experts(n) and not is_distributed(t) for n, t in tensors.items()):
        raise UnsupportedError(
            message(
                "experts= names no tensors",
                expected="plain tensors of grouped experts, such as experts.gate_up_proj",
                found=f"{len(tensors)} other tensors",
                do="leave {experts} out on this rank; experts with tensors of their own need names with their "
                "numbers in the whole model",
            )
        )
    return Held(dict(tensors), regions)


def _of_experts(name: str, tensor: Tensor, runs: tuple[tuple[int, int], ...], num_experts: int) -> Region:
    count = sum(length for _, length in runs)
    if not tensor.ndim or len(tensor) != count:
        raise CoverageError(
            message(
                f"{name} does not hold the experts that experts= names",
                expected=f"{count} experts in its first dimension",
                found=f"shape {list(tensor.shape)}",
                do="name the experts of this rank's own tensors, in their order",
            )
        )
    rest = tuple(tensor.shape[1:])
    return Region((num_experts, *rest), (runs, *(((0, size),) if size else () for size in rest)))


@dataclass(frozen=True)
class Trained:
    """Tensors of a rank of the trainer, and the plan from them to the checkpoint's names."""

    held: Held
    plan: CopyPlan
    """Its sources are the whole tensors, in the order of ``held``."""
    layout: str | None
    """Layout of the experts that the checkpoint keeps grouped; None if there are none, or if it is unknown."""


def trained(
    model: nn.Module, rules: Iterable[Any] | None, layout: str | None, experts: Sequence[int] | None, num_experts: int
) -> Trained:
    """Return what a module of the trainer holds.

    Args:
        model: the module, without the wrappers of torch.
        rules, layout: as for ``save_checkpoint``.
        experts, num_experts: as for ``held``.

    Raises:
        UnsupportedError, CoverageError, NameProblems: as for ``save_checkpoint``.
    """
    of_rank = held(saved_tensors(model), experts, num_experts)
    table = of_rank.table
    plan = saving_plan(table, model=model, rules=rules, layout=layout)
    refuse_codes_without_scales(plan)
    if plan.fallbacks:
        raise UnsupportedError(
            message(
                "transformers' own code computes tensors of the checkpoint, which no copy does",
                found="\n" + listing(plan.fallbacks),
            )
        )
    refuse_missing_experts(dict(zip(table.names, table.shapes, strict=True)), model)
    return Trained(of_rank, plan, _published_layout(plan, model, layout))


def _published_layout(plan: CopyPlan, model: nn.Module, layout: str | None) -> str | None:
    """Return the layout in which the checkpoint has grouped experts, as ``save_checkpoint`` would write it."""
    if not any(holds_grouped_experts(target.name) for target in plan.targets):
        return None
    stated = [own for own in expert_layouts(model).values() if own is not None]
    return own_layout(stated) if stated else None if layout is None else "transformers"
