"""The front doors for checkpoints on disk: from files to files, any layout to any other, and whether it went well."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from math import prod
from typing import Any

import numpy as np
import torch
from torch import nn

from automodel_conv.dtypes import itemsize
from automodel_conv.errors import (
    DestinationError,
    ReadError,
    UnsupportedError,
    VerificationError,
    WriteError,
    listing,
    message,
    resources_told,
)
from automodel_conv.execution.reading import OpenFiles
from automodel_conv.execution.slabs import Slab, slab_schedule
from automodel_conv.execution.writing import (
    Budget,
    Maker,
    SourceFiles,
    begin_shard,
    budget,
    compare_slabs,
    jobs_of,
    write_slabs,
)
from automodel_conv.files import system
from automodel_conv.files.checkpoint import Checkpoint, open_checkpoint, rows_by_file
from automodel_conv.files.config import CONFIG_NAME, plain_config
from automodel_conv.files.destination import WEIGHT_SUFFIXES, open_destination, telling
from automodel_conv.files.shards import CHECKSUMS_NAME, Form, Shard, Spec, divide, index_of, parse_size
from automodel_conv.loading import decoded_table
from automodel_conv.planning.copies import Decode, SourceTable
from automodel_conv.planning.from_config import meta_model
from automodel_conv.planning.layouts import PER_EXPERT, any_experts
from automodel_conv.planning.marks import form_of_conversion, layout_to_read, stated_layout
from automodel_conv.planning.models import checked_dtype
from automodel_conv.planning.pipeline import loading_plan, saving_plan, without_casts
from automodel_conv.planning.plan import CopyPlan
from automodel_conv.planning.quantization import has_codes
from automodel_conv.planning.unmarked import not_taken_apart
from automodel_conv.progress import bytes_progress
from automodel_conv.saving import places_in, specs_of, with_dtype, write_checksums

DEFAULT_SCRATCH_BYTES = 256 << 20


@dataclass(frozen=True)
class Conversion:
    """A conversion from files to files, planned from headers alone."""

    checkpoint: Checkpoint
    plan: CopyPlan
    shards: tuple[Shard, ...]
    form: Form

    @property
    def left_out(self) -> tuple[str, ...]:
        """Tensors of the source that nothing is made of, such as those that the model says it ignores."""
        used = self.plan.used_sources | self.plan.sources.hidden
        return tuple(name for row, name in enumerate(self.checkpoint.names) if row not in used)

    @property
    def bytes_needed(self) -> int:
        """Room on the disk that the weights take."""
        return sum(shard.nbytes for shard in self.shards)


@dataclass(frozen=True)
class ConvertReport:
    """What a conversion did."""

    files: tuple[str, ...]
    """Names of the weight files."""
    bytes_written: int
    """In this call; files that an earlier one had finished are not counted."""
    files_resumed: int
    """Files that an earlier call had finished."""
    left_out: tuple[str, ...]
    """Tensors of the source that nothing was made of."""
    seconds: float
    peak_extra_bytes: int
    """Bound of the memory used."""

    @property
    def gb_per_s(self) -> float:
        return self.bytes_written / self.seconds / 1e9 if self.seconds else 0.0


def compile_conversion(
    source: str | os.PathLike[str],
    *,
    rules: Iterable[Any] | None = None,
    layout: str | None = None,
    source_layout: str | None = None,
    dtype: torch.dtype | None = None,
    dequantize: bool = False,
    max_shard_size: int | str = "5GB",
) -> Conversion:
    """What ``convert_checkpoint`` would do; reads no more than ``compile_plan``. See there."""
    checked_dtype(dtype)
    checkpoint = open_checkpoint(source)
    most_bytes = parse_size(max_shard_size)
    rules = None if rules is None else list(rules)
    keeps_names = layout is None and source_layout is None and rules == []
    source_layout = layout_to_read(checkpoint, source_layout, keeps_names=keeps_names)
    table = decoded_table(checkpoint, wants_numbers=True) if dequantize else SourceTable.of(checkpoint)
    model = meta_model(checkpoint, dtype) if rules is None else None
    # Codes of experts that lie one by one stay as they are: no model takes them, and nothing is taken apart.
    are_codes = not dequantize and has_codes(table) is not None
    stay = layout == PER_EXPERT and are_codes and not any(map(any_experts, table.names))
    plan, problems = loading_plan(
        table,
        model=None if stay else model,
        rules=[] if stay else rules,
        layout=None if layout == PER_EXPERT else layout,
        source_layout=source_layout,
        dtype=None if model is not None else dtype,
    )
    problems.raise_unless_fit(checkpoint.path)
    if layout == PER_EXPERT:
        given = None if source_layout == PER_EXPERT else source_layout
        back = saving_plan(table, model=model, rules=rules, layout=given, checked=True)
        plan = with_dtype(back, dtype, model, rules)
        _refuse_grouped(plan, model)
    elif dtype is None:
        plan = without_casts(plan)
    if plan.fallbacks:
        raise UnsupportedError(
            message(
                f"{len(plan.fallbacks)} tensors can only be made by transformers' own code, which needs them in memory",
                found="\n" + listing(plan.fallbacks),
                do="load the model and save it",
            )
        )
    if keeps_names:
        layout = stated_layout(checkpoint, None)
    elif layout is None and model is None and source_layout is not None:
        layout = PER_EXPERT if source_layout == PER_EXPERT else "transformers"  # what rules are given
    form = form_of_conversion(checkpoint, plan, model, layout)
    return Conversion(checkpoint, plan, tuple(divide(specs_of(plan.targets), most_bytes, form)), form)


@resources_told("converting")
def convert_checkpoint(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    rules: Iterable[Any] | None = None,
    layout: str | None = None,
    source_layout: str | None = None,
    dtype: torch.dtype | None = None,
    dequantize: bool = False,
    max_shard_size: int | str = "5GB",
    resume: bool = True,
    verify: bool = True,
    checksums: bool = False,
    threads: int | None = None,
    scratch_bytes: int | None = None,
    progress: bool = False,
) -> ConvertReport:
    """Write a checkpoint anew with its experts in another layout, from file to file in bounded memory.

    Bytes that only move are copied by the kernel where the file system can. ``config.json``, the tokenizer and what
    else lies in the checkpoint's directory is copied too, but for folders, hidden files, other weights and what
    trainers keep (``.bin``, ``.pt``, ``.pth``); nothing, if the source is one file. The destination is a checkpoint at
    the end or not at all: until then all is in a folder of its own there, and after a crash or an error the same call
    goes on with the files that are not finished yet.

    Args:
        destination: a directory, new or without weights in it.
        rules: transformers' rule objects; None: those of the model that ``config.json`` names. An empty list keeps all
            names, for a change of layout, dtype or file size alone.
        layout: how routed experts shall lie: "transformers", "nemo", "gpt_oss", "vllm", or "per_expert", as
            ``save_pretrained`` writes them; None: as the model has them. The files say which. If transformers does not
            load that layout of this type, their names begin with it (``nemo-00001-of-00004.safetensors``), so that
            ``from_pretrained`` refuses the directory; ``open_checkpoint`` and all that read here find it.
        source_layout: see ``compile_plan``. With an empty list of rules and no layout, experts become "transformers".
        dtype: of all floating tensors, but those that a transformers model keeps in float32; None: as they are.
        dequantize: decode what ``quantization_config`` in ``config.json`` says is quantized, to ``dtype`` or bfloat16,
            and leave that setting out of the new ``config.json``. False: codes and scales are tensors as others are.
        max_shard_size: of a file's data, in bytes or as "5GB".
        resume: go on with what an earlier call has finished; False: throw that away.
        verify: read each file back once it is written and compare all of it with the source, also those that an earlier
            call has finished without; what is read may come from the system's cache of the disk.
        checksums: see ``save_checkpoint``.
        threads: None: as many as there are cores, at most 16.
        scratch_bytes: bound of the memory used; None: 256 MiB.
        progress: show a bar in bytes, GB/s and time left.

    Raises:
        CheckpointError, NameProblems, UnsupportedError: the source is broken, does not fit its model, or cannot be
            converted; nothing has been written then.
        DestinationError: the destination holds a checkpoint already, somebody else writes to it, it holds an unfinished
            work of another kind, or the source has changed.
        ReadError, WriteError: reading or writing failed, a full disk among other reasons.
        VerificationError: a file is not what was written.
        ConversionError: the system gives no more memory or threads; the work can be gone on with.
    """
    began = time.perf_counter()
    conversion = compile_conversion(
        source,
        rules=rules,
        layout=layout,
        source_layout=source_layout,
        dtype=dtype,
        dequantize=dequantize,
        max_shard_size=max_shard_size,
    )
    checkpoint, shards = conversion.checkpoint, conversion.shards
    share = budget(threads, DEFAULT_SCRATCH_BYTES if scratch_bytes is None else scratch_bytes, reads_files=True)
    directory = os.path.abspath(os.fsdecode(destination))
    state = _state_of(checkpoint)
    config = plain_config(checkpoint.directory) if dequantize else None
    work = {"source files": state, "tensors": _digest(conversion), "files": [shard.name for shard in shards]}
    targets = [target for target in conversion.plan.targets if prod(target.shape)]
    decodes = conversion.plan.sources.decodes
    places = places_in(shards, targets)
    made = slab_schedule(targets, [t.copies for t in targets], checkpoint, places, decodes, most_bytes=share.slab_bytes)
    by_file = made.by_file()
    with open_destination(directory, shards, work, resume=resume, index_name=conversion.form.index_name) as place:
        unfinished = place.unfinished
        nbytes = sum(shard.nbytes for shard in shards if shard.name in unfinished)
        with telling(directory):
            free = system.free_bytes(directory)
        if free < nbytes:
            wanted = f"{nbytes} bytes for {len(unfinished)} files"
            raise WriteError(message("the disk has too little room", where=directory, expected=wanted, found=free))
        passes = [(shard.name in unfinished) + (verify and shard.name not in place.verified) for shard in shards]
        data_bytes = sum(
            count * spec.nbytes for shard, count in zip(shards, passes, strict=True) for spec in shard.specs
        )
        with bytes_progress(data_bytes, "converting", progress) as advance:
            for file, shard in enumerate(shards):
                slabs = by_file.get(file, [])
                to_write, to_verify = shard.name in unfinished, verify and shard.name not in place.verified
                if to_write:
                    path = place.path(shard.name)
                    begin_shard(shard, path)
                    with _Makers(checkpoint, slabs, decodes, made.dtypes, share) as start:
                        write_slabs([(slabs, start)], path, share.threads, advance)
                if to_verify:
                    with _Makers(checkpoint, slabs, decodes, made.dtypes, share) as start:
                        _compare(slabs, place.found(shard.name), shard, start, share.threads, advance)
                if to_write or to_verify:
                    place.finish(shard, verified=verify)
        now = _state_of(checkpoint)
        if now != state:
            raise DestinationError(
                message(
                    "the source was changed while it was converted",
                    where=checkpoint.directory,
                    found="\n" + listing(name for name in state if now[name] != state[name]),
                    do="start again with resume=False (--no-resume)",
                )
            )
        with telling(directory):
            for name in _beside_weights(checkpoint):
                if name == CONFIG_NAME and config is not None:
                    place.write(name, config)
                else:
                    system.copy_file(os.path.join(checkpoint.directory, name), place.path(name))
        if checksums:
            write_checksums(place, shards, share.threads)
        place.commit(index_of(shards, form=conversion.form))
    return ConvertReport(
        tuple(shard.name for shard in shards),
        nbytes,
        len(shards) - len(unfinished),
        conversion.left_out,
        time.perf_counter() - began,
        share.scratch_bytes,
    )


@resources_told("verifying")
def verify_checkpoint(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    rules: Iterable[Any] | None = None,
    layout: str | None = None,
    source_layout: str | None = None,
    dtype: torch.dtype | None = None,
    dequantize: bool = False,
    threads: int | None = None,
    scratch_bytes: int | None = None,
    progress: bool = False,
) -> int:
    """Check that a checkpoint is, bit for bit, what ``convert_checkpoint`` would make of another one.

    Without ``layout``, the layout that the files of the destination name is taken; without rules and any layout, two
    checkpoints with the same names are compared as they are.

    Args:
        source, destination: the two checkpoints; which files their tensors lie in does not matter.
        rules, layout, source_layout, dtype, dequantize, threads, scratch_bytes, progress: see ``convert_checkpoint``.

    Returns:
        The bytes that were compared: all of the destination's tensors.

    Raises:
        VerificationError: they differ; names the tensors, or the first element that does.
        CheckpointError, NameProblems, UnsupportedError, ReadError: see ``convert_checkpoint``.
    """
    other = open_checkpoint(destination)
    if layout is None and rules is None:
        said = stated_layout(other, None)
        as_they_are = source_layout is None and dtype is None and _is_alike(open_checkpoint(source), other, said)
        layout, rules = (None, []) if as_they_are else (said, None)
    conversion = compile_conversion(
        source, rules=rules, layout=layout, source_layout=source_layout, dtype=dtype, dequantize=dequantize
    )
    checkpoint, plan = conversion.checkpoint, conversion.plan
    _compare_headers(plan, other)
    share = budget(threads, DEFAULT_SCRATCH_BYTES if scratch_bytes is None else scratch_bytes, reads_files=True)
    targets = [target for target in plan.targets if prod(target.shape)]
    rows = [other.position[target.name] for target in targets]
    places = [(other.file_ids[row], other.offsets[row]) for row in rows]
    decodes = plan.sources.decodes
    made = slab_schedule(targets, [t.copies for t in targets], checkpoint, places, decodes, most_bytes=share.slab_bytes)
    with bytes_progress(plan.bytes_written, "verifying", progress) as advance:
        rows = rows_by_file(other)
        for file, slabs in made.by_file().items():
            path = other.files[file]
            with _Makers(checkpoint, slabs, decodes, made.dtypes, share) as start:
                _compare(slabs, path, _file_of(other, file, rows[file]), start, share.threads, advance)
    return plan.bytes_written


# --- private ----------------------------------------------------------------------------------------------------------


def _is_alike(source: Checkpoint, other: Checkpoint, said: str | None) -> bool:
    """Whether two checkpoints have the same names, and the other one says nothing else of its experts."""
    return said in (None, stated_layout(source, None)) and set(source.names) == set(other.names)


def _refuse_grouped(plan: CopyPlan, model: nn.Module | None) -> None:
    """Raise UnsupportedError for experts that no rule takes apart, where no model says that they are published so."""
    left = [] if model is not None else [target.name for target in plan.targets if any_experts(target.name)]
    if left:
        do = "leave rules out to take those of the model, or leave layout out to keep the experts grouped"
        raise not_taken_apart(left, do)


class _Makers:
    """Files that are open while slabs are made of them; gives what starts a maker in a thread."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        slabs: Sequence[Slab],
        decodes: Mapping[int, Decode],
        dtypes: Sequence[str],
        share: Budget,
    ):
        jobs = jobs_of(slabs, checkpoint, decodes, share.input_bytes)
        self._files = OpenFiles(checkpoint.files, chain.from_iterable(jobs.values()))
        self._start = lambda: SourceFiles(checkpoint, self._files, jobs, dtypes, share.slab_bytes, share.input_bytes)

    def __enter__(self) -> Callable[[], Maker]:
        return self._start

    def __exit__(self, *error: object) -> None:
        self._files.close()


