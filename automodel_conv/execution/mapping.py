"""Targets that lie in a file as they shall lie in memory: mapped there, copy-on-write, instead of read."""

from __future__ import annotations

import ctypes
import mmap
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from automodel_conv.errors import ReadError, listing, message
from automodel_conv.execution.buffers import allocate, dtype_of
from automodel_conv.files import system
from automodel_conv.files.checkpoint import Checkpoint
from automodel_conv.files.source import opened
from automodel_conv.planning.boxes import contiguous_strides
from automodel_conv.planning.copies import Target
from automodel_conv.planning.plan import CopyPlan

# Smaller neighbours share a mapping, for a process may have some 65,000 (vm.max_map_count). What was written to one of
# them is kept until the last of them is freed, so mappings are no larger than they must be.
_SPAN_BYTES = 64 << 20


class FileRange(NamedTuple):
    """The bytes of a file that are a target."""

    file: int
    offset_bytes: int
    nbytes: int
    target: Target

    @property
    def stop_bytes(self) -> int:
        return self.offset_bytes + self.nbytes


def file_range_of(target: Target, checkpoint: Checkpoint) -> FileRange | None:
    """The bytes of a file that are a target, in its order, at a multiple of its elements' size; None: there are none.

    Sources that follow each other in the file are as good as one. A target without bytes lies nowhere.

    Raises:
        UnsupportedError: this torch has no dtype for it.
    """
    if target.fallback is not None or not target.nbytes:
        return None
    # Codes are stored in no dtype that they are decoded to.
    if any(checkpoint.dtypes[row] != target.dtype for row in target.sources):
        return None
    size = dtype_of(target.dtype, target.name).itemsize
    found: tuple[int, int] | None = None
    for copy in target.copies:
        if not copy.box.is_run:
            return None
        for ordinal, source, place in zip(copy.ordinals, copy.source_offsets, copy.target_offsets, strict=True):
            row = target.sources[ordinal]
            begin = checkpoint.file_ids[row], checkpoint.offsets[row] + (source - place) * size
            if found is not None and begin != found:
                return None
            found = begin
    if found is None or found[1] % size:
        return None
    return FileRange(*found, target.nbytes, target)


def group_ranges(places: Iterable[FileRange], limit: int = _SPAN_BYTES) -> Iterator[Sequence[FileRange]]:
    """Places that are mapped together: neighbours in one file of at most ``limit`` bytes in all, or a single one.

    No two of a span overlap, so that what is written to a target is written to no other.
    """
    span: list[FileRange] = []
    for place in sorted(places, key=lambda place: (place.file, place.offset_bytes, place.nbytes)):
        if span and (
            place.file != span[0].file
            or place.offset_bytes < span[-1].stop_bytes
            or place.stop_bytes - span[0].offset_bytes > limit
        ):
            yield span
            span = []
        span.append(place)
    if span:
        yield span


def map_targets(plan: CopyPlan, checkpoint: Checkpoint, devices: Mapping[str, torch.device]) -> dict[str, Tensor]:
    """CPU tensors on a file's own bytes, by name, for the targets of a plan that lie in it as they shall in memory.

    They are contiguous. What is written to them never reaches the file. Each has a storage of its own size; a file is
    mapped as long as any tensor of it lives, also when it was removed. Off Linux nothing is mapped.

    Args:
        plan: its sources are the checkpoint's rows.
        devices: of the targets, by name; only those on the CPU are mapped.

    Raises:
        ReadError: a file cannot be opened or mapped, or has become too short; names file and targets.
        UnsupportedError: this torch has no dtype for a target.
    """
    if not system.can_map():
        return {}
    on_host = (target for target in plan.targets if devices[target.name].type == "cpu")
    found = (file_range_of(target, checkpoint) for target in on_host)
    tensors: dict[str, Tensor] = {}
    for file, of_file in groupby(group_ranges(filter(None, found)), key=lambda span: span[0].file):
        source = checkpoint.sources[file]
        with opened(source) as open_file:
            fd = open_file.descriptor()
            if fd is None:
                continue
            for span in of_file:
                tensors |= _map(span, fd, source.describe())
    return tensors


def with_new(
    targets: Iterable[Target], mapped: Mapping[str, Tensor], devices: Mapping[str, torch.device]
) -> dict[str, Tensor]:
    """Buffers for all targets, in their order: the mapped ones, and new ones on their devices.

    Raises:
        UnsupportedError, ConversionError: see ``allocate``.
    """
    buffers: dict[str, Tensor] = {}
    for target in targets:
        name = target.name
        buffers |= {name: mapped[name]} if name in mapped else allocate([target], devices[name])
    return buffers


def without(plan: CopyPlan, names: Iterable[str]) -> CopyPlan:
    """The plan of all other targets."""
    left_out = set(names)
    return replace(plan, targets=tuple(target for target in plan.targets if target.name not in left_out))


def _map(span: Sequence[FileRange], fd: int, path: str) -> dict[str, Tensor]:
    """The tensors of a span, by name."""
    stop = span[-1].stop_bytes
    start = span[0].offset_bytes // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
    try:
        file_bytes = system.size(fd)
        if file_bytes < stop:
            cut = [place.target.name for place in span if place.stop_bytes > file_bytes]
            do = "the file is truncated: copy or download it again"
            raise _error("a file is too short to be mapped", path, cut, f"{file_bytes} bytes", do, f"{stop} bytes")
        address = system.map_private(fd, start, stop - start)
    except OSError as error:
        names = [place.target.name for place in span]
        raise _error("a file cannot be mapped", path, names, error, "{memory_map=False} reads it") from error
    memory = (ctypes.c_ubyte * (stop - start)).from_address(address)
    # At its end a process gives all back by itself, and threads may still use tensors then.
    weakref.finalize(memory, system.unmap, address, stop - start).atexit = False
    return {place.target.name: _tensor(place, memory, place.offset_bytes - start) for place in span}


def _tensor(place: FileRange, memory: ctypes.Array[ctypes.c_ubyte], start: int) -> Tensor:
    """The tensor of a place, whose storage keeps the memory alive and holds nothing else."""
    target = place.target
    dtype = dtype_of(target.dtype, target.name)
    storage = torch.frombuffer(memory, dtype=torch.uint8, count=place.nbytes, offset=start).untyped_storage()
    strides = contiguous_strides(target.shape)
    return torch.empty(0, dtype=dtype, device="cpu").set_(storage, 0, target.shape, strides)


def _error(
    what: str, path: str, names: Sequence[str], found: object, do: str, expected: str | None = None
) -> ReadError:
    error = ReadError(message(what, where=path, expected=expected, found=found, do=do))
    error.add(f"  targets:\n{listing(names)}")
    return error
