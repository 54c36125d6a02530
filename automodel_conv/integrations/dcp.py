"""torch.distributed.checkpoint on published checkpoints: per-expert files to grouped, sharded models and back.

    dcp.load(state_dict, storage_reader=HuggingFaceReader(path))
    dcp.save(state_dict, storage_writer=HuggingFaceWriter(directory, model))

take the places of ``dcp.HuggingFaceStorageReader`` and ``HuggingFaceStorageWriter`` in code that already calls these;
each rank reads and writes the bytes of its own shards. Source of the protocol: torch 2.13.0,
``torch/distributed/checkpoint/storage.py``.
"""

from __future__ import annotations

import os
import sys
import time
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import chain
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from automodel_conv.compiling.experts import refuse_missing_experts
from automodel_conv.compiling.marks import form_of_save
from automodel_conv.compiling.opening import load_plan
from automodel_conv.compiling.pipeline import saving_plan, without_casts
from automodel_conv.distributed.holders import ALIKE, checksums_of_parts, unlike_replicas
from automodel_conv.distributed.placements import is_distributed, local_of, region_of
from automodel_conv.doors import at_door
from automodel_conv.dtypes import dtype_code
from automodel_conv.errors import CoverageError, NameProblems, RankError, UnsupportedError, listing, message
from automodel_conv.execution.buffers import dtype_of
from automodel_conv.execution.filling import Limits, fill
from automodel_conv.execution.tensor_slabs import Holding, tensor_slabs
from automodel_conv.execution.writing import budget, write_slabs
from automodel_conv.files import system
from automodel_conv.files.checkpoint import Checkpoint, open_checkpoint, open_downloaded
from automodel_conv.files.destination import Destination, open_destination, staged_path
from automodel_conv.files.shards import Form, Shard
from automodel_conv.planning.copies import SourceTable
from automodel_conv.planning.names import plain_names
from automodel_conv.planning.plan import CopyPlan
from automodel_conv.planning.regions import Part, box
from automodel_conv.publishing.beside import begin_save, finish_save
from automodel_conv.publishing.saved import not_saved, places_in, refuse_unlike_stored, saved_tensors, shards_for
from automodel_conv.saving import DEFAULT_SCRATCH_BYTES, SaveReport
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
        self._rules = None if rules is None else list(rules)
        self._layout = layout
        self._source_layout = source_layout
        self._key_mapping = key_mapping
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
            whole, problems, model = load_plan(
                checkpoint, self._model, self._rules, self._layout, self._source_layout, self._key_mapping, None
            )
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
            buffers[part.called] = tensor
        with at_door("loading", lambda: self._given):
            fill(whole.parts(parts), checkpoint, buffers, self._limits)
        for item in plan.items:
            planner.commit_tensor(item, planner.resolve_tensor(item))
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether there is such a directory or file."""
        return system.exists(os.fsdecode(checkpoint_id))


class HuggingFaceWriter(StorageWriter):
    """Writes a safetensors checkpoint under its published names, experts taken apart, as ``save_checkpoint`` does.

    All ranks write into the same files, on a file system that they share. The directory is a checkpoint once
    ``dcp.save`` has returned. What several ranks hold is read once more for a checksum, as there, and compared at the
    end; if it differs nothing stays. Packed shards of tensor parallelism (gate and up each cut in its rows) are
    refused by torch's own planner; ``save_checkpoint`` takes them.

    Args:
        directory: see ``save_checkpoint``; ``checkpoint_id=`` of ``dcp.save`` takes its place.
        model: whose rules and config to take, and which names are one tensor, to be written once; or give rules, layout
            or reference.
        rules, layout, reference, max_shard_size, threads, scratch_bytes: see ``save_checkpoint``.

    Raises:
        NameProblems, CoverageError, RankError, UnsupportedError, DestinationError, WriteError: see
            ``save_checkpoint``; ``dcp`` wraps them in its ``CheckpointException``. RankError too where one of several
            ranks cannot write; it names the rank and its error.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        model: nn.Module | None = None,
        *,
        rules: Iterable[Any] | None = None,
        layout: str | None = None,
        reference: str | os.PathLike[str] | None = None,
        max_shard_size: int | str = "5GB",
        threads: int | None = None,
        scratch_bytes: int | None = None,
    ):
        self._given = {name: given for name, given in locals().items() if name != "self"}
        self._directory = os.path.abspath(os.fsdecode(directory))
        self._model = None if model is None else plain_model(model)
        self._rules = None if rules is None else list(rules)
        self._layout = layout
        self._reference = reference
        self._max_shard_size = max_shard_size
        self._share = budget(threads, scratch_bytes or DEFAULT_SCRATCH_BYTES, reads_files=False)
        self._names = None if self._model is None else saved_tensors(self._model).keys()
        self._begun: _Begun | None = None
        self.report: SaveReport | None = None
        """Of the last save that has ended, on the coordinator."""
        self._ending = ExitStack()

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Write to another directory from now on, if one is given; what has failed before is removed."""
        self._ending.close()
        self._begun = None
        if checkpoint_id is not None:
            self._directory = os.path.abspath(os.fsdecode(checkpoint_id))

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Refuse ranks that do not talk to each other, of which none would know what the others write.

        Raises:
            UnsupportedError: ``use_collectives=False``.
        """
        if kwargs.get("use_collectives") is False:
            raise UnsupportedError(message("ranks write one checkpoint together", do="leave use_collectives=False out"))

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Tell the coordinator all that this rank holds, before the planner keeps one of each set of replicas."""
        return replace(plan, storage_data=plan.items)

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Begin all files, on the coordinator.

        Ranks are asked for the checksums of what several of them hold; ``finish`` compares these.
        """
        if any(not getattr(plan, "usable", True) for plan in plans):
            raise UnsupportedError(message("plans of an earlier save are not kept", do="leave enable_plan_caching out"))
        specs: dict[str, tuple[str, tuple[int, ...]]] = {}
        held: Counter[str] = Counter()
        for item in (item for plan in plans for item in plan.items):
            if item.tensor_data is None:
                raise UnsupportedError(message(f"{item.index.fqn} is no tensor", do="save it elsewhere"))
            code = dtype_code(item.tensor_data.properties.dtype)
            if code is None:
                raise UnsupportedError(message(f"{item.index.fqn} has a dtype that checkpoints cannot hold"))
            specs[item.index.fqn] = code, tuple(item.tensor_data.size)
            held[item.index.fqn] += prod(item.tensor_data.chunk.sizes)
        shared = _shared([plan.storage_data for plan in plans])
        called = self._called(specs)
        self._check({plain: specs[name] for plain, name in called.items()}, {p: held[n] for p, n in called.items()})
        names = list(specs) if self._names is None else [called[plain] for plain in self._names if plain in called]
        table = SourceTable(names, [specs[name][0] for name in names], [specs[name][1] for name in names])
        copies, shards, form = self._plan(table)
        reference = None if self._reference is None else open_checkpoint(self._reference)
        left_out = not_saved(self._model, reference, [target.name for target in copies.targets])
        opening = open_destination(self._directory, shards, None, index_name=form.index_name)
        with at_door("beginning to save", lambda: self._given):
            destination = self._ending.enter_context(opening)
        self._begun = _Begun(destination, shards, form, tuple(left_out), time.perf_counter())
        with self._undone_if_it_fails():
            begin_save(destination, shards, self._model)
        return [replace(plan, storage_data=(table, items)) for plan, items in zip(plans, shared, strict=True)]

    def _called(self, names: Collection[str]) -> dict[str, str]:
        """By the names of the model, which wrappers of it change, those that the state dict has."""
        if self._model is None:
            return {name: name for name in names}
        return dict(zip(plain_names(names, self._model.state_dict()), names, strict=True))

    def _check(self, specs: Mapping[str, tuple[str, tuple[int, ...]]], held: Mapping[str, int]) -> None:
        """Raise NameProblems where names are not the model's, CoverageError where ranks do not hold all there is."""
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
    def _undone_if_it_fails(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            if not self._ending.__exit__(*sys.exc_info()):
                raise

    def _plan(self, table: SourceTable) -> tuple[CopyPlan, list[Shard], Form]:
        with at_door("planning what to save", lambda: self._given):
            reference = None if self._reference is None else open_checkpoint(self._reference)
            plan = saving_plan(table, model=self._model, rules=self._rules, layout=self._layout, reference=reference)
            form = form_of_save(plan, self._model, self._layout, reference)
            return plan, shards_for(plan.targets, reference, self._max_shard_size, form), form

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write what this rank's plan has, and wait until the disk has it.

        An error is a result for ``finish``: if this raised, the coordinator would not be asked to end what it began.
        """
        try:
            results = self._written(plan, planner)
        except Exception as error:
            results = [WriteResult(MetadataIndex(""), 0, error)]
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def _written(self, plan: SavePlan, planner: SavePlanner) -> list[WriteResult]:
        table, shared = plan.storage_data
        copies, shards, _ = self._plan(table)
        rows = {name: row for row, name in enumerate(table.names)}
        holdings: dict[int, list[Holding]] = {}
        results = []
        for item in plan.items:
            results.append(WriteResult(item.index, item.tensor_storage_size() or 0, None))
            if item.index.fqn in rows and item.tensor_data is not None:
                holdings.setdefault(rows[item.index.fqn], []).append(_holding(item, planner))
        parts = {str(number): _holding(item, planner).tensor for number, item in enumerate(shared)}
        sums = checksums_of_parts(parts, self._share.threads, self._share.slab_bytes)
        results += [WriteResult(item.index, 0, sums[str(number)]) for number, item in enumerate(shared)]
        groups = tensor_slabs(copies, holdings, places_in(shards, copies.targets), most_bytes=self._share.slab_bytes)
        for file, shard in enumerate(shards):
            slabs = [(group.by_file.get(file, []), group.start) for group in groups]
            write_slabs(slabs, staged_path(self._directory, shard.name), self._share.threads, lambda nbytes: None)
        return results

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Make the directory a checkpoint, on the coordinator, if all ranks have written and replicas are replicas.

        Else nothing of it stays.
        """
        if self._begun is not None:
            begun = self._begun
            with self._undone_if_it_fails():
                _refuse_failures(results)
                _refuse_unlike(results)
                finish_save(begun.destination, begun.shards, self._model, begun.form)
            self.report = SaveReport(
                files=tuple(shard.name for shard in begun.shards),
                bytes_written=sum(shard.nbytes for shard in begun.shards),
                carried=(),
                left_out=begun.left_out,
                seconds=time.perf_counter() - begun.at,
                peak_extra_bytes=self._share.scratch_bytes,
            )
        self.reset()

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether this can be a directory on a local or mounted file system."""
        return "://" not in os.fsdecode(checkpoint_id)


# --- private ----------------------------------------------------------------------------------------------------------


class _Begun(NamedTuple):
    """A save that the coordinator has begun."""

    destination: Destination
    shards: list[Shard]
    form: Form
    left_out: tuple[str, ...]
    at: float


def _also_called(model: nn.Module, plain: nn.Module) -> dict[str, str]:
    """Names in the state dict of a wrapped model that are not those of the model itself, with those."""
    names, known = model.state_dict(), plain.state_dict()
    called = zip(names, plain_names(names, known), strict=True)
    return {name: plain for name, plain in called if name not in known}


def _shared(items: Sequence[Sequence[WriteItem]]) -> list[list[WriteItem]]:
    """The items of each rank that other ranks hold too.

    Raises:
        RankError: tensors of one name have different shapes or dtypes.
        CoverageError: parts that begin in the same place have different sizes.
    """
    like: dict[str, tuple[object, ...]] = {}
    sizes: dict[MetadataIndex, tuple[int, ...]] = {}
    held: Counter[MetadataIndex] = Counter()
    for item in chain.from_iterable(items):
        if item.tensor_data is None or not prod(item.tensor_data.chunk.sizes):
            continue
        name, data = item.index.fqn, item.tensor_data
        found = tuple(data.size), data.properties.dtype
        first = like.setdefault(name, found)
        if found != first:
            raise RankError(message(f"{name} differs from rank to rank", found=f"{first} and {found}", do=ALIKE))
        size = sizes.setdefault(item.index, tuple(data.chunk.sizes))
        if size != tuple(data.chunk.sizes):
            found = f"parts of {list(size)} and {list(data.chunk.sizes)} at {list(data.chunk.offsets)}"
            raise CoverageError(message(f"ranks divide {name} in different ways", found=found, do=ALIKE))
        held[item.index] += 1
    return [[item for item in each if held[item.index] > 1] for each in items]


def _refuse_failures(results: Sequence[Sequence[WriteResult]]) -> None:
    """Raise what ``write_data`` has met: the error itself where there is one rank, RankError where there are more."""
    errors = {
        rank: result.storage_data
        for rank, each in enumerate(results)
        for result in each
        if isinstance(result.storage_data, Exception)
    }
    if errors and len(results) == 1:
        raise errors[0]
    if errors:
        found = listing(f"rank {rank}: {type(error).__name__}: {error}" for rank, error in errors.items())
        raise RankError(message(f"saving failed on {len(errors)} of the ranks that do it together", found="\n" + found))


def _refuse_unlike(results: Sequence[Sequence[WriteResult]]) -> None:
    """Compare the checksums of all ranks, which ``write_data`` adds to its results.

    Raises:
        RankError: ranks that hold the same part of a tensor hold different bytes.
    """
    first: dict[MetadataIndex, tuple[int, int]] = {}
    unlike: dict[str, str] = {}
    for rank, each in enumerate(results):
        for result in each:
            if result.storage_data is not None:
                of, checksum = first.setdefault(result.index, (rank, result.storage_data))
                if checksum != result.storage_data:
                    unlike.setdefault(result.index.fqn, f"rank {rank} and rank {of}")
    if unlike:
        raise unlike_replicas(sorted(unlike.items()))


def _holding(item: WriteItem, planner: SavePlanner) -> Holding:
    """The part of a tensor that an item of a plan stands for on this rank."""
    tensor: Tensor = planner.resolve_data(item)  # type: ignore[assignment]
    refuse_unlike_stored({item.index.fqn: tensor})
    entry = getattr(planner, "state_dict", {}).get(item.index.fqn)
    if isinstance(entry, Tensor) and is_distributed(entry):
        region = region_of(entry)  # which may be several runs of rows, where the planner knows one box
    else:
        data = item.tensor_data
        region = box(tuple(data.size), data.chunk.offsets, data.chunk.sizes)  # type: ignore[union-attr]
    return Holding(region, tensor.detach())
