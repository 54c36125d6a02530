"""The tensors of a model under published names, one after the other: what ``save_checkpoint`` would write of it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from automodel_conv.compiling.experts import refuse_missing_experts
from automodel_conv.compiling.to_checkpoint import saving_plan
from automodel_conv.distributed.gathering import WholeTensors, is_member
from automodel_conv.distributed.placements import is_distributed, local_of
from automodel_conv.errors import ConversionError, listing, message
from automodel_conv.execution.views import ViewOrCopy
from automodel_conv.files.checkpoint import open_checkpoint
from automodel_conv.files.source_options import SourceOptions
from automodel_conv.planning.copies import Target
from automodel_conv.planning.kept_codes import refuse_codes_without_scales
from automodel_conv.planning.plan import CopyPlan
from automodel_conv.planning.sharding import region_of
from automodel_conv.planning.views import HeldPart
from automodel_conv.publishing.saved import refuse_unlike_stored, saved_tensors, with_dtype
from automodel_conv.upstream.given_dtypes import dtype_to_save
from automodel_conv.upstream.given_rules import given_rules
from automodel_conv.upstream.models import state_table
from automodel_conv.upstream.wrappers import plain_model


class Gather(NamedTuple):
    """How much of its sources a target needs."""

    dims: tuple[int, ...]
    """Dimensions of the meshes of its sources over which they are gathered; (): none."""
    part: HeldPart
    """The target, from what is gathered."""


@dataclass(frozen=True)
class NamedTensors:
    """A model with the plan of its published tensors."""

    model: nn.Module
    """The model, without wrappers of torch."""
    plan: CopyPlan
    """The plan from the model's tensors to the published ones, in the order in which they are written."""
    described: tuple[str, ...]
    """Description of each of the model's tensors when they were planned."""
    view_or_copy: ViewOrCopy = field(default_factory=ViewOrCopy)

    def tensors(self) -> list[Tensor]:
        """Return the model's tensors as they are now, by row of the plan's sources.

        Raises:
            ConversionError: they are other tensors than those that were planned.
        """
        tensors = saved_tensors(self.model)
        described = _described(tensors.items())
        if described != self.described:
            were, are = dict.fromkeys(self.described), dict.fromkeys(described)
            raise ConversionError(
                message(
                    "the model was changed after its published tensors were planned",
                    expected="\n" + listing([text for text in were if text not in are] or ["the same tensors"]),
                    found="\n" + listing([text for text in are if text not in were] or ["fewer, or in another order"]),
                    do="plan them again, after the model is sharded and has its dtype",
                )
            )
        return list(tensors.values())

    def whole(
        self, targets: Sequence[Target], gathers: Mapping[str, Gather] = MappingProxyType({})
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield published tensors by name, each whole.

        The DTensors that a target needs are gathered when it is due, and kept until the last target that needs them.
        This is a collective of the ranks in their meshes, which must iterate over the same targets to the end. A rank
        outside of a mesh gets no tensor that needs it.

        Args:
            targets: targets of the plan.
            gathers: targets that need less than their whole sources, by name.
        """
        tensors = self.tensors()
        whole = WholeTensors(tensors)
        last = {row: number for number, target in enumerate(targets) for row in target.sources}
        for number, target in enumerate(targets):
            dims, part = gathers.get(target.name, (None, None))
            sources = [whole.gather(row, dims) for row in target.sources if is_member(tensors[row])]
            if len(sources) == len(target.sources):
                yield target.name, self.view_or_copy(target if part is None else _only(target, part), sources)
            del sources
            whole.release(row for row in target.sources if last[row] == number)

    def part(self, target: Target, part: HeldPart, tensors: Sequence[Tensor]) -> Tensor:
        """Return the part of a target that this rank holds; nothing is gathered.

        Args:
            target: a target of the plan.
            part: the part. Its copies must live as long as this object.
            tensors: the model's tensors.
        """
        return self.view_or_copy(_only(target, part), [local_of(tensors[row]) for row in target.sources])


def named_tensors(
    module: nn.Module,
    *,
    rules: Iterable[Any] | None = None,
    layout: str | None = None,
    reference: str | os.PathLike[str] | None = None,
    dtype: torch.dtype | str | None = None,
    **options: Unpack[SourceOptions],
) -> NamedTensors:
    """Plan the published tensors of a model; no tensor data is read.

    Args:
        module: the model, which torch may have wrapped.
        rules: rule objects of transformers, which are reversed; None: the model's own.
        layout: layout of the experts in the model; None: that of the model's own parameters.
        reference: path of a checkpoint whose names and shapes to restore; None: those that transformers saves.
        dtype: dtype of floating-point tensors, except those that a model keeps in float32; see ``dtype_to_save``. None:
            their own.
        **options: see ``SourceOptions``.

    Raises:
        NameProblems, UnsupportedError: as ``save_checkpoint`` of the model.
        CoverageError: the model has fewer experts than its config states.
    """
    model = plain_model(module)
    tensors = saved_tensors(model)
    refuse_unlike_stored(tensors)
    rules = given_rules(rules)
    opened = None if reference is None else open_checkpoint(reference, **options)
    plan = saving_plan(state_table(tensors), model=model, rules=rules, layout=layout, reference=opened)
    plan = with_dtype(plan, dtype_to_save(dtype, model, tensors.values()), model, rules)
    refuse_codes_without_scales(plan)
    refuse_missing_experts({name: tensor.shape for name, tensor in tensors.items()}, model)
    for tensor in tensors.values():
        region_of(tensor)
    return NamedTensors(model, plan, _described(tensors.items()))


def _only(target: Target, part: HeldPart) -> Target:
    """Return a part of a target as a target."""
    return target._replace(shape=part.shape, copies=part.copies)


def _described(tensors: Iterable[tuple[str, Tensor]]) -> tuple[str, ...]:
    return tuple(f"{name}: {tensor.dtype} {list(tensor.shape)}{_division(tensor)}" for name, tensor in tensors)


def _division(tensor: Tensor) -> str:
    return f" {tensor.placements} on {tensor.device_mesh}" if is_distributed(tensor) else ""  # type: ignore[attr-defined]
