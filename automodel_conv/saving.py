"""The public function that saves: a model or its grouped tensors, straight to per-expert files."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from typing_extensions import Unpack

from automodel_conv.compiling.experts import refuse_missing_experts
from automodel_conv.compiling.marks import naming_of_save
from automodel_conv.compiling.to_checkpoint import saving_plan
from automodel_conv.distributed.collectives import all_or_raise, require_same_on_all
from automodel_conv.distributed.holders import checksums_of_parts, find_holders, refuse_unlike_replicas
from automodel_conv.distributed.placements import local_of, meshes_of
from automodel_conv.distributed.shared_folder import refuse_unshared
from automodel_conv.doors import door, keyword_options
from automodel_conv.dtypes import dtype_code
from automodel_conv.errors import UnsupportedError, kind_of, message, size_text
from automodel_conv.execution.adding import Additions, merge_bytes
from automodel_conv.execution.factors import KEPT_BYTES
from automodel_conv.execution.report_text import Report, Row, cost_rows, count_row, memory_row, phase_rows
from automodel_conv.execution.tensor_slabs import LocalTensor, TensorSlabs, tensor_slabs
from automodel_conv.execution.writing import ScratchSplit, SlabGroup, split_scratch, write_slabs
from automodel_conv.files.checkpoint import open_checkpoint, open_source
from automodel_conv.files.source_options import SourceOptions, SourceSettings
from automodel_conv.files.staging import staged_path
from automodel_conv.files.uploads.folder_by_path import folder_of
from automodel_conv.files.uploads.output_folders import OutputFolder
from automodel_conv.lora.adapter import Adapter
from automodel_conv.lora.forms import PER_EXPERT, TRANSFORMERS
from automodel_conv.lora.merging import Merge, plan_merge
from automodel_conv.lora.peft_models import base_and_adapters, base_in_memory, published_base
from automodel_conv.lora.writing import write_reformed
from automodel_conv.planning.kept_codes import refuse_codes_without_scales
from automodel_conv.planning.names import plain_tensors
from automodel_conv.planning.quantization import arranged_plan
from automodel_conv.planning.sharding import region_of
from automodel_conv.progress import phases
from automodel_conv.publishing.carrying import carried_from
from automodel_conv.publishing.save_files import begin_save, commit_save, create_files, finish_files
from automodel_conv.publishing.saved import (
    not_saved,
    places_in,
    refuse_unlike_stored,
    saved_tensors,
    shards_for,
    with_dtype,
)
from automodel_conv.types import LayoutName, SavedAdapter
from automodel_conv.upstream.given_dtypes import dtype_to_save
from automodel_conv.upstream.given_rules import given_rules
from automodel_conv.upstream.models import state_table
from automodel_conv.upstream.wrappers import plain_model

_LOG = logging.getLogger(__name__)

DEFAULT_SCRATCH_BYTES = 64 << 20


@dataclass(frozen=True, repr=False)
class SaveReport(Report):
    """The outcome of ``save_checkpoint``; ``print`` shows it.

    Attributes:
        files: names of the weight files, in the order of their numbers.
        bytes_written: total size of the weight files in bytes.
        carried: names of the tensors of ``carry`` that were written unchanged.
        left_out: names of tensors of the model, of ``reference`` and of ``carry`` that are not in the new files in any
            form.
        seconds: duration of the save.
        phases: seconds of each phase: "plan", "write", and "finish" (checksums, uploads that were waited for, other
            files). Together they are ``seconds``. Nothing if only an adapter was saved.
        peak_extra_bytes: bound of the memory used in addition to the tensors; on a device, of pinned and of device
            memory separately.

    Example:
        >>> import torch
        >>> from automodel_conv import save_checkpoint
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as directory:
        ...     report = save_checkpoint({"a": torch.ones(2, 3)}, directory, rules=[])
        >>> report.files, report.left_out
        (('model.safetensors',), ())
    """

    files: tuple[str, ...]
    bytes_written: int
    carried: tuple[str, ...]
    left_out: tuple[str, ...]
    seconds: float
    peak_extra_bytes: int
    phases: Mapping[str, float] = field(default_factory=dict)

    @property
    def gb_per_s(self) -> float:
        """10^9 bytes written per second of the write phase."""
        return self.bytes_written / 1e9 / max(self.phases.get("write", self.seconds), 1e-9)

    def _rows(self) -> list[Row]:
        return [
            Row("files", str(len(self.files))),
            *cost_rows("written", self.bytes_written, self.gb_per_s),
            Row("seconds", f"{self.seconds:.3f}"),
            *phase_rows(self.phases),
            memory_row(self.peak_extra_bytes),
            count_row("carried as they are", self.carried),
            count_row("left out", self.left_out),
        ]


@door("saving")
@keyword_options(SourceOptions, SourceSettings)
def save_checkpoint(
    model_or_state_dict: nn.Module | Mapping[str, Tensor],
    directory: str | os.PathLike[str],
    *,
    rules: Iterable[Any] | None = None,
    layout: LayoutName | None = None,
    reference: str | os.PathLike[str] | None = None,
    carry: str | os.PathLike[str] | None = None,
    dtype: torch.dtype | str | None = None,
    max_shard_size: int | str = "5GB",
    checksums: bool = False,
    adapter: SavedAdapter | None = None,
    threads: int | None = None,
    scratch_bytes: int | None = None,
    progress: bool = False,
    **options: Unpack[SourceOptions],
) -> SaveReport:
    """Write a checkpoint under its published names, straight from a model, or from a state dict with ``rules``.

    The result is what ``save_pretrained`` would write: the same names, shapes and bytes, tied weights once, and the
    config of a model. With only ``layout``, a state dict keeps its experts grouped, in the layout of transformers. No
    converted copy of the model is created; tensors on a GPU pass through pinned memory. At the end the directory is a
    complete checkpoint. If writing fails, all of its files are removed.

    With DTensors, all ranks must call this function, on a file system that they share, and each writes its own parts.
    Plain tensors and buffers next to DTensors belong to all ranks and must be equal on all of them. Without DTensors,
    each rank saves for itself, to a directory of its own.

    To compare replicas, each rank computes a checksum of everything that other ranks hold too: all plain tensors, the
    rank's shards with HSDP, and no shards with FSDP2. Each of them is read once for this (CRC32, about 2 GB/s per
    thread; data on a GPU passes through host memory).

    Args:
        model_or_state_dict: a model, which torch may have wrapped (see ``compile_plan``), or its tensors by name. Names
            of a state dict are used without ``_orig_mod``, unless ``rules=[]`` keeps them. ``module.`` in front of all
            names stays, because only a model shows whether it belongs to them.
        directory: path of a directory that is new, or has no weights in it; or a URL, see ``convert_checkpoint``. Ranks
            that save to a URL must share the folder in which files wait for their upload, as ranks of one node do.
        rules: rule objects of transformers; they are reversed. None: the model's own rules. ``[]``: keep the names. A
            state dict needs ``rules``, ``layout`` or ``reference``; only ``rules`` split its grouped experts.
        layout: layout of the experts in the model or state dict: "transformers", "nemo", "gpt_oss" or "vllm". None: the
            layout of the model's own parameters.
        reference: path, URL or repository of a checkpoint; see ``open_checkpoint``. Its names, and its division into
            files, are restored. To split grouped experts of a state dict, pass ``rules`` too.
        carry: the checkpoint that the model comes from, see ``open_checkpoint``. Its tensors that the model has no
            place for, such as layers for multi-token prediction and draft heads, are written byte for byte under their
            own names.
            Quantized ones are decoded, unless the tensors to save are codes themselves. With a state dict, these
            are all tensors of that checkpoint from which no tensor of the state dict is built. So the state dict must
            contain all names of tied tensors, not only one of them.
        dtype: dtype of all floating-point tensors, except those that a transformers model keeps in float32: a dtype of
            torch, its name ("bfloat16"), or "auto", the dtype that the config of the model states, or else that of the
            first floating-point tensor. Codes and their scales are not cast. None: the dtypes that they have.
        max_shard_size: bound of the tensor data in a file, in bytes or as in "5GB". Not used with ``reference``.
        checksums: write a checksum of each tensor next to the index, for ``verify=True`` of the loaders and for
            ``verify`` of the command line. This reads the files once more.
        adapter: what to save of a model that PEFT has put adapters (LoRA) into, or of a transformers model with
            adapters. "merged": the merged model, each weight as ``W + scale * B @ A``, computed in float32 and rounded
            once; the model itself does not change. "only": the adapter alone, in the form "per_expert" of
            ``convert_adapter``. "fused": the adapter alone, in the form "transformers", as PEFT loads it. The active
            adapter is saved; several are merged together. None: it is an error if the model has adapters.
        threads: number of threads that copy and write. None: the number of cores, at most 16.
        scratch_bytes: bound of the memory used in addition to the tensors, in bytes. None: 64 MiB.
        progress: show a progress bar in bytes and GB/s.
        **options: see ``SourceOptions``. They are for ``reference`` and ``carry``; ``storage_options`` and ``token``
            are for ``directory`` too.

    Returns:
        A ``SaveReport``: names of the files, tensors that were carried and left out, bytes, seconds and memory.

    Raises:
        NameProblems: the tensors do not fit ``reference`` or the rules. As for all errors except WriteError, nothing
            has been written.
        CoverageError: the tensors provide only a part of a tensor of ``reference``; or they have fewer experts than the
            model's config states (in a state dict, than the router has rows), as the tensors of one rank of manual
            expert parallelism do; or the ranks do not hold all of a DTensor, or divide it in different ways.
        UnsupportedError: the tensors cannot be saved: they are offloaded, quantized by transformers, or lazily
            conjugated or negated, or the model has PEFT adapters and ``adapter`` is None, or it has flat FSDP1
            parameters; or extra state is not a
            tensor; or grouped experts have names that the rules do not match; or ``carry`` has other experts, or the
            same ones in a form that the rules do not read; or codes would be separated from their scales.
        DestinationError: the directory holds a checkpoint already, or another process writes to it.
        WriteError: the disk is full, or the system reports another error.
        ConversionError: the system has no more memory or threads.
        RankError: saving DTensors failed on another rank, a rank no longer responds, or ranks hold different tensors or
            different bytes of a tensor that should be equal. All ranks raise the same error.

    Example:
        >>> import torch
        >>> from safetensors.torch import load_file
        >>> from tempfile import TemporaryDirectory
        >>> model = torch.nn.Linear(3, 2)
        >>> with TemporaryDirectory() as directory:
        ...     report = save_checkpoint(model, directory, dtype=torch.bfloat16)
        ...     tensors = load_file(f"{directory}/{report.files[0]}")
        >>> sorted(tensors), tensors["bias"].dtype
        (['bias', 'weight'], torch.bfloat16)
    """
    began = time.perf_counter()
    settings = SourceSettings(**options)
    rules = given_rules(rules)
    adapters: tuple[Adapter, ...] = ()
    if adapter is not None:
        form = _form_of(adapter)
        model, adapters = base_and_adapters(model_or_state_dict)
        if form is not None:
            return _save_adapter(model, adapters, folder_of(directory, settings), form, progress, began)
    else:
        model = plain_model(model_or_state_dict) if isinstance(model_or_state_dict, nn.Module) else None
    state = model.state_dict() if model is not None else model_or_state_dict
    if not isinstance(state, Mapping):
        raise UnsupportedError(message("neither a model nor a state dict", found=kind_of(state)))
    groups = [dist.group.WORLD] if meshes_of(state.values()) else []
    with all_or_raise(groups, "planning what to save"):
        folder = folder_of(directory, settings)
        if model is None and rules is None and layout is None and reference is None:
            raise UnsupportedError(
                message(
                    "a state dict does not determine the rules that take its experts apart",
                    do="pass the model, rules= or layout=; reference= restores the names and files of a checkpoint, "
                    "with rules= if experts are grouped; rules=[] keeps all names",
                )
            )
        keeps_names = model is None and not rules and layout is None and reference is None
        saved = saved_tensors(model) if model is not None else state
        tensors = saved if keeps_names or model is not None else plain_tensors(saved)
        refuse_unlike_stored(tensors)
        opened = None if reference is None else open_checkpoint(reference, **settings.shared(reference).source())
        plan = saving_plan(state_table(tensors), model=model, rules=rules, layout=layout, reference=opened)
        refuse_codes_without_scales(plan)
        merge = None
        if model is not None and adapters:
            base = base_in_memory(model, plan)
            merge = plan_merge(arranged_plan(base.table), adapters, base)
        cast_to = dtype_to_save(dtype, model, tensors.values())
        plan = with_dtype(plan, cast_to, model, rules)
        source = None if carry is None else open_source(carry, settings.shared(carry))
        code = None if cast_to is None else dtype_code(cast_to)
        carried = None if source is None else carried_from(source, plan, model, rules, layout, code)
        targets = plan.targets if carried is None else (*plan.targets, *carried.targets)
        stored_layout = getattr(state, "layout", None) if model is None and layout is None and not rules else None
        naming = naming_of_save(plan, model, layout, opened, stored_layout)
        shards = shards_for(targets, opened, max_shard_size, naming)
        scratch = DEFAULT_SCRATCH_BYTES if scratch_bytes is None else scratch_bytes
        limits = split_scratch(threads, scratch, reads_files=carried is not None)
        is_first = not groups or dist.get_rank() == 0
    names = json.dumps(sorted(tensors)).encode()
    require_same_on_all(groups, [names, *(shard.header for shard in shards)], "the tensors to be saved")
    with all_or_raise(groups, "planning what to save"):
        refuse_missing_experts({name: tensor.shape for name, tensor in tensors.items()}, model)
        regions = {name: region_of(tensor) for name, tensor in tensors.items()}
        parts = {name: local_of(tensor.detach()) for name, tensor in tensors.items()}
    holders = find_holders(groups, tensors, regions)
    with all_or_raise(groups, "comparing replicas"):
        shared = {name: parts[name] for name in holders.shared}
        own_checksums = checksums_of_parts(shared, limits.threads, limits.slab_bytes)
        local = {
            row: [LocalTensor(regions[name], parts[name])]
            for row, name in enumerate(tensors)
            if name in holders.written
        }
        places = places_in(shards, plan.targets)
        own_slabs = tensor_slabs(plan, local, places, most_bytes=limits.slab_bytes)
        additions = None if merge is None else Additions(plan.targets, places, *merge)
        carried_slabs = None
        if carried is not None and is_first:
            carried_slabs = carried.slabs(places_in(shards, carried.targets), limits)
    refuse_unlike_replicas(groups, holders, own_checksums)
    with ExitStack() as cleanup:
        with all_or_raise(groups, "starting the save"):
            destination = None
            if is_first:
                opening = folder.open(shards, None, index_name=naming.index_name)
                destination = cleanup.enter_context(opening)
                begin_save(destination, [], model, cast_to)
        nbytes = sum(group.nbytes for group in own_slabs) + (0 if carried_slabs is None else carried_slabs.nbytes)
        numbers = {shard.name: file for file, shard in enumerate(shards)}
        uploaded = sum(shard.nbytes for shard in shards) if folder.is_remote and is_first else 0
        planned = time.perf_counter() - began
        with phases({"writing": nbytes, "uploading": uploaded}, progress) as bars:
            for batch in folder.batches(shards):
                with all_or_raise(groups, "starting the save"):
                    if destination is not None:
                        create_files(destination, batch)
                if folder.is_remote:
                    refuse_unshared(groups, staged_path(folder.directory, batch[0].name))
                with all_or_raise(groups, "saving"), bars.begin("writing") as advance:
                    for shard in batch:
                        file = numbers[shard.name]
                        slabs = _slabs_of(file, own_slabs, additions)
                        with nullcontext() if carried_slabs is None else carried_slabs.opened(file) as file_slabs:
                            slabs += [] if file_slabs is None else [file_slabs]
                            if any(group.slabs for group in slabs) or is_first:
                                write_slabs(slabs, staged_path(folder.directory, shard.name), limits.threads, advance)
                with all_or_raise(groups, "finishing the save"):
                    if destination is not None:
                        with bars.begin("uploading") as destination.on_upload:
                            finish_files(destination, batch, limits.threads if checksums else 0)
            with all_or_raise(groups, "finishing the save"):
                if destination is not None:
                    with bars.begin("uploading") as destination.on_upload:
                        commit_save(destination, shards, model, naming, limits.threads if checksums else 0)
    seconds = time.perf_counter() - began
    known = {"plan": planned, "write": bars.seconds["writing"]}
    report = SaveReport(
        files=tuple(shard.name for shard in shards),
        bytes_written=sum(shard.nbytes for shard in shards),
        carried=() if carried is None else carried.names,
        left_out=(
            *not_saved(model, opened, [target.name for target in targets]),
            *(() if carried is None else carried.left_out),
        ),
        seconds=seconds,
        phases={**known, "finish": seconds - sum(known.values())},
        peak_extra_bytes=limits.scratch_bytes
        + (0 if merge is None else _merge_bytes(merge, limits))
        + folder.upload_bytes,
    )
    _LOG.info("saved %s: %s in %.3f s", folder.name, size_text(report.bytes_written), report.seconds)
    return report


def _slabs_of(file: int, groups: Sequence[TensorSlabs], additions: Additions | None) -> list[SlabGroup]:
    """Return the slabs of a file from tensors."""
    return [
        SlabGroup(group.by_file.get(file, []), group.start if additions is None else additions.added(group.start))
        for group in groups
    ]


def _merge_bytes(merge: Merge, limits: ScratchSplit) -> int:
    """Return the bytes that a merge needs besides the scratch, with a copy of each thread's slab of unchanged bytes."""
    return merge_bytes(merge.factors, limits.threads) + limits.threads * limits.slab_bytes


