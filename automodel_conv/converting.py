"""The public function that converts checkpoints on disk: from files to files, from any layout to any other."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from automodel_conv.compiling.carrying import checked_patterns
from automodel_conv.compiling.opening import while_importing
from automodel_conv.doors import door
from automodel_conv.errors import (
    DestinationError,
    ReadError,
    VerificationError,
    listing,
    message,
)
from automodel_conv.execution.comparing import compare_file
from automodel_conv.execution.file_slabs import FileSlabs
from automodel_conv.execution.report_text import Row, cost_rows, count_row, memory_row, text_of
from automodel_conv.execution.writing import (
    ScratchSplit,
    create_shard_file,
    split_scratch,
    write_slabs,
)
from automodel_conv.files import system
from automodel_conv.files.checkpoint import Checkpoint, open_checkpoint, open_downloaded
from automodel_conv.files.companions import companions_of
from automodel_conv.files.config import CONFIG_NAME, MODELOPT_NAME, plain_config
from automodel_conv.files.destination import open_destination
from automodel_conv.files.finished import is_finished
from automodel_conv.files.remote import is_url, local_path
from automodel_conv.files.resuming import OPTIONS_KEY, occupied_error
from automodel_conv.files.shards import index_of, is_checkpoint
from automodel_conv.files.source import Identity, LocalFile
from automodel_conv.files.staging import holds_work, remove_leftovers
from automodel_conv.files.write_errors import no_room_error, write_errors
from automodel_conv.progress import bytes_progress
from automodel_conv.publishing.conversion import DEFAULT_SCRATCH_BYTES, Conversion, check_arguments, compile_conversion
from automodel_conv.publishing.save_files import write_checksums
from automodel_conv.publishing.saved import places_in


@dataclass(frozen=True)
class ConvertReport:
    """The outcome of ``convert_checkpoint``; ``print`` shows it.

    Attributes:
        files: names of the weight files.
        bytes_written: bytes of the weight files that this call wrote, without those of files that an earlier call had
            finished.
        files_resumed: number of files that an earlier call had finished.
        carried: names of the tensors of the source that the model has no place for, written unchanged.
        left_out: names of source tensors that nothing uses: dropped, unindexed, or, if codes are decoded, activation
            scales.
        unindexed: name and file of each tensor that was not read because the index of the source does not map it to
            that file.
        files_copied: paths of the files next to the weights that were copied, sorted, with "/" between folders.
        seconds: duration of the call.
        peak_extra_bytes: bound of the memory used.
        was_complete: whether the destination was complete already: it was compared with the source, and nothing was
            written.
        kept_codes: names of the tensors that were written as codes, with their scales: ``dtype`` does not cast them,
            and ``dequantize`` decodes them.

    Example:
        >>> import torch
        >>> from automodel_conv import convert_checkpoint
        >>> from safetensors.torch import save_file
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as source, TemporaryDirectory() as destination:
        ...     save_file({"a": torch.ones(2, 3)}, f"{source}/model.safetensors")
        ...     first = convert_checkpoint(source, destination, rules=[])
        ...     second = convert_checkpoint(source, destination, rules=[])
        >>> first.files, first.was_complete, second.was_complete, second.bytes_written
        (('model.safetensors',), False, True, 0)
    """

    files: tuple[str, ...]
    bytes_written: int
    files_resumed: int
    carried: tuple[str, ...]
    left_out: tuple[str, ...]
    unindexed: tuple[tuple[str, str], ...]
    files_copied: tuple[str, ...]
    seconds: float
    peak_extra_bytes: int
    was_complete: bool = False
    kept_codes: tuple[str, ...] = ()

    @property
    def gb_per_s(self) -> float:
        """10^9 bytes written per second."""
        return self.bytes_written / self.seconds / 1e9 if self.seconds else 0.0

    def __str__(self) -> str:
        return text_of(converted_rows(self))


def converted_rows(report: ConvertReport) -> list[Row]:
    """Return the rows of the report of a conversion; those of rare cases only if they apply."""
    complete = Row("complete already", "compared with the source; nothing was written")
    kept_codes = count_row("kept as codes", report.kept_codes)
    unindexed = count_row("unindexed", [f"{name} of {file}" for name, file in report.unindexed])
    return [
        *([complete] if report.was_complete else []),
        Row("files", str(len(report.files))),
        Row("finished by an earlier call", str(report.files_resumed)),
        *cost_rows("written", report.bytes_written, report.gb_per_s),
        Row("seconds", f"{report.seconds:.3f}"),
        memory_row(report.peak_extra_bytes),
        count_row("carried as they are", report.carried),
        count_row("left out", report.left_out),
        *([unindexed] if unindexed.names else []),
        *([kept_codes] if kept_codes.names else []),
        Row("other files copied", f"{len(report.files_copied)} files"),
    ]


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
    """Convert a checkpoint on disk to another layout of its experts, in bounded memory.

    Unchanged bytes are copied by the operating system if the file system supports it. All other files in the
    directory of the source and its folders are copied too, such as ``config.json``, the tokenizer, chat templates and
    code; the report lists them. Weights of any format, files of trainers (``.bin``, ``.pt``, folders like
    ``checkpoint-500``), and hidden files and folders are not copied. If the source is one file, nothing is copied.

    The destination becomes a checkpoint at the end or not at all. Until then all files are in a folder of their own
    inside it. After a crash or an error, the same call continues with the files that are not finished. If the
    destination is complete already, the call compares everything in it with the source, and writes nothing.

    Tensors that the model has no place for, such as layers for multi-token prediction and draft heads, are written byte
    for byte under their own names, or decoded with ``dequantize``.

    Args:
        source: a directory, an index file, one ``.safetensors`` file, or ``org/name`` on the Hub. Files of a repository
            that are not in the cache are downloaded first, except weights that do not belong to the checkpoint.
        destination: path of a directory that is new, or has no weights in it.
        rules: rule objects of transformers. None: the rules of the model that ``config.json`` describes. ``[]``: keep
            all names, to change only the layout, the dtype or the file size.
        layout: layout of the routed experts in the destination: "transformers", "nemo", "gpt_oss", "vllm", or
            "per_expert" as ``save_pretrained`` writes them. None: the layout of the model's own parameters. The files
            state the layout. If transformers does not load this layout for the type, file names begin with its name
            (``nemo-00001-of-00004.safetensors``), so that ``from_pretrained`` refuses the directory;
            ``open_checkpoint`` and all readers of this package find such files.
        source_layout: layout of grouped experts in the source: a layout, or "per_expert", the form in which the type is
            published. None: the layout that the files state (those written by this package do), or else the model's. It
            is an error if the model's shapes contradict that layout or do not determine it. With ``rules=[]`` and no
            ``layout``, experts are converted to "transformers".
        dtype: dtype of all floating-point tensors, except those that a transformers model keeps in float32. Codes that
            are kept, and their scales, are not cast. None: the dtypes that they have.
        dequantize: decode the tensors that ``quantization_config`` in ``config.json`` describes as quantized, to
            ``dtype`` or the dtype that the config states, and leave that setting out of the new ``config.json``.
            False: keep codes and scales byte for byte. FP8 codes and their scales are then grouped and arranged like
            their weights (``gate_up_proj_scale_inv``). This is possible if no block would hold rows of both gate and
            up and, in a transposed layout, if blocks are square. File names then begin with the name of the layout,
            even if it is "transformers".
        drop: tensors to leave out, by their names in the source: a pattern or several. ``*`` matches any text, ``?``
            one character and ``[abc]`` one of these; a pattern matches whole names ("model.layers.61.*"). A pattern
            that matches none is an error. If codes are not decoded, drop both codes and their scales, or neither. This
            does not apply to a conversion that leaves the names and the layout of the experts unchanged.
        max_shard_size: bound of the tensor data in a file, in bytes or as in "5GB".
        resume: continue with the files that an earlier call finished. False: discard them.
        verify: read each file back after it is written, and compare all of it with the source. This includes files
            that an earlier call finished without ``verify``. The bytes may come from the page cache.
        checksums: write a checksum of each tensor next to the index, for ``verify=True`` of the loaders and for
            ``verify`` of the command line. This reads the files once more.
        threads: number of threads that copy and write. None: the number of cores, at most 16.
        scratch_bytes: bound of the memory used, in bytes. None: 256 MiB.
        progress: show a progress bar in bytes, GB/s and time left.

    Returns:
        A ``ConvertReport``: names of the files, tensors that were carried and left out, bytes, seconds and memory.

    Raises:
        CheckpointError: the source is missing or broken. Nothing has been written.
        NameProblems: the source does not fit its model or the rules; lists all problems. Nothing has been written.
        QuantizationError: parts of quantized tensors are missing, or contradict each other or the config. Nothing has
            been written.
        UnsupportedError: the source cannot be converted, or a layout is unknown. Nothing has been written.
        DestinationError: the destination holds another checkpoint already, another process writes to it, it holds
            unfinished work of another kind, or the source has changed.
        ReadError: reading failed.
        WriteError: writing failed; the disk may be full.
        VerificationError: a file does not have the bytes that were written.
        ConversionError: the system has no more memory or threads. The same call continues the work.

    Example:
        >>> import torch
        >>> from automodel_conv import open_checkpoint
        >>> from safetensors.torch import save_file
        >>> from tempfile import TemporaryDirectory
        >>> tensors = {"norm.weight": torch.ones(4), "mtp.norm.weight": torch.ones(4)}
        >>> with TemporaryDirectory() as source, TemporaryDirectory() as destination:
        ...     save_file(tensors, f"{source}/model.safetensors")
        ...     report = convert_checkpoint(source, destination, rules=[], dtype=torch.bfloat16, drop="mtp.*")
        ...     converted = open_checkpoint(destination)
        >>> converted.names, converted.dtypes, report.left_out
        (['norm.weight'], ['BF16'], ('mtp.norm.weight',))
    """
    began = time.perf_counter()
    directory = local_path(destination)
    drop = checked_patterns(drop)
    rules = None if rules is None else list(rules)
    check_arguments(layout, source_layout, dtype, max_shard_size)
    compiled = partial(
        compile_conversion,
        rules=rules,
        layout=layout,
        source_layout=source_layout,
        dtype=dtype,
        dequantize=dequantize,
        drop=drop,
        max_shard_size=max_shard_size,
    )
    _refuse_occupied(source, directory, resume, checksums, compiled)
    opened = open_downloaded(source, companions=True)
    with while_importing(opened) if rules is None else nullcontext():
        conversion = compiled(opened)
    checkpoint, shards = conversion.checkpoint, conversion.shards
    limits = split_scratch(threads, DEFAULT_SCRATCH_BYTES if scratch_bytes is None else scratch_bytes, reads_files=True)
    state = _identities(checkpoint)
    config = plain_config(checkpoint.directory) if dequantize else None
    options = {
        "source": os.path.abspath(checkpoint.path),
        "rules": rules if rules is None or rules == [] else "other rules",
        "layout": layout,
        "source_layout": source_layout,
        "dtype": dtype,
        "dequantize": dequantize,
        "drop": drop,
        "max_shard_size": max_shard_size,
    }
    work = {
        OPTIONS_KEY: {name: repr(value) for name, value in options.items()},
        "source files": state,
        "tensors": _digest(conversion),
        "files": [shard.name for shard in shards],
    }
    plan = conversion.plan
    file_slabs = FileSlabs(checkpoint, plan.targets, places_in(shards, plan.targets), plan.sources.decodes, limits)
    texts = {} if config is None else {CONFIG_NAME: config}
    companions = _companions(checkpoint, directory, dequantize)
    copies = {name: os.path.join(checkpoint.directory, *name.split("/")) for name in companions if name not in texts}
    index = index_of(shards, naming=conversion.naming)
    index_texts = {} if index is None else {conversion.naming.index_name: index}
    if resume and system.real_path(directory) != system.real_path(checkpoint.directory):
        if is_finished(directory, shards, texts | index_texts, copies, checksums):
            _compare_finished(conversion, directory, file_slabs, limits, progress)
            remove_leftovers(directory)
            return ConvertReport(
                files=tuple(shard.name for shard in shards),
                bytes_written=0,
                files_resumed=len(shards),
                carried=conversion.carried,
                left_out=conversion.left_out,
                unindexed=checkpoint.unindexed,
                files_copied=(),
                seconds=time.perf_counter() - began,
                peak_extra_bytes=limits.scratch_bytes,
                was_complete=True,
                kept_codes=conversion.kept_codes,
            )
    with open_destination(directory, shards, work, resume=resume, index_name=conversion.naming.index_name) as place:
        unfinished = place.unfinished
        nbytes = sum(shard.nbytes for shard in shards if shard.name in unfinished)
        with write_errors(directory):
            free = system.free_bytes(directory)
        if free < nbytes:
            raise no_room_error(directory, nbytes, len(unfinished), free)
        reads = [(shard.name in unfinished) + (verify and shard.name not in place.verified) for shard in shards]
        progress_bytes = sum(
            count * spec.nbytes for shard, count in zip(shards, reads, strict=True) for spec in shard.specs
        )
        with bytes_progress(progress_bytes, "converting", progress) as advance:
            for file, shard in enumerate(shards):
                to_write, to_verify = shard.name in unfinished, verify and shard.name not in place.verified
                if to_write:
                    path = place.path(shard.name)
                    create_shard_file(shard, path)
                    with file_slabs.opened(file) as slabs:
                        write_slabs([slabs], path, limits.threads, advance)
                if to_verify:
                    with file_slabs.opened(file) as slabs:
                        compare_file(slabs, LocalFile(place.finished_path(shard.name)), shard, limits.threads, advance)
                if to_write or to_verify:
                    place.finish(shard, verified=verify)
        now = _identities(checkpoint)
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
                system.copy_file(path, place.companion_path(name))
        if checksums:
            write_checksums(place, shards, limits.threads)
        place.commit(index)
    return ConvertReport(
        files=tuple(shard.name for shard in shards),
        bytes_written=nbytes,
        files_resumed=len(shards) - len(unfinished),
        carried=conversion.carried,
        left_out=conversion.left_out,
        unindexed=checkpoint.unindexed,
        files_copied=companions,
        seconds=time.perf_counter() - began,
        peak_extra_bytes=limits.scratch_bytes,
        kept_codes=conversion.kept_codes,
    )


def _refuse_occupied(
    source: str | os.PathLike[str],
    directory: str,
    resume: bool,
    checksums: bool,
    compiled: Callable[[Checkpoint], Conversion],
) -> None:
    """Refuse a destination that holds another checkpoint before weights of a repository are downloaded.

    Anything else is found once the source is open.

    Args:
        source, resume, checksums: see ``convert_checkpoint``.
        directory: path of the destination.
        compiled: returns the conversion of a checkpoint.

    Raises:
        DestinationError: the destination holds a checkpoint, and it is not the result of this conversion.
    """
    name = os.fsdecode(source)
    if is_url(name) or system.exists(name) or not system.is_directory(directory) or holds_work(directory):
        return
    present = [name for name in system.list_names(directory) if is_checkpoint(name)]
    if not present:
        return
    if resume:
        checkpoint = open_checkpoint(source)
        if not checkpoint.is_remote:
            return
        conversion = compiled(checkpoint)
        index = index_of(conversion.shards, naming=conversion.naming)
        texts = {} if index is None else {conversion.naming.index_name: index}
        if is_finished(directory, conversion.shards, texts, {}, checksums):
            return
    raise occupied_error(directory, present)


def _identities(checkpoint: Checkpoint) -> dict[str, Identity]:
    """Return the identity of each file by its path relative to the checkpoint's directory; it changes with the file.

    Raises:
        ReadError: a file does not exist any more.
    """
    try:
        return {
            os.path.relpath(source.describe(), checkpoint.directory): source.identity() for source in checkpoint.sources
        }
    except OSError as error:
        raise ReadError(
            message("cannot get the state of the source files", where=checkpoint.directory, found=error)
        ) from error


def _digest(conversion: Conversion) -> str:
    """Return a digest that is equal for conversions that write the same bytes from the same sources."""
    headers = [shard.header for shard in conversion.shards]
    return hashlib.blake2b(conversion.plan.to_json().encode() + b"".join(headers), digest_size=16).hexdigest()


def _companions(checkpoint: Checkpoint, destination: str, dequantize: bool) -> tuple[str, ...]:
    """Return the files to copy with the weights; none if the source is one file.

    If weights are decoded, the file that describes how to decode them is not among them.

    Raises:
        ReadError: the directory cannot be listed.
    """
    if checkpoint.path.endswith(".safetensors") and system.is_file(checkpoint.path):
        return ()
    try:
        companions = companions_of(checkpoint.directory, destination)
    except OSError as error:
        text = message("cannot list the files next to the weights", where=checkpoint.directory, found=error)
        raise ReadError(text) from error
    return tuple(name for name in companions if not (dequantize and name == MODELOPT_NAME))


def _compare_finished(
    conversion: Conversion, directory: str, file_slabs: FileSlabs, limits: ScratchSplit, progress: bool
) -> None:
    """Compare the files in a directory with those that the conversion produces.

    Raises:
        DestinationError: they differ.
    """
    with bytes_progress(conversion.plan.bytes_written, "verifying", progress) as advance:
        for file, shard in enumerate(conversion.shards):
            with file_slabs.opened(file) as slabs:
                try:
                    source = LocalFile(os.path.join(directory, shard.name))
                    compare_file(slabs, source, shard, limits.threads, advance)
                except VerificationError as error:
                    raise DestinationError(
                        message(
                            "the directory already holds a checkpoint that differs from the result of this conversion",
                            where=directory,
                            found=str(error).partition("\n")[0],
                            do="choose another directory, or remove these files first",
                        )
                    ) from error
