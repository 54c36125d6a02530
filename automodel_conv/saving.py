"""The front door of saving: a model or its tensors, grouped, straight to per-expert files."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from automodel_conv.compiling.experts import refuse_missing_experts
from automodel_conv.compiling.marks import form_of_save
from automodel_conv.compiling.to_checkpoint import saving_plan
from automodel_conv.distributed.collectives import all_or_raise, same_on_all
from automodel_conv.distributed.holders import checksums_of_parts, find_holders, refuse_unlike_replicas
from automodel_conv.distributed.placements import local_of, meshes_of
from automodel_conv.doors import door
from automodel_conv.dtypes import dtype_code
from automodel_conv.errors import UnsupportedError, kind_of, message
from automodel_conv.execution.tensor_slabs import LocalTensor, tensor_slabs
from automodel_conv.execution.writing import split_scratch, write_slabs
from automodel_conv.files.checkpoint import open_checkpoint, open_downloaded
from automodel_conv.files.destination import open_destination
from automodel_conv.files.staging import staged_path
from automodel_conv.planning.names import plain_tensors
from automodel_conv.planning.sharding import region_of
from automodel_conv.progress import bytes_progress
from automodel_conv.publishing.carrying import carried_from
from automodel_conv.publishing.save_files import begin_save, finish_save
from automodel_conv.publishing.saved import (
    not_saved,
    places_in,
    refuse_unlike_stored,
    saved_tensors,
    shards_for,
    with_dtype,
)
from automodel_conv.upstream.models import state_table
from automodel_conv.upstream.wrappers import plain_model

DEFAULT_SCRATCH_BYTES = 64 << 20


@dataclass(frozen=True)
class SaveReport:
    """What was written."""

    files: tuple[str, ...]
    """Names of the weight files, in the order of their numbers."""
    bytes_written: int
    carried: tuple[str, ...]
    """Tensors of ``carry`` that went to the new files as they are."""
    left_out: tuple[str, ...]
    """Tensors of the model, of ``reference`` and of ``carry`` that are not in the new files in any form."""
    seconds: float
    peak_extra_bytes: int
    """Bound of the memory used beside the tensors; on a device, of pinned memory and of the device's, each."""

    @property
    def gb_per_s(self) -> float:
        return self.bytes_written / self.seconds / 1e9 if self.seconds else 0.0


