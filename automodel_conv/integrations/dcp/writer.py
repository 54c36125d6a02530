"""The writer for ``dcp.save``, from the tensors of a model to published per-expert files."""

from __future__ import annotations

import os
import sys
import time
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from math import prod
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import (
    Metadata,
    MetadataIndex,
)
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future
from typing_extensions import Unpack

from automodel_conv.compiling.experts import refuse_missing_experts
from automodel_conv.compiling.marks import naming_of_save
from automodel_conv.compiling.to_checkpoint import saving_plan
from automodel_conv.distributed.holders import checksums_of_parts
from automodel_conv.distributed.placements import is_distributed
from automodel_conv.doors import at_door
from automodel_conv.dtypes import dtype_code
from automodel_conv.errors import CoverageError, NameProblems, UnsupportedError, listing, message
from automodel_conv.execution.tensor_slabs import LocalTensor, tensor_slabs
from automodel_conv.execution.writing import SlabGroup, split_scratch, write_slabs
from automodel_conv.files.checkpoint import Checkpoint, open_checkpoint
from automodel_conv.files.destination import Destination, open_destination
from automodel_conv.files.remote.urls import local_path
from automodel_conv.files.shards import Naming, Shard
from automodel_conv.files.source_options import SourceOptions, SourceSettings
from automodel_conv.files.staging import staged_path
from automodel_conv.integrations.dcp.consistency import refuse_failures, refuse_unlike, shared_items
from automodel_conv.planning.copies import SourceTable
from automodel_conv.planning.names import plain_names
from automodel_conv.planning.plan import CopyPlan
from automodel_conv.planning.regions import box
from automodel_conv.planning.sharding import region_of
from automodel_conv.publishing.save_files import begin_save, finish_save
from automodel_conv.publishing.saved import not_saved, places_in, refuse_unlike_stored, saved_tensors, shards_for
from automodel_conv.saving import DEFAULT_SCRATCH_BYTES, SaveReport
from automodel_conv.types import LayoutName
from automodel_conv.upstream.given_rules import given_rules
from automodel_conv.upstream.wrappers import plain_model