_FORMS = {"merged": None, "only": PER_EXPERT, "fused": TRANSFORMERS}


def _form_of(adapter: str) -> str | None:
    """Return the form in which only the adapter is saved; None to merge it.

    Raises:
        UnsupportedError: there is no such way to save an adapter.
    """
    if adapter not in _FORMS:
        raise UnsupportedError(message(f"unknown adapter={adapter!r}", expected=f"one of {list(_FORMS)}"))
    return _FORMS[adapter]


def _save_adapter(
    model: nn.Module, adapters: Sequence[Adapter], folder: OutputFolder, form: str, progress: bool, began: float
) -> SaveReport:
    """Save only the adapter of a model, in a form.

    Args:
        model: the base model, without adapters.
        adapters: its active adapters.
        folder: the destination.
        form: name of the form.
        progress: whether to show a progress bar.
        began: time at which the save began.

    Raises:
        UnsupportedError: several adapters are active.
    """
    if len(adapters) != 1:
        found = [adapter.path for adapter in adapters]
        do = 'activate one with set_adapter(), or save {adapter="merged"}'
        raise UnsupportedError(message("only one adapter can be saved", expected="one active", found=found, do=do))
    written = write_reformed(adapters[0], published_base(model), folder, form, progress)
    return SaveReport(
        files=(written.shard.name,),
        bytes_written=written.shard.nbytes,
        carried=(),
        left_out=written.reformed.left_out,
        seconds=time.perf_counter() - began,
        peak_extra_bytes=KEPT_BYTES + folder.upload_bytes,
    )
