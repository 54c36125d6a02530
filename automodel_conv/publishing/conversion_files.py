"""Write the files of a conversion: resume them, compare them with the source, and make the directory a checkpoint."""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

from automodel_conv.compiling.opening import while_importing
from automodel_conv.errors import (
    DestinationError,
    ReadError,
    VerificationError,
    count_of,
    listing,
    message,
    size_text,
)
from automodel_conv.execution.adding import Additions, merge_bytes
from automodel_conv.execution.comparing import compare_file
from automodel_conv.execution.file_slabs import FileSlabs
from automodel_conv.execution.writing import (
    LEAST_SCRATCH_BYTES,
    ScratchSplit,
    create_shard_file,
    split_scratch,
    write_slabs,
)
from automodel_conv.files import system
from automodel_conv.files.checkpoint import Checkpoint, open_source
from automodel_conv.files.companions import companions_of
from automodel_conv.files.config import CONFIG_NAME, MODELOPT_NAME, plain_config
from automodel_conv.files.finished import is_finished
from automodel_conv.files.paths import text_of_path
from automodel_conv.files.remote.urls import is_url
from automodel_conv.files.resuming import OPTIONS_KEY, occupied_error
from automodel_conv.files.shards import Shard, index_of, is_checkpoint
from automodel_conv.files.source import Identity, LocalFile
from automodel_conv.files.source_options import SourceSettings
from automodel_conv.files.staging import holds_work
from automodel_conv.files.uploads.output_folders import OutputFolder
from automodel_conv.files.write_errors import no_room_error, write_errors
from automodel_conv.lora.adapter import Adapter
from automodel_conv.lora.base import base_of
from automodel_conv.lora.merging import Merge, plan_merge
from automodel_conv.progress import bytes_progress, phases
from automodel_conv.publishing.conversion import DEFAULT_SCRATCH_BYTES, Conversion, check_arguments, compile_conversion
from automodel_conv.publishing.convert_report import ConvertReport
from automodel_conv.publishing.save_files import shard_checksums, write_checksums
from automodel_conv.publishing.saved import places_in
from automodel_conv.schedule.requests import CONNECTIONS
from automodel_conv.upstream.given_dtypes import given_dtype

_LOG = logging.getLogger(__name__)


class Writing(NamedTuple):
    """The arguments of ``convert_checkpoint`` that say how files are written, not what is in them."""

    resume: bool
    verify: bool
    checksums: bool
    threads: int | None
    scratch_bytes: int | None
    progress: bool


