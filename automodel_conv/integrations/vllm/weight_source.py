"""The class from which vLLM's weight transfer gets a trainer's weights, under published names.

What the backends of weight transfer ask of it (order, owners, contiguous parts): vllm 0.33.0,
``distributed/weight_transfer/base.py``, ``nccl_engine.py``, ``ipc_engine.py``, ``sharded_rdt_trainer.py`` and
``m2n_trainer.py``.
"""
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportUntypedBaseClass=false

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Unpack
from vllm.distributed.weight_transfer.base import ParamMeta, Replicate, Shard, WeightSource, layerwise_groups

from automodel_conv.distributed.collectives import rank_of_this
from automodel_conv.distributed.ownership import Owned, owned_targets
from automodel_conv.errors import UnsupportedError, listing, message
from automodel_conv.execution.buffers import dtype_of
from automodel_conv.files.source_options import SourceOptions
from automodel_conv.planning.copies import Target
from automodel_conv.publishing.named_tensors import Gather, named_tensors
from automodel_conv.types import LayoutName, Owners

OWNERS = ("mesh", "holders")


class PublishedSource(WeightSource):
    """The tensors of a trainer's model under published names, one tensor for each expert.

    See ``integrations.vllm.published_source``, which creates it.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        rules: Iterable[Any] | None = None,
        layout: LayoutName | None = None,
        reference: str | os.PathLike[str] | None = None,
        dtype: torch.dtype | str | None = None,
        owners: Owners = "mesh",
        **options: Unpack[SourceOptions],
    ):
        if owners not in OWNERS:
            raise UnsupportedError(message(f"unknown owners={owners!r}", expected=f"one of {list(OWNERS)}"))
        self._named = named_tensors(module, rules=rules, layout=layout, reference=reference, dtype=dtype, **options)
        plan = self._named.plan
        owned = owned_targets(plan, self._named.tensors(), by_holders=owners == "holders")
        by_name = {target.name: (target, own) for target, own in zip(plan.targets, owned, strict=True)}
        # Sharded RDT sends a layer at a time, and refuses names in any other order.
        ordered = [name for group in layerwise_groups(list(by_name)) for name in group]
        self._owned: list[tuple[Target, Owned]] = [by_name[name] for name in ordered]

    @cached_property
    def metadata(self) -> list[ParamMeta]:
        """Every published tensor of the whole model: name, dtype, shape, owners; the same on all ranks."""
        return [
            ParamMeta(
                target.name,
                dtype_of(target.dtype, target.name),
                target.shape,
                owners=own.owners,
                mesh_shape=own.mesh_shape,
                placements=own.sharded and tuple(Replicate() if dim is None else Shard(dim) for dim in own.sharded),
            )
            for target, own in self._owned
        ]

    def iter_full(self) -> Iterator[tuple[str, Tensor]]:
        """Yield each tensor that this rank owns, whole: a view of the model's own tensor, or of a gathered one."""
        rank = rank_of_this()
        # A target of several divided sources may have fewer owners than there are ranks that gather each source.
        due = [(target, own) for target, own in self._owned if own.is_owner(rank) or own.gathered is None]
        gathers = {
            target.name: Gather(own.gathered, own.gathered_part)
            for target, own in due
            if own.gathered is not None and own.gathered_part is not None
        }
        return self._named.whole([target for target, _ in due], gathers)

    def iter_local(self) -> Iterator[tuple[str, Tensor]]:
        """Yield this rank's part of each tensor that it owns, contiguous; nothing is gathered.

        Raises:
            UnsupportedError: placements cannot state which parts of a tensor the ranks hold.
        """
        others = [target.name for target, own in self._owned if not own.is_local]
        if others:
            raise UnsupportedError(
                message(
                    f"ranks hold parts of {others[0]} that placements cannot state",
                    found=f"{len(others)} such tensors:\n{listing(others)}",
                    do='pass {owners="holders"}, so that each expert belongs to the ranks that hold it; shard experts '
                    "along another dimension than their first; or use a backend that takes whole tensors",
                )
            )
        return self._parts()

    def _parts(self) -> Iterator[tuple[str, Tensor]]:
        rank, tensors = rank_of_this(), self._named.tensors()
        for target, own in self._owned:
            if own.is_owner(rank) and own.part is not None:
                yield target.name, self._named.part(target, own.part, tensors).contiguous()
