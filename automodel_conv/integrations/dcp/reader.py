"""The reader for ``dcp.load``, from published per-expert files to the tensors of a model."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

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
from typing_extensions import Unpack

from automodel_conv.compiling.options import PlanSettings
from automodel_conv.compiling.planned import check_options, load_plan
from automodel_conv.compiling.stages import without_casts
from automodel_conv.distributed.placements import is_distributed, local_of
from automodel_conv.doors import at_door
from automodel_conv.dtypes import dtype_code
from automodel_conv.errors import UnsupportedError, message
from automodel_conv.execution.buffers import dtype_of
from automodel_conv.execution.filling import Limits, fill
from automodel_conv.execution.report import Clock, LoadReport, report_of
from automodel_conv.files import system
from automodel_conv.files.checkpoint import Checkpoint, open_source
from automodel_conv.files.hub import with_repository
from automodel_conv.files.remote.urls import is_url
from automodel_conv.files.source_options import SourceOptions, SourceSettings
from automodel_conv.planning.names import plain_names
from automodel_conv.planning.plan import CopyPlan, plan_of_parts
from automodel_conv.planning.problems import Problems
from automodel_conv.planning.regions import Part, box
from automodel_conv.planning.sharding import region_of
from automodel_conv.types import LayoutInFiles, LayoutName
from automodel_conv.upstream.given_rules import given_rules
from automodel_conv.upstream.models import tied_names
from automodel_conv.upstream.wrappers import plain_model


class _Opened(NamedTuple):
    """A checkpoint, its plan and problems, and the time that they took."""

    checkpoint: Checkpoint
    plan: CopyPlan
    problems: Problems
    target_names: dict[str, str]
    """The target name for each name that can be loaded."""
    clock: Clock


class HuggingFaceReader(StorageReader):
    """A storage reader that converts a safetensors checkpoint to the names and layout of a model.

    Tensors are cast to the dtype of the tensors that they are loaded into.

    Args:
        path: see ``load_state_dict``.
        model, rules, layout, source_layout, key_mapping: see ``compile_plan``. Without model and rules, the model of
            ``config.json`` is used. If torch has wrapped the model, the state dict may have the names of the wrapped
            model, or those of the model itself as returned by ``get_model_state_dict``.
        threads, scratch_bytes, device_scratch_bytes: see ``load_state_dict``.
        **options: where the checkpoint is and how it is reached; see ``SourceOptions``.

    Raises:
        CheckpointError, NameProblems, UnsupportedError: see ``compile_plan``; raised by ``read_metadata``.
        ReadError: a file cannot be read; raised by ``read_data``.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> import torch.distributed.checkpoint as dcp
        >>> from safetensors.torch import save_file
        >>> state_dict = {"weight": torch.zeros(2, 3)}
        >>> with TemporaryDirectory() as directory:
        ...     save_file({"weight": torch.ones(2, 3)}, f"{directory}/model.safetensors")
        ...     dcp.load(state_dict, storage_reader=HuggingFaceReader(directory, rules=[]))
        >>> state_dict["weight"].tolist()
        [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        model: nn.Module | None = None,
        *,
        rules: Iterable[Any] | None = None,
        layout: LayoutName | None = None,
        source_layout: LayoutInFiles | None = None,
        key_mapping: Mapping[str, str] | None = None,
        threads: int | None = None,
        scratch_bytes: int | None = None,
        device_scratch_bytes: int | None = None,
        **options: Unpack[SourceOptions],
    ):
        self._settings = SourceSettings(**options)
        self._given = {name: given for name, given in locals().items() if name not in ("self", "options")}
        self._given |= self._settings.source()
        self._path = path
        self._model = None if model is None else plain_model(model)
        self._aliases = {} if model is None or self._model is None else _wrapped_names(model, self._model)
        rules = given_rules(rules)
        self._options = PlanSettings(rules, layout, source_layout, key_mapping)
        self._limits = Limits(threads, scratch_bytes, device_scratch_bytes)
        self._opened: _Opened | None = None
        self.left_out: tuple[str, ...] = ()
        """Names of the tensors in the checkpoint that no target consumes; empty before ``read_metadata``."""
        self.report: LoadReport | None = None
        """The outcome of the last load, for this rank; None before ``read_data``."""

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Switch to another checkpoint if ``checkpoint_id`` is not None."""
        if checkpoint_id is not None:
            self._path = checkpoint_id
        self._opened = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return the names, dtypes and shapes of all tensors that can be loaded, as the model has them."""
        self._opened = opened = self._open()
        described = {}
        for name, target_name in opened.target_names.items():
            target = opened.plan.target(target_name)
            size = torch.Size(target.shape)
            chunk = ChunkStorageMetadata(torch.Size([0] * len(size)), size)
            properties = TensorProperties(dtype=dtype_of(target.dtype, name))
            described[name] = TensorStorageMetadata(properties, size, [chunk])
        return Metadata(state_dict_metadata=described)

    def _open(self) -> _Opened:
        """Open the checkpoint and compile its plan."""
        clock = Clock()
        with at_door("planning", lambda: self._given):
            check_options(self._options)  # before a download
            checkpoint = open_source(self._path, self._settings)
            clock.lap("open")
            whole, problems, model = load_plan(checkpoint, self._model, self._options)
            problems.raise_unless_fit(
                with_repository(checkpoint.path),
                unindexed=checkpoint.unindexed,
                in_files=checkpoint.position,
                model_is_built=self._model is None and self._options.rules is None,
            )
            self.left_out = checkpoint.left_out(whole.unused_sources)
        plan = without_casts(whole)  # cast only once, to the dtype of the tensors that are loaded into
        target_names = {target.name: target.name for target in plan.targets}
        for group in tied_names(model) if model is not None else ():
            first = next((name for name in group if name in target_names), None)
            if first is not None:
                target_names |= {name: target_names.get(name, first) for name in group}
        target_names |= {alias: target_names[name] for alias, name in self._aliases.items() if name in target_names}
        clock.lap("plan")
        return _Opened(checkpoint, plan, problems, target_names, clock)

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Do nothing, since ``read_metadata`` has created the plan."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Return the plan of this rank unchanged."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Return the plans of all ranks unchanged."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Fill all tensors of a plan at once."""
        checkpoint, whole, problems, target_names, clock = self._opened or self._open()
        clock.restart()  # torch has planned meanwhile
        parts, buffers = [], {}
        state = getattr(planner, "state_dict", {})
        whole_shards: set[str] = set()
        for number, item in enumerate(plan.items):
            if item.type != LoadItemType.TENSOR:
                raise UnsupportedError(message(f"{item.dest_index.fqn} is not a tensor", do="load it separately"))
            name = target_names[item.storage_index.fqn]
            entry = state.get(item.dest_index.fqn)
            shard = region_of(entry) if isinstance(entry, Tensor) and is_distributed(entry) else None
            if shard is not None and any(len(runs) > 1 for runs in shard.runs):
                # The planner supports only boxes, so a shard of several runs of rows is filled as a whole.
                if item.dest_index.fqn in whole_shards:
                    continue
                whole_shards.add(item.dest_index.fqn)
                region, tensor = shard, local_of(entry.detach())  # type: ignore[union-attr]
            else:
                region = box(whole.target(name).shape, item.storage_offsets, item.lengths)
                tensor = planner.resolve_tensor(item).detach()
            called = f"{item.dest_index.fqn}, part {number}"
            if whole.target(name).fallback is not None and name not in buffers:
                called = name  # transformers' own code requires the target's name, and the whole tensor
            part = Part(name, called, region, dtype_code(tensor.dtype))
            parts.append(part)
            buffers[part.name] = tensor
        with at_door("loading", lambda: self._given):
            stats = fill(plan_of_parts(whole, parts), checkpoint, buffers, self._limits)
        clock.lap("read")
        self.report = report_of(checkpoint, whole, problems, clock, stats, {})
        for item in plan.items:
            planner.commit_tensor(item, planner.resolve_tensor(item))
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Return whether the directory or file exists, or may exist behind a URL."""
        path = os.path.expanduser(os.fsdecode(checkpoint_id))
        return is_url(path) or system.exists(path)


def _wrapped_names(model: nn.Module, plain: nn.Module) -> dict[str, str]:
    """Return the names in a wrapped model that differ from those in the model itself, with the latter."""
    names, known = model.state_dict(), plain.state_dict()
    pairs = zip(names, plain_names(names, known), strict=True)
    return {name: plain_name for name, plain_name in pairs if name not in known}
