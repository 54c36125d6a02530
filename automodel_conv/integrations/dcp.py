"""torch.distributed.checkpoint on published checkpoints: per-expert files into grouped, sharded models.

    dcp.load(state_dict, storage_reader=HuggingFaceReader(path))

takes the place of ``dcp.HuggingFaceStorageReader`` in code that already calls ``dcp.load``; each rank reads the bytes
of its own shards. Source of the protocol: torch 2.13.0, ``torch/distributed/checkpoint/storage.py``.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from automodel_conv.dtypes import dtype_code
from automodel_conv.errors import UnsupportedError, message
from automodel_conv.execution.buffers import dtype_of
from automodel_conv.execution.filling import Limits, fill
from automodel_conv.files import system
from automodel_conv.files.checkpoint import Checkpoint, open_checkpoint
from automodel_conv.loading import load_plan
from automodel_conv.planning.models import tied_names
from automodel_conv.planning.plan import CopyPlan
from automodel_conv.planning.sharding import Part, box, parts_plan


class HuggingFaceReader(StorageReader):
    """Reads a safetensors checkpoint under the names of the model it is for, converted on the way.

    Args:
        path: see ``load_state_dict``.
        model, rules, layout, key_mapping: see ``compile_plan``; without model and rules, the model of ``config.json``.
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
        key_mapping: Mapping[str, str] | None = None,
        threads: int | None = None,
        scratch_bytes: int | None = None,
        device_scratch_bytes: int | None = None,
    ):
        self._path = path
        self._model = model
        self._rules = None if rules is None else list(rules)
        self._layout = layout
        self._key_mapping = key_mapping
        self._limits = Limits(threads, scratch_bytes, device_scratch_bytes)
        self._opened: tuple[Checkpoint, CopyPlan, dict[str, str]] | None = None

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
        checkpoint = open_checkpoint(self._path)
        plan, problems, model = load_plan(checkpoint, self._model, self._rules, self._layout, self._key_mapping, None)
        problems.raise_unless_fit(checkpoint.path)
        made = {target.name: target.name for target in plan.targets}
        for group in tied_names(model) if model is not None else ():
            first = next((name for name in group if name in made), None)
            if first is not None:
                made |= {name: made.get(name, first) for name in group}
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
        for number, item in enumerate(plan.items):
            if item.type != LoadItemType.TENSOR:
                raise UnsupportedError(message(f"{item.dest_index.fqn} is no tensor", do="load it from elsewhere"))
            name = made[item.storage_index.fqn]
            tensor = planner.resolve_tensor(item).detach()
            region = box(whole.target(name).shape, item.storage_offsets, item.lengths)
            part = Part(name, f"{item.dest_index.fqn}, part {number}", region, dtype_code(tensor.dtype))
            parts.append(part)
            buffers[part.called] = tensor
        fill(parts_plan(whole, parts), checkpoint, buffers, self._limits)
        for item in plan.items:
            planner.commit_tensor(item, planner.resolve_tensor(item))
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether there is such a directory or file."""
        return system.exists(os.fsdecode(checkpoint_id))