@door("saving")
def save_checkpoint(
    model_or_state_dict: nn.Module | Mapping[str, Tensor],
    directory: str | os.PathLike[str],
    *,
    rules: Iterable[Any] | None = None,
    layout: str | None = None,
    reference: str | os.PathLike[str] | None = None,
    carry: str | os.PathLike[str] | None = None,
    dtype: torch.dtype | None = None,
    max_shard_size: int | str = "5GB",
    checksums: bool = False,
    threads: int | None = None,
    scratch_bytes: int | None = None,
    progress: bool = False,
) -> SaveReport:
    """Write a checkpoint in its published, per-expert format, straight from the tensors of a model.

    What ``save_pretrained`` would write: the same names, shapes and bytes, tied weights once, the config besides. No
    converted copy of the model is made; tensors of a GPU go through pinned memory. The directory is a checkpoint at the
    end or not at all; if writing fails nothing of it stays. Where there are DTensors all ranks must call this, on a
    file system that they share: each writes its own parts. Plain tensors beside them are all ranks' and must be equal
    on all, buffers too. Where there is none, each rank saves for itself, to a directory of its own.

    What several ranks hold, replicas and plain tensors, each of them reads once for a checksum (CRC32, some 2 GB/s a
    thread; from a GPU through host memory): nothing in FSDP2, a rank's shard with HSDP, the whole of what is plain.

    Args:
        model_or_state_dict: the model may be wrapped, see ``compile_plan``; names of a state dict are taken without
            ``_orig_mod``, unless ``rules=[]`` keeps them. ``module.`` in front of all of them stays: only a model tells
            whether it is its own.
        directory: new, or without weights in it.
        rules, layout: see ``revert_state_dict``; for a state dict one of rules, layout, reference is needed, and
            ``rules=[]`` keeps its names.
        reference: a checkpoint whose names, and division into files, to restore. Grouped experts in a state dict take
            rules besides, to be taken apart.
        carry: the checkpoint that the model is from. Those of its tensors that the model has no place for, such as
            layers for multi-token prediction and draft heads, go to the new files byte for byte under their own names;
            quantized ones are decoded, unless the tensors to be saved are codes themselves. With a state dict, all go
            that make none of its tensors, so it must have both of two tied names.
        dtype: of all floating tensors, but those that a transformers model keeps in float32; None: as they are.
        max_shard_size: of a file's data, in bytes or as "5GB"; not used with a reference.
        checksums: write one for each tensor beside the index, for ``verify=True`` of the loaders and for ``verify`` of
            the command line; reads the files once more.
        threads: that copy and write; None: as many as there are cores, at most 16.
        scratch_bytes: bound of the memory used beside the tensors; None: 64 MiB.
        progress: show a bar in bytes and GB/s.

    Raises:
        NameProblems, CoverageError: see ``revert_state_dict``; like all but WriteError before anything is written.
            CoverageError too where tensors have fewer experts than the model's config says (or, in a state dict, the
            rows of the router), as those of one rank of expert parallelism by hand; and with DTensors where the ranks
            do not hold all of a tensor, or do not all divide it in the same way.
        UnsupportedError: tensors that cannot be saved from here: offloaded, quantized by transformers, with adapters of
            PEFT, kept flat by FSDP1, lazily conjugated or negated; or extra state that is not a tensor; or grouped
            experts that the rules are for, under names that these do not meet; or ``carry`` has other experts, or the
            same ones in a form that the rules do not read.
        DestinationError: the directory holds a checkpoint already, or somebody else writes to it.
        WriteError: the disk is full, or the system reports another error.
        ConversionError: the system gives no more memory or threads.
        RankError: with DTensors: saving failed on other ranks, one of them is gone, or they hold different tensors, or
            different bytes of one that they should all have; the same on all ranks.
    """
    began = time.perf_counter()
    rules = None if rules is None else list(rules)
    model = plain_model(model_or_state_dict) if isinstance(model_or_state_dict, nn.Module) else None
    state = model.state_dict() if model is not None else model_or_state_dict
    if not isinstance(state, Mapping):
        raise UnsupportedError(message("neither a model nor a state dict", found=kind_of(state)))
    groups = [dist.group.WORLD] if meshes_of(state.values()) else []
    with all_or_raise(groups, "planning what to save"):
        directory = os.path.abspath(os.fsdecode(directory))
        if model is None and rules is None and layout is None and reference is None:
            raise UnsupportedError(
                message(
                    "a state dict does not say how its experts are to be taken apart",
                    do="pass the model, rules=, layout= or reference=; rules=[] keeps all names",
                )
            )
        keeps_names = model is None and not rules and layout is None and reference is None
        named = saved_tensors(model) if model is not None else state
        tensors = named if keeps_names or model is not None else plain_tensors(named)
        refuse_unlike_stored(tensors)
        opened = None if reference is None else open_checkpoint(reference)
        plan = saving_plan(state_table(tensors), model=model, rules=rules, layout=layout, reference=opened)
        plan = with_dtype(plan, dtype, model, rules)
        source = None if carry is None else open_downloaded(carry)
        code = None if dtype is None else dtype_code(dtype)
        carried = None if source is None else carried_from(source, plan, model, rules, layout, code)
        targets = plan.targets if carried is None else (*plan.targets, *carried.targets)
        kept = getattr(state, "layout", None) if model is None and layout is None and not rules else None
        form = form_of_save(plan, model, layout, opened, kept)
        shards = shards_for(targets, opened, max_shard_size, form)
        most_scratch = DEFAULT_SCRATCH_BYTES if scratch_bytes is None else scratch_bytes
        share = split_scratch(threads, most_scratch, reads_files=carried is not None)
        leads = not groups or dist.get_rank() == 0
    names = json.dumps(sorted(tensors)).encode()
    same_on_all(groups, [names, *(shard.header for shard in shards)], "the tensors to be saved")
    with all_or_raise(groups, "planning what to save"):
        refuse_missing_experts({name: tensor.shape for name, tensor in tensors.items()}, model)
        regions = {name: region_of(tensor) for name, tensor in tensors.items()}
        parts = {name: local_of(tensor.detach()) for name, tensor in tensors.items()}
    holders = find_holders(groups, tensors, regions)
    with all_or_raise(groups, "comparing replicas"):
        shared = {name: parts[name] for name in holders.shared}
        sums = checksums_of_parts(shared, share.threads, share.slab_bytes)
        held = {
            row: [LocalTensor(regions[name], parts[name])]
            for row, name in enumerate(tensors)
            if name in holders.written
        }
        made = tensor_slabs(plan, held, places_in(shards, plan.targets), most_bytes=share.slab_bytes)
        passed = None
        if carried is not None and leads:
            passed = carried.slabs(places_in(shards, carried.targets), share)
    refuse_unlike_replicas(groups, holders, sums)
    with ExitStack() as ending:
        with all_or_raise(groups, "beginning to save"):
            destination = None
            if leads:
                opening = open_destination(directory, shards, None, index_name=form.index_name)
                destination = ending.enter_context(opening)
                begin_save(destination, shards, model, dtype)
        nbytes = sum(group.nbytes for group in made) + (0 if passed is None else passed.nbytes)
        with all_or_raise(groups, "saving"), bytes_progress(nbytes, "saving", progress) as advance:
            for file, shard in enumerate(shards):
                slabs = [(group.by_file.get(file, []), group.start) for group in made]
                with nullcontext() if passed is None else passed.opened(file) as of_files:
                    slabs += [] if of_files is None else [of_files]
                    if any(group for group, _ in slabs) or leads:
                        write_slabs(slabs, staged_path(directory, shard.name), share.threads, advance)
        with all_or_raise(groups, "ending the save"):
            if destination is not None:
                finish_save(destination, shards, model, form, share.threads if checksums else 0)
    return SaveReport(
        files=tuple(shard.name for shard in shards),
        bytes_written=sum(shard.nbytes for shard in shards),
        carried=() if carried is None else carried.names,
        left_out=(
            *not_saved(model, opened, [target.name for target in targets]),
            *(() if carried is None else carried.left_out),
        ),
        seconds=time.perf_counter() - began,
        peak_extra_bytes=share.scratch_bytes,
    )