class HuggingFaceWriter(StorageWriter):
    """A storage writer for safetensors checkpoints with published names and separate experts, like ``save_checkpoint``.

    All ranks write to the same files on a shared file system. The directory is a checkpoint once ``dcp.save`` has
    returned. As in ``save_checkpoint``, parts that several ranks hold are read once more for a checksum. The checksums
    are compared at the end, and if any differ, all files are removed. torch's planner refuses packed shards of tensor
    parallelism (gate and up each sharded by rows); ``save_checkpoint`` supports them.

    Args:
        directory: see ``save_checkpoint``; ``checkpoint_id=`` of ``dcp.save`` overrides it.
        model: model that provides rules, config and tied names, which are written once. Alternatively, pass rules,
            layout or reference.
        rules, layout, reference, max_shard_size, threads, scratch_bytes: see ``save_checkpoint``.
        **options: where the reference is and how it is reached; see ``SourceOptions``.

    Raises:
        NameProblems, CoverageError, RankError, UnsupportedError, DestinationError, WriteError: see
            ``save_checkpoint``; ``dcp`` wraps them in its ``CheckpointException``. Also RankError if one of several
            ranks cannot write; it names the rank and its error.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> import torch.distributed.checkpoint as dcp
        >>> from automodel_conv import open_checkpoint
        >>> model = nn.Linear(3, 2)
        >>> with TemporaryDirectory() as directory:
        ...     _ = dcp.save(model.state_dict(), storage_writer=HuggingFaceWriter(directory, model))
        ...     checkpoint = open_checkpoint(directory)
        >>> checkpoint.names
        ['bias', 'weight']
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        model: nn.Module | None = None,
        *,
        rules: Iterable[Any] | None = None,
        layout: LayoutName | None = None,
        reference: str | os.PathLike[str] | None = None,
        max_shard_size: int | str = "5GB",
        threads: int | None = None,
        scratch_bytes: int | None = None,
        **options: Unpack[SourceOptions],
    ):
        self._settings = SourceSettings(**options)
        self._given = {name: given for name, given in locals().items() if name not in ("self", "options")}
        self._given |= self._settings.source()
        self._directory = local_path(directory)
        self._model = None if model is None else plain_model(model)
        self._rules = given_rules(rules)
        self._layout = layout
        self._reference = reference
        self._max_shard_size = max_shard_size
        self._share = split_scratch(threads, scratch_bytes or DEFAULT_SCRATCH_BYTES, reads_files=False)
        self._names = None if self._model is None else saved_tensors(self._model).keys()
        self._begun: _Begun | None = None
        self.report: SaveReport | None = None
        """Report of the last successful save, on the coordinator."""
        self._ending = ExitStack()

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Remove the files of an unfinished save, and switch to another directory if ``checkpoint_id`` is not None."""
        self._ending.close()
        self._begun = None
        if checkpoint_id is not None:
            self._directory = local_path(checkpoint_id)

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Refuse saves without collectives, in which ranks would not know what other ranks write.

        Raises:
            UnsupportedError: ``use_collectives=False``.
        """
        if kwargs.get("use_collectives") is False:
            raise UnsupportedError(message("ranks write one checkpoint together", do="leave use_collectives=False out"))

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Record all parts that this rank holds for the coordinator, before the planner removes duplicate replicas."""
        return replace(plan, storage_data=plan.items)

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Begin all files on the coordinator, and request checksums of the parts that several ranks hold.

        Raises:
            NameProblems, CoverageError, RankError, UnsupportedError, DestinationError, WriteError: see
                ``save_checkpoint``.
        """
        if any(not getattr(plan, "usable", True) for plan in plans):
            raise UnsupportedError(message("cached save plans are not supported", do="leave enable_plan_caching out"))
        specs: dict[str, tuple[str, tuple[int, ...]]] = {}
        held: Counter[str] = Counter()
        for item in (item for plan in plans for item in plan.items):
            if item.tensor_data is None:
                raise UnsupportedError(message(f"{item.index.fqn} is not a tensor", do="save it separately"))
            code = dtype_code(item.tensor_data.properties.dtype)
            if code is None:
                raise UnsupportedError(message(f"{item.index.fqn} has a dtype that checkpoints cannot hold"))
            specs[item.index.fqn] = code, tuple(item.tensor_data.size)
            held[item.index.fqn] += prod(item.tensor_data.chunk.sizes)
        shared = shared_items([plan.storage_data for plan in plans])
        saved_names = self._saved_names(specs)
        self._check(
            {plain: specs[name] for plain, name in saved_names.items()},
            {plain: held[name] for plain, name in saved_names.items()},
        )
        names = list(specs)
        if self._names is not None:
            names = [saved_names[plain] for plain in self._names if plain in saved_names]
        table = SourceTable(names, [specs[name][0] for name in names], [specs[name][1] for name in names])
        copies, shards, naming = self._plan(table)
        reference = self._open_reference()
        left_out = not_saved(self._model, reference, [target.name for target in copies.targets])
        opening = open_destination(self._directory, shards, None, index_name=naming.index_name)
        with at_door("starting the save", lambda: self._given):
            destination = self._ending.enter_context(opening)
        self._begun = _Begun(destination, shards, naming, tuple(left_out), time.perf_counter())
        with self._undo_on_error():
            begin_save(destination, shards, self._model)
        return [replace(plan, storage_data=(table, items)) for plan, items in zip(plans, shared, strict=True)]

    def _saved_names(self, names: Collection[str]) -> dict[str, str]:
        """Return the names in the state dict by the names in the model, which wrappers of the model change."""
        if self._model is None:
            return {name: name for name in names}
        return dict(zip(plain_names(names, self._model.state_dict()), names, strict=True))

    def _check(self, specs: Mapping[str, tuple[str, tuple[int, ...]]], held: Mapping[str, int]) -> None:
        """Raise NameProblems if names are not the model's, and CoverageError if ranks do not hold each element once."""
        if self._model is not None and self._names is not None:
            known = self._model.state_dict().keys()
            missing = [name for name in self._names if name not in specs]
            unexpected = [name for name in specs if name not in known]
            if missing or unexpected:
                found = f"{len(missing)} missing, {len(unexpected)} unexpected:\n" + listing([*missing, *unexpected])
                text = message("the state dict is not the model's", found=found, do="pass model.state_dict() itself")
                raise NameProblems(text, missing=missing, unexpected=unexpected)
        refuse_missing_experts({name: shape for name, (_, shape) in specs.items()}, self._model)
        for name, (_, shape) in specs.items():
            if held[name] != prod(shape):
                expected = f"{prod(shape)} elements, shape {list(shape)}"
                text = f"the ranks do not hold all of {name} once"
                raise CoverageError(message(text, expected=expected, found=f"{held[name]} elements"))

    @contextmanager
    def _undo_on_error(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            if not self._ending.__exit__(*sys.exc_info()):
                raise

    def _plan(self, table: SourceTable) -> tuple[CopyPlan, list[Shard], Naming]:
        with at_door("planning what to save", lambda: self._given):
            reference = self._open_reference()
            plan = saving_plan(table, model=self._model, rules=self._rules, layout=self._layout, reference=reference)
            naming = naming_of_save(plan, self._model, self._layout, reference)
            return plan, shards_for(plan.targets, reference, self._max_shard_size, naming), naming

    def _open_reference(self) -> Checkpoint | None:
        if self._reference is None:
            return None
        return open_checkpoint(self._reference, **self._settings.shared(self._reference).source())

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write the items of this rank's plan, and wait until they are on the disk.

        An error is returned as a result for ``finish``. If it were raised, ``dcp`` would not call ``finish``, and the
        coordinator could not remove its files.
        """
        try:
            results = self._write(plan, planner)
        except Exception as error:
            results = [WriteResult(MetadataIndex(""), 0, error)]
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def _write(self, plan: SavePlan, planner: SavePlanner) -> list[WriteResult]:
        table, shared = plan.storage_data
        copies, shards, _ = self._plan(table)
        rows = {name: row for row, name in enumerate(table.names)}
        local_tensors: dict[int, list[LocalTensor]] = {}
        results = []
        for item in plan.items:
            results.append(WriteResult(item.index, item.tensor_storage_size() or 0, None))
            if item.index.fqn in rows and item.tensor_data is not None:
                local_tensors.setdefault(rows[item.index.fqn], []).append(_local_tensor(item, planner))
        parts = {str(number): _local_tensor(item, planner).tensor for number, item in enumerate(shared)}
        sums = checksums_of_parts(parts, self._share.threads, self._share.slab_bytes)
        results += [WriteResult(item.index, 0, sums[str(number)]) for number, item in enumerate(shared)]
        groups = tensor_slabs(
            copies, local_tensors, places_in(shards, copies.targets), most_bytes=self._share.slab_bytes
        )
        for file, shard in enumerate(shards):
            slabs = [SlabGroup(group.by_file.get(file, []), group.start) for group in groups]
            write_slabs(slabs, staged_path(self._directory, shard.name), self._share.threads, lambda nbytes: None)
        return results

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Turn the directory into a checkpoint on the coordinator.

        If a rank has failed or replicas differ, raise an error after removing all files.
        """
        if self._begun is not None:
            begun = self._begun
            with self._undo_on_error():
                refuse_failures(results)
                refuse_unlike(results)
                finish_save(begun.destination, begun.shards, self._model, begun.naming)
            self.report = SaveReport(
                files=tuple(shard.name for shard in begun.shards),
                bytes_written=sum(shard.nbytes for shard in begun.shards),
                carried=(),
                left_out=begun.left_out,
                seconds=time.perf_counter() - begun.started,
                peak_extra_bytes=self._share.scratch_bytes,
            )
        self.reset()

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Return whether this can be a directory on a local or mounted file system."""
        return "://" not in os.fsdecode(checkpoint_id)


class _Begun(NamedTuple):
    """A save that is in progress on the coordinator."""

    destination: Destination
    shards: list[Shard]
    naming: Naming
    left_out: tuple[str, ...]
    started: float
    """Start of the save by ``time.perf_counter``, in seconds."""


def _local_tensor(item: WriteItem, planner: SavePlanner) -> LocalTensor:
    """Return the part of a tensor on this rank that an item of a plan represents."""
    tensor: Tensor = planner.resolve_data(item)  # type: ignore[assignment]
    refuse_unlike_stored({item.index.fqn: tensor})
    entry = getattr(planner, "state_dict", {}).get(item.index.fqn)
    if isinstance(entry, Tensor) and is_distributed(entry):
        region = region_of(entry)  # it may be several runs of rows, while the planner supports only one box
    else:
        data = item.tensor_data
        region = box(tuple(data.size), data.chunk.offsets, data.chunk.sizes)  # type: ignore[union-attr]
    return LocalTensor(region, tensor.detach())