def convert(
    source: str | os.PathLike[str],
    folder: OutputFolder,
    settings: SourceSettings,
    options: Mapping[str, Any],
    writing: Writing,
    adapters: Sequence[Adapter] = (),
) -> ConvertReport:
    """Convert a checkpoint, and merge adapters into it.

    Args:
        source: see ``convert_checkpoint``.
        folder: the destination.
        settings: how to reach the source.
        options: keyword arguments of ``compile_conversion``, all of them.
        writing: how to write the files.
        adapters: the adapters.

    Raises:
        ConversionError: see ``convert_checkpoint`` and ``merge_adapter``.
    """
    began = time.perf_counter()
    directory = folder.directory
    options = {**options, "dtype": given_dtype(options["dtype"])}  # so that its name continues the work of a dtype
    rules, dequantize = options["rules"], options["dequantize"]
    check_arguments(*(options[name] for name in ("layout", "source_layout", "dtype", "max_shard_size")))
    compiled = partial(compile_conversion, **options)
    settings = settings.shared(source)
    _refuse_occupied(source, settings, folder, writing, compiled)
    is_one_file = _is_one_file(source)
    opened = open_source(source, settings, companions=not is_one_file)
    if not is_one_file and not folder.is_remote and system.real_path(directory) == system.real_path(opened.directory):
        do = "choose another directory"
        raise DestinationError(message("the destination is the directory of the source", where=directory, do=do))
    with while_importing(opened) if rules is None else nullcontext():
        conversion = compiled(opened)
    checkpoint, shards = conversion.checkpoint, conversion.shards
    merge = plan_merge(conversion.plan, adapters, base_of(checkpoint, dequantize)) if adapters else None
    limits, extra_bytes = _limits(writing, merge, checkpoint.is_remote)
    state = _identities(checkpoint, adapters)
    config = plain_config(checkpoint.directory) if dequantize else None
    stated = {
        "source": checkpoint.path,
        **options,
        "rules": rules if rules is None or rules == [] else "other rules",
        **({"adapters": [(adapter.path, adapter.weight) for adapter in adapters]} if adapters else {}),
    }
    work = {
        OPTIONS_KEY: {name: repr(value) for name, value in stated.items()},
        "source files": state,
        "tensors": _digest(conversion, adapters, merge),
        "files": [shard.name for shard in shards],
    }
    plan = conversion.plan
    places = places_in(shards, plan.targets)
    additions = None if merge is None else Additions(plan.targets, places, *merge)
    file_slabs = FileSlabs(checkpoint, plan.targets, places, plan.sources.decodes, limits, additions)
    texts = {} if config is None else {CONFIG_NAME: config}
    companions = () if is_one_file else _companions(checkpoint, directory, dequantize)
    copies = {name: os.path.join(checkpoint.directory, *name.split("/")) for name in companions if name not in texts}
    index = index_of(shards, naming=conversion.naming)
    index_texts = {} if index is None else {conversion.naming.index_name: index}
    adapted = () if merge is None else tuple(target.name for target in plan.targets if target.name in merge.blocks)
    if writing.resume and system.real_path(directory) != system.real_path(checkpoint.directory):
        if is_finished(folder, shards, texts | index_texts, copies, writing.checksums):
            planned = time.perf_counter() - began
            _compare_finished(conversion, folder, file_slabs, limits, writing.progress)
            folder.remove_leftovers()
            _LOG.info("%s is complete already: it was compared with the source", folder.name)
            return ConvertReport(
                files=tuple(shard.name for shard in shards),
                bytes_written=0,
                files_resumed=len(shards),
                carried=conversion.carried,
                left_out=conversion.left_out,
                unindexed=checkpoint.unindexed,
                files_copied=(),
                seconds=(seconds := time.perf_counter() - began),
                phases={"plan": planned, "write": 0.0, "verify": seconds - planned, "finish": 0.0},
                peak_extra_bytes=limits.scratch_bytes + extra_bytes,
                was_complete=True,
                kept_codes=conversion.kept_codes,
                adapted=adapted,
            )
    with folder.open(
        shards,
        work,
        resume=writing.resume,
        index_name=conversion.naming.index_name,
        verify=writing.verify,
        checksums=writing.checksums,
    ) as place:
        unfinished, verify = place.unfinished, writing.verify
        _LOG.info("converting %s to %s: %s", checkpoint.path, folder.name, count_of(len(shards), "file"))
        if len(unfinished) < len(shards):
            _LOG.info("%d of them were finished by an earlier call", len(shards) - len(unfinished))
        to_do = [shard for shard in shards if shard.name in unfinished]
        nbytes = sum(shard.nbytes for shard in to_do)
        with write_errors(directory):
            free = system.free_bytes(directory)
        at_once = folder.most_on_disk(to_do)
        needed = sum(shard.nbytes for shard in at_once)
        if free < needed:
            raise no_room_error(directory, needed, len(at_once), free)
        to_verify = [shard for shard in shards if verify and shard.name not in place.verified]
        unverified = {shard.name for shard in to_verify}
        changed = unfinished | unverified
        to_sum = [shard for shard in shards if shard.name in changed or shard.name not in place.checksums]
        totals = {
            "writing": _data_bytes(to_do),
            "verifying": _data_bytes(to_verify),
            "checksums": _data_bytes(to_sum) if writing.checksums else 0,
            "uploading": nbytes if folder.is_remote else 0,
        }
        planned = time.perf_counter() - began
        with phases(totals, writing.progress) as bars:
            for file, shard in enumerate(shards):
                if shard.name not in changed:
                    continue
                if shard.name in unfinished:
                    path = place.path(shard.name)
                    with bars.begin("writing") as advance, file_slabs.opened(file) as slabs:
                        create_shard_file(shard, path)
                        write_slabs([slabs], path, limits.threads, advance)
                if shard.name in unverified:
                    with bars.begin("verifying") as advance, file_slabs.opened(file) as slabs:
                        compare_file(slabs, LocalFile(place.finished_path(shard.name)), shard, limits.threads, advance)
                with bars.begin("checksums") as advance:
                    sums = shard_checksums(place, shard, limits.threads, advance) if writing.checksums else None
                with bars.begin("uploading") as place.on_upload:
                    place.finish(shard, verified=verify, checksums=sums)
            now = _identities(checkpoint, adapters)
            if now != state:
                raise DestinationError(
                    message(
                        "the source was changed while it was converted",
                        where=checkpoint.path,
                        found="\n" + listing(name for name in state if now[name] != state[name]),
                        do="start again with {resume=False}",
                    )
                )
            with write_errors(directory):
                for name, text in texts.items():
                    place.write(name, text)
                for name, path in copies.items():
                    system.copy_file(path, place.companion_path(name))
            if writing.checksums:
                with bars.begin("checksums") as advance:
                    write_checksums(place, shards, limits.threads, advance)
            with bars.begin("uploading") as place.on_upload:
                place.commit(index)
    seconds = time.perf_counter() - began
    _LOG.info("converted %s to %s: %s in %.3f s", checkpoint.path, folder.name, size_text(nbytes), seconds)
    known = {"plan": planned, "write": bars.seconds["writing"], "verify": bars.seconds["verifying"]}
    return ConvertReport(
        files=tuple(shard.name for shard in shards),
        bytes_written=nbytes,
        files_resumed=len(shards) - len(unfinished),
        carried=conversion.carried,
        left_out=conversion.left_out,
        unindexed=checkpoint.unindexed,
        files_copied=companions,
        seconds=seconds,
        phases={**known, "finish": seconds - sum(known.values())},
        peak_extra_bytes=limits.scratch_bytes + extra_bytes + folder.upload_bytes,
        kept_codes=conversion.kept_codes,
        adapted=adapted,
    )