def _state_of(checkpoint: Checkpoint) -> dict[str, tuple[int, int]]:
    """What tells whether the files were changed.

    Raises:
        ReadError: one is not there any more.
    """
    try:
        return {os.path.basename(path): system.identity(path) for path in checkpoint.files}
    except OSError as error:
        raise ReadError(message("cannot look at the source", where=checkpoint.directory, found=error)) from error


def _digest(conversion: Conversion) -> str:
    """What tells whether two conversions make the same bytes of the same sources."""
    headers = [shard.header for shard in conversion.shards]
    return hashlib.blake2b(conversion.plan.to_json().encode() + b"".join(headers), digest_size=16).hexdigest()


def _beside_weights(checkpoint: Checkpoint) -> list[str]:
    """Names of the files that go with the weights: configs, tokenizers, code; none beside one file among others."""
    directory = checkpoint.directory
    if checkpoint.path.endswith(".safetensors") and system.is_file(checkpoint.path):
        return []
    names = [name for name in system.list_names(directory) if not name.startswith(".")]
    others = [name for name in names if not name.endswith((*WEIGHT_SUFFIXES, CHECKSUMS_NAME))]
    return [name for name in others if system.is_file(os.path.join(directory, name))]


def _compare_headers(plan: CopyPlan, other: Checkpoint) -> None:
    wanted = {target.name: f"{target.dtype} {list(target.shape)}" for target in plan.targets}
    rows = zip(other.names, other.dtypes, other.shapes, strict=True)
    found = {name: f"{dtype} {list(shape)}" for name, dtype, shape in rows}
    lines = [f"{name}: missing" for name in wanted if name not in found]
    lines += [f"{name}: not in the source" for name in found if name not in wanted]
    both = wanted.keys() & found.keys()
    lines += [f"{n}: {found[n]} instead of {wanted[n]}" for n in wanted if n in both and found[n] != wanted[n]]
    if lines:
        raise VerificationError(
            message(
                f"{len(lines)} tensors differ in name, dtype or shape",
                where=other.path,
                found="\n" + listing(lines),
                do="check which layouts the two checkpoints are in",
            )
        )


