"""The front door for checkpoints on disk: from files to files, any layout to any other."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from automodel_conv.compiling.opening import while_importing
from automodel_conv.doors import door
from automodel_conv.errors import (
    DestinationError,
    ReadError,
    VerificationError,
    WriteError,
    listing,
    message,
)
from automodel_conv.execution.comparing import compare_file
from automodel_conv.execution.file_slabs import FileSlabs
from automodel_conv.execution.writing import (
    ScratchSplit,
    create_shard_file,
    split_scratch,
    write_slabs,
)
from automodel_conv.files import system
from automodel_conv.files.checkpoint import Checkpoint, open_downloaded
from automodel_conv.files.companions import companions_of
from automodel_conv.files.config import CONFIG_NAME, MODELOPT_NAME, plain_config
from automodel_conv.files.destination import open_destination
from automodel_conv.files.finished import is_finished
from automodel_conv.files.shards import index_of
from automodel_conv.files.source import Identity, LocalFile
from automodel_conv.files.staging import remove_remains
from automodel_conv.files.write_errors import write_errors
from automodel_conv.progress import bytes_progress
from automodel_conv.publishing.conversion import DEFAULT_SCRATCH_BYTES, Conversion, compile_conversion
from automodel_conv.publishing.save_files import write_checksums
from automodel_conv.publishing.saved import places_in


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
    """Tensors of the source that nothing was made of: dropped, unindexed, or scales of activations if decoded."""
    unindexed: tuple[tuple[str, str], ...]
    """Name and file of each tensor that was not read, since the index of the source does not give it to that file."""
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
    drop: str | Iterable[str] = (),
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
        drop: tensors to leave out, by their names in the source: a pattern, or several, with ``*`` for any text, ``?``
            for a character and ``[abc]`` for one of these, which match whole names ("mtp.*"). Codes that stay codes,
            and their scales, are dropped together or not at all, unless experts too keep their names and places.
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
    opened = open_downloaded(source, beside=True)
    with while_importing(opened) if rules is None else nullcontext():
        conversion = compile_conversion(
            opened,
            rules=rules,
            layout=layout,
            source_layout=source_layout,
            dtype=dtype,
            dequantize=dequantize,
            drop=drop,
            max_shard_size=max_shard_size,
        )
    checkpoint, shards = conversion.checkpoint, conversion.shards
    share = split_scratch(threads, DEFAULT_SCRATCH_BYTES if scratch_bytes is None else scratch_bytes, reads_files=True)
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
    if resume and system.real_path(directory) != system.real_path(checkpoint.directory):
        if is_finished(directory, shards, texts | of_index, copies, checksums):
            _compare_finished(conversion, directory, made, share, progress)
            remove_remains(directory)
            return ConvertReport(
                files=tuple(shard.name for shard in shards),
                bytes_written=0,
                files_resumed=len(shards),
                carried=conversion.carried,
                left_out=conversion.left_out,
                unindexed=checkpoint.unindexed,
                files_copied=(),
                seconds=time.perf_counter() - began,
                peak_extra_bytes=share.scratch_bytes,
                was_complete=True,
            )
    with open_destination(directory, shards, work, resume=resume, index_name=conversion.form.index_name) as place:
        unfinished = place.unfinished
        nbytes = sum(shard.nbytes for shard in shards if shard.name in unfinished)
        with write_errors(directory):
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
                    create_shard_file(shard, path)
                    with made.opened(file) as slabs:
                        write_slabs([slabs], path, share.threads, advance)
                if to_verify:
                    with made.opened(file) as slabs:
                        compare_file(slabs, LocalFile(place.found(shard.name)), shard, share.threads, advance)
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
        with write_errors(directory):
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
        unindexed=checkpoint.unindexed,
        files_copied=beside,
        seconds=time.perf_counter() - began,
        peak_extra_bytes=share.scratch_bytes,
    )


def _state_of(checkpoint: Checkpoint) -> dict[str, Identity]:
    """The identity of each file, by its path relative to the checkpoint's directory; it changes when the file does.

    Raises:
        ReadError: one is not there any more.
    """
    try:
        return {
            os.path.relpath(source.describe(), checkpoint.directory): source.identity() for source in checkpoint.sources
        }
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
        beside = companions_of(checkpoint.directory, destination)
    except OSError as error:
        text = message("cannot look at what lies beside the weights", where=checkpoint.directory, found=error)
        raise ReadError(text) from error
    return tuple(name for name in beside if not (dequantize and name == MODELOPT_NAME))


def _compare_finished(
    conversion: Conversion, directory: str, made: FileSlabs, share: ScratchSplit, progress: bool
) -> None:
    """Compare all that lies in a directory with what the conversion makes.

    Raises:
        DestinationError: it is something else.
    """
    with bytes_progress(conversion.plan.bytes_written, "verifying", progress) as advance:
        for file, shard in enumerate(conversion.shards):
            with made.opened(file) as slabs:
                try:
                    source = LocalFile(os.path.join(directory, shard.name))
                    compare_file(slabs, source, shard, share.threads, advance)
                except VerificationError as error:
                    raise DestinationError(
                        message(
                            "the directory holds a checkpoint already, which is not what this conversion makes",
                            where=directory,
                            found=str(error).partition("\n")[0],
                            do="choose another directory, or remove these files first",
                        )
                    ) from error
