"""The reader for ``dcp.load``: from published, per-expert files to the tensors of a model."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from automodel_conv.compiling.options import PlanOptions
from automodel_conv.compiling.planned import load_plan
from automodel_conv.compiling.stages import without_casts
from automodel_conv.distributed.placements import is_distributed, local_of
from automodel_conv.doors import at_door
from automodel_conv.dtypes import dtype_code
from automodel_conv.errors import UnsupportedError, message
from automodel_conv.execution.buffers import dtype_of
from automodel_conv.execution.filling import Limits, fill
from automodel_conv.files import system
from automodel_conv.files.checkpoint import Checkpoint, open_downloaded
from automodel_conv.planning.names import plain_names
from automodel_conv.planning.plan import CopyPlan, plan_of_parts
from automodel_conv.planning.regions import Part, box
from automodel_conv.planning.sharding import region_of
from automodel_conv.upstream.models import tied_names
from automodel_conv.upstream.wrappers import plain_model


class HuggingFaceReader(StorageReader):
    """Reads a safetensors checkpoint under the names of the model it is for, converted on the way.

    Args:
        path: see ``load_state_dict``.
        model, rules, layout, source_layout, key_mapping: see ``compile_plan``; without model and rules, the model of
            ``config.json``. The state dict of a model that torch has wrapped may have its names or those of the model
            itself, as ``get_model_state_dict`` gives them.
        threads, scratch_bytes, device_scratch_bytes: see ``load_state_dict``.

    Tensors are cast to the dtype of those they are loaded into.

    Raises:
        CheckpointError, NameProblems, UnsupportedError: see ``compile_plan``; by ``read_metadata``.
        ReadError: by ``read_data``.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        model: nn.Module | None = None,
        *,
        rules: Iterable[Any] | None = None,
        layout: str | None = None,
        source_layout: str | None = None,
        key_mapping: Mapping[str, str] | None = None,
        threads: int | None = None,
        scratch_bytes: int | None = None,
        device_scratch_bytes: int | None = None,
    ):
        self._given = {name: given for name, given in locals().items() if name != "self"}
        self._path = path
        self._model = None if model is None else plain_model(model)
        # What the model's own state dict calls a tensor, where wrappers rename it.
        self._also_called = {} if model is None or self._model is None else _also_called(model, self._model)
        rules = None if rules is None else list(rules)
        self._options = PlanOptions(rules, layout, source_layout, key_mapping)
        self._limits = Limits(threads, scratch_bytes, device_scratch_bytes)
        self._opened: tuple[Checkpoint, CopyPlan, dict[str, str]] | None = None
        self.left_out: tuple[str, ...] = ()
        """Tensors of the checkpoint that no target is made of, once the metadata has been read."""

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Read another checkpoint from now on, if one is given."""
        if checkpoint_id is not None:
            self._path = checkpoint_id
        self._opened = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Names, dtypes and shapes of all that can be loaded: those of the model, not those of the files."""
        self._opened = _, plan, made = self._open()
        described = {}
        for name, of in made.items():
            target = plan.target(of)
            size = torch.Size(target.shape)
            chunk = ChunkStorageMetadata(torch.Size([0] * len(size)), size)
            properties = TensorProperties(dtype=dtype_of(target.dtype, name))
            described[name] = TensorStorageMetadata(properties, size, [chunk])
        return Metadata(state_dict_metadata=described)

    def _open(self) -> tuple[Checkpoint, CopyPlan, dict[str, str]]:
        """The checkpoint, its plan, and of each name that can be loaded the target that has its value."""
        with at_door("planning", lambda: self._given):
            checkpoint = open_downloaded(self._path)
            whole, problems, model = load_plan(checkpoint, self._model, self._options)
            problems.raise_unless_fit(checkpoint.path, unindexed=checkpoint.unindexed)
            self.left_out = checkpoint.left_out(whole.unused_sources)
        plan = without_casts(whole)  # to be cast to what is loaded into, once
        made = {target.name: target.name for target in plan.targets}
        for group in tied_names(model) if model is not None else ():
            first = next((name for name in group if name in made), None)
            if first is not None:
                made |= {name: made.get(name, first) for name in group}
        made |= {wrapped: made[name] for wrapped, name in self._also_called.items() if name in made}
        return checkpoint, plan, made

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing to do: the plan is made with the metadata."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Fill what the planner asks for, all of it at once."""
        checkpoint, whole, made = self._opened or self._open()
        parts, buffers = [], {}
        state = getattr(planner, "state_dict", {})
        whole_shards: set[str] = set()
        for number, item in enumerate(plan.items):
            if item.type != LoadItemType.TENSOR:
                raise UnsupportedError(message(f"{item.dest_index.fqn} is no tensor", do="load it from elsewhere"))
            name = made[item.storage_index.fqn]
            entry = state.get(item.dest_index.fqn)
            shard = region_of(entry) if isinstance(entry, Tensor) and is_distributed(entry) else None
            if shard is not None and any(len(runs) > 1 for runs in shard.runs):
                # A shard of several runs of rows: the planner knows boxes only, so it is filled as what it is.
                if item.dest_index.fqn in whole_shards:
                    continue
                whole_shards.add(item.dest_index.fqn)
                region, tensor = shard, local_of(entry.detach())  # type: ignore[union-attr]
            else:
                region = box(whole.target(name).shape, item.storage_offsets, item.lengths)
                tensor = planner.resolve_tensor(item).detach()
            called = f"{item.dest_index.fqn}, part {number}"
            if whole.target(name).fallback is not None and name not in buffers:
                called = name  # that upstream's own code knows; all of it, or it is refused
            part = Part(name, called, region, dtype_code(tensor.dtype))
            parts.append(part)
            buffers[part.name] = tensor
        with at_door("loading", lambda: self._given):
            fill(plan_of_parts(whole, parts), checkpoint, buffers, self._limits)
        for item in plan.items:
            planner.commit_tensor(item, planner.resolve_tensor(item))
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether there is such a directory or file."""
        return system.exists(os.fsdecode(checkpoint_id))


def _also_called(model: nn.Module, plain: nn.Module) -> dict[str, str]:
    """Names in the state dict of a wrapped model that are not those of the model itself, with those."""
    names, known = model.state_dict(), plain.state_dict()
    called = zip(names, plain_names(names, known), strict=True)
    return {name: plain for name, plain in called if name not in known}
