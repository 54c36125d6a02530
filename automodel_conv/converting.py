"""The front doors for checkpoints on disk: from files to files, any layout to any other, and whether it went well."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from automodel_conv.doors import door
from automodel_conv.dtypes import dtype_code, itemsize
from automodel_conv.errors import (
    DestinationError,
    ReadError,
    UnsupportedError,
    VerificationError,
    WriteError,
    listing,
    message,
)
from automodel_conv.execution.file_slabs import FileSlabs
from automodel_conv.execution.slabs import Slab
from automodel_conv.execution.writing import (
    Budget,
    Maker,
    begin_shard,
    budget,
    compare_slabs,
    write_slabs,
)
from automodel_conv.files import system
from automodel_conv.files.beside import files_beside
from automodel_conv.files.checkpoint import Checkpoint, open_checkpoint, open_downloaded, rows_by_file
from automodel_conv.files.config import CONFIG_NAME, MODELOPT_NAME, plain_config, quantization
from automodel_conv.files.destination import open_destination, remove_remains, telling
from automodel_conv.files.finished import is_finished
from automodel_conv.files.shards import Form, Shard, Spec, divide, index_of, parse_size
from automodel_conv.loading import decoded_table, untold
from automodel_conv.planning.carrying import carried_targets, dropped_rows
from automodel_conv.planning.copies import SourceTable
from automodel_conv.planning.from_config import meta_model
from automodel_conv.planning.kept_codes import keep_codes
from automodel_conv.planning.layouts import PER_EXPERT, any_experts, get_layout
from automodel_conv.planning.marks import form_of_conversion, layout_to_read, stated_layout
from automodel_conv.planning.models import checked_dtype
from automodel_conv.planning.pipeline import loading_plan, saving_plan, without_casts
from automodel_conv.planning.plan import CopyPlan
from automodel_conv.planning.quantization import has_codes, quantized_table
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
    carried: tuple[str, ...]
    """Tensors of the source that the model has no place for, passed on as they are."""

    @property
    def left_out(self) -> tuple[str, ...]:
        """Tensors of the source that nothing is made of: those to be dropped, and scales of activations if decoded."""
        return tuple(self.checkpoint.names[row] for row in self.plan.unused_sources)

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
    carried: tuple[str, ...]
    """Tensors of the source that the model has no place for, passed on as they are."""
    left_out: tuple[str, ...]
    """Tensors of the source that nothing was made of: see ``drop``, and scales of activations if decoded."""
    files_copied: tuple[str, ...]
    """Paths of the files beside the weights that were copied, sorted, with "/" between folders."""
    seconds: float
    peak_extra_bytes: int
    """Bound of the memory used."""
    was_complete: bool = False
    """All was there already, was compared with the source, and nothing was written."""

    @property
    def gb_per_s(self) -> float:
        return self.bytes_written / self.seconds / 1e9 if self.seconds else 0.0


@door("planning")
def compile_conversion(
    source: Checkpoint | str | os.PathLike[str],
    *,
    rules: Iterable[Any] | None = None,
    layout: str | None = None,
    source_layout: str | None = None,
    dtype: torch.dtype | None = None,
    dequantize: bool = False,
    drop: Iterable[str] = (),
    max_shard_size: int | str = "5GB",
) -> Conversion:
    """What ``convert_checkpoint`` would do; reads no more than ``compile_plan``. See there."""
    checked_dtype(dtype)
    if layout not in (None, PER_EXPERT):
        get_layout(layout, PER_EXPERT)
    checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(source)
    most_bytes = parse_size(max_shard_size)
    rules = None if rules is None else list(rules)
    keeps_names = layout is None and source_layout is None and rules == []
    source_layout = layout_to_read(checkpoint, source_layout, keeps_names=keeps_names)
    table = decoded_table(checkpoint, wants_numbers=True) if dequantize else SourceTable.of(checkpoint)
    table = replace(table, hidden=table.hidden | dropped_rows(checkpoint.names, drop))
    model = meta_model(checkpoint, dtype) if rules is None else None
    # Codes of experts that lie one by one stay as they are: no model takes them, and nothing is taken apart.
    codes = None if dequantize else has_codes(table)
    stay = layout == PER_EXPERT and codes is not None and not any(map(any_experts, table.names))
    told = quantization(checkpoint.directory) if codes is not None and not stay and not keeps_names else None
    if codes is not None and told is None and not stay and rules != []:
        raise untold(codes, checkpoint)

    def made_of(
        sources: SourceTable, dtype: torch.dtype | None, *, unbound: bool = False
    ) -> tuple[CopyPlan, frozenset[int]]:
        """The plan, and the rows of what is carried."""
        plan, problems = loading_plan(
            sources,
            model=None if stay else model,
            rules=[] if stay else rules,
            layout=None if layout == PER_EXPERT else layout,
            source_layout=source_layout,
            dtype=None if model is not None else dtype,
            unbound=unbound,
        )
        carried = problems.set_aside()
        if not dequantize:
            carried |= plan.sources.hidden - sources.hidden  # of caches
        problems.raise_unless_fit(checkpoint.path, unindexed=checkpoint.unindexed)
        if layout == PER_EXPERT:
            given = None if source_layout == PER_EXPERT else source_layout
            taken = replace(plan.sources, hidden=plan.sources.hidden | carried)
            back = saving_plan(taken, model=model, rules=rules, layout=given, checked=True)
            return with_dtype(CopyPlan(plan.sources, back.targets, back.rules), dtype, model, rules), carried
        return (without_casts(plan) if dtype is None else plan), carried

    if told is None:
        plan, carried = made_of(table, dtype)
        table = replace(table, names=plan.sources.names)  # without what torch's wrappers add
    else:
        decoded = decoded_table(checkpoint, wants_numbers=True)
        decoded = replace(decoded, hidden=decoded.hidden | table.hidden)
        numbers, carried = made_of(decoded, dtype)
        carried |= {part for row in carried & decoded.decodes.keys() for part in decoded.decodes[row].parts}
        plan = keep_codes(
            replace(table, hidden=table.hidden | carried),
            decoded,
            numbers,
            lambda scales: made_of(scales, None, unbound=True)[0],
            lambda made: quantized_table(made, told.settings, where=told.path),
        )
    if layout == PER_EXPERT:
        _refuse_grouped(plan, model)
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
    further = carried_targets(table, carried, None if dtype is None else dtype_code(dtype), plan.targets)
    plan = CopyPlan(table, (*plan.targets, *further), plan.rules)
    shards = tuple(divide(specs_of(plan.targets), most_bytes, form))
    return Conversion(checkpoint, plan, shards, form, tuple(checkpoint.names[row] for row in sorted(carried)))


@door("converting")
def convert_checkpoint(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    rules: Iterable[Any] | None = None,
    layout: str | None = None,
    source_layout: str | None = None,
    dtype: torch.dtype | None = None,
    dequantize: bool = False,
    drop: Iterable[str] = (),
    max_shard_size: int | str = "5GB",
    resume: bool = True,
    verify: bool = True,
    checksums: bool = False,
    threads: int | None = None,
    scratch_bytes: int | None = None,
    progress: bool = False,
) -> ConvertReport:
    """Write a checkpoint anew with its experts in another layout, from file to file in bounded memory.

    Bytes that only move are copied by the kernel where the file system can. ``config.json``, the tokenizer, chat
    templates, code and all else that lies in the checkpoint's directory or its folders is copied too, and listed in the
    report. What is not: weights of any format, what trainers keep (``.bin``, ``.pt``, folders ``checkpoint-500``),
    hidden files and folders; nothing is, if the source is one file. The destination is a checkpoint at the end or not
    at all: until then all is in a folder of its own there, and after a crash or an error the same call goes on with the
    files that are not finished yet. Called once more after it is complete, it compares all that lies there with the
    source, and writes nothing.

    Tensors that the model has no place for, such as layers for multi-token prediction and draft heads, are carried
    along byte for byte under their own names, but decoded if ``dequantize`` is set.

    Args:
        source: a directory, an index file, one ``.safetensors`` file, or ``org/name`` on the Hub: what is not in the
            cache yet is downloaded first, all but weights that do not belong to the checkpoint.
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
            and leave that setting out of the new ``config.json``. False: codes and scales stay as they are, byte for
            byte. FP8 codes and their scales are grouped and laid out like their weights (``gate_up_proj_scale_inv``),
            where each block that shares a scale stays one: not where it would hold rows of gate and up, and, in a
            transposed layout, only where it is square. File names then begin with the layout, whichever it is.
        drop: tensors to leave out, by their names in the source: patterns with ``*`` for any text, ``?`` for a
            character and ``[abc]`` for one of these, which match whole names ("mtp.*").
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
        DestinationError: the destination holds another checkpoint already, somebody else writes to it, it holds an
            unfinished work of another kind, or the source has changed.
        ReadError, WriteError: reading or writing failed, a full disk among other reasons.
        VerificationError: a file is not what was written.
        ConversionError: the system gives no more memory or threads; the work can be gone on with.
    """
    began = time.perf_counter()
    conversion = compile_conversion(
        open_downloaded(source, beside=True),
        rules=rules,
        layout=layout,
        source_layout=source_layout,
        dtype=dtype,
        dequantize=dequantize,
        drop=drop,
        max_shard_size=max_shard_size,
    )
    checkpoint, shards = conversion.checkpoint, conversion.shards
    share = budget(threads, DEFAULT_SCRATCH_BYTES if scratch_bytes is None else scratch_bytes, reads_files=True)
    directory = os.path.abspath(os.fsdecode(destination))
    state = _state_of(checkpoint)
    config = plain_config(checkpoint.directory) if dequantize else None
    work = {"source files": state, "tensors": _digest(conversion), "files": [shard.name for shard in shards]}
    plan = conversion.plan
    made = FileSlabs(checkpoint, plan.targets, places_in(shards, plan.targets), plan.sources.decodes, share)
    texts = {} if config is None else {CONFIG_NAME: config}
    beside = _beside_weights(checkpoint, directory, dequantize)
    copies = {name: os.path.join(checkpoint.directory, *name.split("/")) for name in beside if name not in texts}
    index = index_of(shards, form=conversion.form)
    of_index = {} if index is None else {conversion.form.index_name: index}
    if resume and directory != checkpoint.directory:
        if is_finished(directory, shards, texts | of_index, copies, checksums):
            _compare_finished(conversion, directory, made, share, progress)
            remove_remains(directory)
            return ConvertReport(
                files=tuple(shard.name for shard in shards),
                bytes_written=0,
                files_resumed=len(shards),
                carried=conversion.carried,
                left_out=conversion.left_out,
                files_copied=(),
                seconds=time.perf_counter() - began,
                peak_extra_bytes=share.scratch_bytes,
                was_complete=True,
            )
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
                to_write, to_verify = shard.name in unfinished, verify and shard.name not in place.verified
                if to_write:
                    path = place.path(shard.name)
                    begin_shard(shard, path)
                    with made.opened(file) as slabs:
                        write_slabs([slabs], path, share.threads, advance)
                if to_verify:
                    with made.opened(file) as slabs:
                        _compare(slabs, place.found(shard.name), shard, share.threads, advance)
                if to_write or to_verify:
                    place.finish(shard, verified=verify)
        now = _state_of(checkpoint)
        if now != state:
            raise DestinationError(
                message(
                    "the source was changed while it was converted",
                    where=checkpoint.directory,
                    found="\n" + listing(name for name in state if now[name] != state[name]),
                    do="start again with {resume=False}",
                )
            )
        with telling(directory):
            for name, text in texts.items():
                place.write(name, text)
            for name, path in copies.items():
                system.copy_file(path, place.beside(name))
        if checksums:
            write_checksums(place, shards, share.threads)
        place.commit(index)
    return ConvertReport(
        files=tuple(shard.name for shard in shards),
        bytes_written=nbytes,
        files_resumed=len(shards) - len(unfinished),
        carried=conversion.carried,
        left_out=conversion.left_out,
        files_copied=beside,
        seconds=time.perf_counter() - began,
        peak_extra_bytes=share.scratch_bytes,
    )


@door("verifying")
def verify_checkpoint(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    rules: Iterable[Any] | None = None,
    layout: str | None = None,
    source_layout: str | None = None,
    dtype: torch.dtype | None = None,
    dequantize: bool = False,
    drop: Iterable[str] = (),
    threads: int | None = None,
    scratch_bytes: int | None = None,
    progress: bool = False,
) -> int:
    """Check that a checkpoint is, bit for bit, what ``convert_checkpoint`` would make of another one.

    Without ``layout``, the layout that the files of the destination name is taken; without rules and any layout, two
    checkpoints with the same names are compared as they are.

    Args:
        source, destination: the two checkpoints; which files their tensors lie in does not matter.
        rules, layout, source_layout, dtype, dequantize, drop, threads, scratch_bytes, progress: see
            ``convert_checkpoint``.

    Returns:
        The bytes that were compared: all of the destination's tensors.

    Raises:
        VerificationError: they differ; names the tensors, or the first element that does.
        CheckpointError, NameProblems, UnsupportedError, ReadError: see ``convert_checkpoint``.
    """
    drop = list(drop)
    checkpoint, other = open_downloaded(source), open_downloaded(destination)
    if layout is None and rules is None:
        said = stated_layout(other, None)
        keeps_all = source_layout is None and dtype is None and not drop
        as_they_are = keeps_all and _is_alike(checkpoint, other, said)
        layout, rules = (None, []) if as_they_are else (said, None)
    conversion = compile_conversion(
        checkpoint,
        rules=rules,
        layout=layout,
        source_layout=source_layout,
        dtype=dtype,
        dequantize=dequantize,
        drop=drop,
    )
    plan = conversion.plan
    _compare_headers(plan, other)
    share = budget(threads, DEFAULT_SCRATCH_BYTES if scratch_bytes is None else scratch_bytes, reads_files=True)
    at = [other.position[target.name] for target in plan.targets]
    places = [(other.file_ids[row], other.offsets[row]) for row in at]
    made = FileSlabs(checkpoint, plan.targets, places, plan.sources.decodes, share)
    with bytes_progress(plan.bytes_written, "verifying", progress) as advance:
        rows = rows_by_file(other)
        for file in made.by_file:
            with made.opened(file) as slabs:
                _compare(slabs, other.files[file], _file_of(other, file, rows[file]), share.threads, advance)
    return plan.bytes_written


# --- private ----------------------------------------------------------------------------------------------------------


def _is_alike(source: Checkpoint, other: Checkpoint, said: str | None) -> bool:
    """Whether two checkpoints have the same names, and the other one says nothing else of its experts."""
    return said in (None, stated_layout(source, None)) and set(source.names) == set(other.names)


def _refuse_grouped(plan: CopyPlan, model: nn.Module | None) -> None:
    """Raise UnsupportedError for experts that no rule takes apart, where no model says that they are published so."""
    left = [] if model is not None else [target.name for target in plan.targets if any_experts(target.name)]
    if left:
        do = ["leave {rules} out to take those of the model", "leave {layout} out to keep the experts grouped"]
        raise not_taken_apart(left, do)


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


def _beside_weights(checkpoint: Checkpoint, destination: str, dequantize: bool) -> tuple[str, ...]:
    """The files that go with the weights, but what says of decoded weights how to decode them; none beside one file."""
    if checkpoint.path.endswith(".safetensors") and system.is_file(checkpoint.path):
        return ()
    try:
        beside = files_beside(checkpoint.directory, destination)
    except OSError as error:
        text = message("cannot look at what lies beside the weights", where=checkpoint.directory, found=error)
        raise ReadError(text) from error
    return tuple(name for name in beside if not (dequantize and name == MODELOPT_NAME))


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


def _compare_finished(conversion: Conversion, directory: str, made: FileSlabs, share: Budget, progress: bool) -> None:
    """Compare all that lies in a directory with what the conversion makes.

    Raises:
        DestinationError: it is something else.
    """
    with bytes_progress(conversion.plan.bytes_written, "verifying", progress) as advance:
        for file, shard in enumerate(conversion.shards):
            with made.opened(file) as slabs:
                try:
                    _compare(slabs, os.path.join(directory, shard.name), shard, share.threads, advance)
                except VerificationError as error:
                    raise DestinationError(
                        message(
                            "the directory holds a checkpoint already, which is not what this conversion makes",
                            where=directory,
                            found=str(error).partition("\n")[0],
                            do="choose another directory, or remove these files first",
                        )
                    ) from error


def _compare(
    slabs: tuple[Sequence[Slab], Callable[[], Maker]],
    path: str,
    shard: Shard,
    threads: int,
    advance: Callable[[int], None],
) -> None:
    """Raise VerificationError for the first element of a file that is not what the slabs make."""
    at = compare_slabs(slabs[0], path, slabs[1], threads, advance)
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