def _data_bytes(shards: Iterable[Shard]) -> int:
    """Return the bytes of the tensors of files."""
    return sum(spec.nbytes for shard in shards for spec in shard.specs)


def _limits(writing: Writing, merge: Merge | None, is_remote: bool) -> tuple[ScratchSplit, int]:
    """Return the scratch of the threads, and the bytes that a merge needs besides.

    Together they are within the given limit, unless a merge needs more.
    """
    scratch = DEFAULT_SCRATCH_BYTES if writing.scratch_bytes is None else writing.scratch_bytes
    limits = split_scratch(writing.threads, scratch, reads_files=True, is_remote=is_remote)
    if merge is None:
        return limits, 0
    extra = merge_bytes(merge.factors, limits.threads)
    return split_scratch(limits.threads, max(scratch - extra, LEAST_SCRATCH_BYTES), reads_files=True), extra


def _refuse_occupied(
    source: str | os.PathLike[str],
    settings: SourceSettings,
    folder: OutputFolder,
    writing: Writing,
    compiled: Callable[[Checkpoint], Conversion],
) -> None:
    """Refuse a destination that holds another checkpoint before weights of a repository are downloaded.

    Anything else is found once the source is open.

    Args:
        source: see ``convert_checkpoint``.
        settings: how to reach the source.
        folder: the destination.
        writing: how to write the files.
        compiled: returns the conversion of a checkpoint.

    Raises:
        DestinationError: the destination holds a checkpoint, and it is not the result of this conversion.
    """
    name = text_of_path(source)
    if is_url(name) or system.exists(name) or holds_work(folder.directory):
        return
    present = [name for name in folder.names() if is_checkpoint(name)]
    if not present:
        return
    if writing.resume:
        checkpoint = open_source(source, settings)
        if not checkpoint.is_remote:
            return
        conversion = compiled(checkpoint)
        index = index_of(conversion.shards, naming=conversion.naming)
        texts = {} if index is None else {conversion.naming.index_name: index}
        if is_finished(folder, conversion.shards, texts, {}, writing.checksums):
            return
    raise occupied_error(folder.name, present)