def _file_of(checkpoint: Checkpoint, file: int, rows: Sequence[int]) -> Shard:
    specs = [Spec(checkpoint.names[row], checkpoint.dtypes[row], checkpoint.shapes[row]) for row in rows]
    return Shard(checkpoint.files[file], b"", tuple(specs), tuple(checkpoint.offsets[row] for row in rows))


def _compare(
    slabs: Sequence[Slab],
    path: str,
    shard: Shard,
    start: Callable[[], Maker],
    threads: int,
    advance: Callable[[int], None],
) -> None:
    """Raise VerificationError for the first element of a file that is not what the slabs make."""
    at = compare_slabs(slabs, path, start, threads, advance)
    if at is None:
        return
    spec, begin = next(
        (spec, begin)
        for spec, begin in zip(shard.specs, shard.offsets, strict=True)
        if begin <= at < begin + spec.nbytes
    )
    element = (at - begin) // itemsize(spec.dtype)
    index = [int(i) for i in np.unravel_index(element, spec.shape or (1,))]
    raise VerificationError(
        message(
            f"{spec.name} is not what the source makes it",
            where=f"{path}, byte {at}",
            found=f"the first element that differs is {index} of {spec.dtype} {list(spec.shape)}",
            do="the file or the source was changed, or a disk or its memory is broken",
        )
    )