def _identities(checkpoint: Checkpoint, adapters: Sequence[Adapter]) -> dict[str, Identity]:
    """Return the identity of each file by its ``_path_in``; it changes with the file.

    Files of adapters are included.

    Raises:
        ReadError: a file does not exist any more.
    """
    sources = [*checkpoint.sources, *chain.from_iterable(adapter.sources for adapter in adapters)]
    try:
        with ThreadPoolExecutor(CONNECTIONS) as pool:  # each asks a server if the file is not on this machine
            identities = list(pool.map(lambda source: source.identity(), sources))
        paths = [_path_in(checkpoint, source.describe()) for source in sources]
        return dict(zip(paths, identities, strict=True))
    except OSError as error:
        raise ReadError(
            message("cannot get the state of the source files", where=checkpoint.path, found=error)
        ) from error


def _path_in(checkpoint: Checkpoint, path: str) -> str:
    """Return a path relative to the checkpoint's directory, which may be moved; a URL stays as it is.

    The directory of a checkpoint behind a URL is a temporary one, so other paths stay as they are too.
    """
    return path if is_url(path) or is_url(checkpoint.path) else os.path.relpath(path, checkpoint.directory)


def _is_one_file(source: str | os.PathLike[str]) -> bool:
    """Return whether a path or a URL names one file of weights, which nothing accompanies."""
    path = os.path.expanduser(text_of_path(source))
    path = path.partition("?")[0] if is_url(path) else path
    return path.endswith(".safetensors") and not system.is_directory(path)


def _digest(conversion: Conversion, adapters: Sequence[Adapter], merge: Merge | None) -> str:
    """Return a digest that is equal for conversions that write the same bytes from the same sources."""
    parts = [conversion.plan.to_json().encode(), *(shard.header for shard in conversion.shards)]
    if merge is not None:
        paths = [_path_in(conversion.checkpoint, adapter.path) for adapter in adapters]
        parts.append(repr((paths, merge.factors.deltas, merge.blocks)).encode())
    return hashlib.blake2b(b"".join(parts), digest_size=16).hexdigest()


def _companions(checkpoint: Checkpoint, destination: str, dequantize: bool) -> tuple[str, ...]:
    """Return the files to copy with the weights.

    If weights are decoded, the file that describes how to decode them is not among them.

    Raises:
        ReadError: the directory cannot be listed.
    """
    try:
        companions = companions_of(checkpoint.directory, destination)
    except OSError as error:
        text = message("cannot list the files next to the weights", where=checkpoint.directory, found=error)
        raise ReadError(text) from error
    return tuple(name for name in companions if not (dequantize and name == MODELOPT_NAME))


def _compare_finished(
    conversion: Conversion, folder: OutputFolder, file_slabs: FileSlabs, limits: ScratchSplit, progress: bool
) -> None:
    """Compare the files in a folder with those that the conversion produces.

    Raises:
        DestinationError: they differ.
    """
    with bytes_progress(conversion.plan.bytes_written, "verifying", progress) as advance:
        for file, shard in enumerate(conversion.shards):
            with file_slabs.opened(file) as slabs:
                try:
                    compare_file(slabs, folder.source(shard.name), shard, limits.threads, advance)
                except VerificationError as error:
                    raise DestinationError(
                        message(
                            "the directory already holds a checkpoint that differs from the result of this conversion",
                            where=folder.name,
                            found=str(error).partition("\n")[0],
                            do="choose another directory, or remove these files first",
                        )
                    ) from error
