"""Memory-mapped targets: a target that a file stores exactly as memory needs it is mapped copy-on-write, not read."""

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
from automodel_conv.execution.load import read_as_planned
from automodel_conv.files import system
from automodel_conv.files.checkpoint import Checkpoint
from automodel_conv.files.source import opened
from automodel_conv.planning.boxes import contiguous_strides
from automodel_conv.planning.copies import Target
from automodel_conv.planning.plan import CopyPlan

# Small neighbours share a mapping, because a process may have only some 65,000 mappings (vm.max_map_count). Pages that
# were written to are kept until the last tensor of a mapping is freed, so mappings are no larger than they must be.
_MAPPING_BYTES = 64 << 20


class FileRange(NamedTuple):
    """A range of a file that holds exactly the bytes of a target."""

    file: int
    """Number of the file in the checkpoint."""
    offset_bytes: int
    """Offset of the first byte in the file."""
    nbytes: int
    target: Target

    @property
    def stop_bytes(self) -> int:
        return self.offset_bytes + self.nbytes


def file_range_of(target: Target, checkpoint: Checkpoint) -> FileRange | None:
    """Return the range of a file that holds the bytes of a target in the target's own order, or None.

    The range must start at a multiple of the element size. It may span several sources that follow each other in the
    file. A target without bytes has no range.

    Raises:
        UnsupportedError: this version of torch does not have the dtype of the target.
    """
    if target.fallback is not None or target.fills or not target.nbytes:
        return None
    # This also excludes quantized sources: codes are never stored in the dtype of their values.
    if any(checkpoint.dtypes[row] != target.dtype for row in target.sources):
        return None
    size = dtype_of(target.dtype, target.name).itemsize
    start: tuple[int, int] | None = None  # file, and offset of the target's first byte in it
    for copy in target.copies:
        if not copy.box.is_run:
            return None
        for ordinal, source_offset, target_offset in zip(
            copy.ordinals, copy.source_offsets, copy.target_offsets, strict=True
        ):
            row = target.sources[ordinal]
            implied = checkpoint.file_ids[row], checkpoint.offsets[row] + (source_offset - target_offset) * size
            if start is not None and implied != start:
                return None
            start = implied
    if start is None or start[1] % size:
        return None
    return FileRange(*start, target.nbytes, target)


def group_ranges(ranges: Iterable[FileRange], limit: int = _MAPPING_BYTES) -> Iterator[Sequence[FileRange]]:
    """Group ranges that share a mapping: neighbours in one file of at most ``limit`` bytes in all, or a single range.

    Ranges of one group never overlap, so a write to one target does not change another.
    """
    group: list[FileRange] = []
    for file_range in sorted(ranges, key=lambda item: (item.file, item.offset_bytes, item.nbytes)):
        if group and (
            file_range.file != group[0].file
            or file_range.offset_bytes < group[-1].stop_bytes
            or file_range.stop_bytes - group[0].offset_bytes > limit
        ):
            yield group
            group = []
        group.append(file_range)
    if group:
        yield group


def map_targets(plan: CopyPlan, checkpoint: Checkpoint, devices: Mapping[str, torch.device]) -> dict[str, Tensor]:
    """Map all targets that a file stores exactly as memory needs them; return contiguous CPU tensors by target name.

    Writes to the tensors never reach the file. Each tensor has a storage of exactly its own size. A mapping lives as
    long as any of its tensors, even if the file is removed. Nothing is mapped on systems other than Linux.

    Args:
        plan: the plan of all targets. Its sources are the checkpoint's rows.
        checkpoint: the checkpoint with the files.
        devices: device of each target, by target name. Only targets on the CPU are mapped.

    Raises:
        ReadError: a file cannot be opened or mapped, or has become too short. The error names the file and the targets.
        UnsupportedError: this version of torch does not have the dtype of a target.
    """
    if not system.can_map():
        return {}
    on_host = (target for target in plan.targets if devices[target.name].type == "cpu")
    checkpoint = read_as_planned(plan, checkpoint)
    ranges = (file_range_of(target, checkpoint) for target in on_host)
    tensors: dict[str, Tensor] = {}
    for file, groups in groupby(group_ranges(filter(None, ranges)), key=lambda group: group[0].file):
        source = checkpoint.sources[file]
        with opened(source) as open_file:
            fd = open_file.descriptor()
            if fd is None:
                continue
            for group in groups:
                tensors |= _map(group, fd, source.describe())
    return tensors


def mapped_or_new(
    targets: Iterable[Target], mapped: Mapping[str, Tensor], devices: Mapping[str, torch.device]
) -> dict[str, Tensor]:
    """Return buffers for all targets, in their order: the mapped tensors, and new tensors on the targets' devices.

    Raises:
        UnsupportedError, ConversionError: see ``allocate``.
    """
    buffers: dict[str, Tensor] = {}
    for target in targets:
        name = target.name
        buffers |= {name: mapped[name]} if name in mapped else allocate([target], devices[name])
    return buffers


def without_targets(plan: CopyPlan, names: Iterable[str]) -> CopyPlan:
    """Return a plan without the named targets."""
    left_out = set(names)
    return replace(plan, targets=tuple(target for target in plan.targets if target.name not in left_out))


def _map(group: Sequence[FileRange], fd: int, path: str) -> dict[str, Tensor]:
    """Map the ranges of one group in one mapping; return the tensors by target name."""
    stop = group[-1].stop_bytes
    start = group[0].offset_bytes // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
    try:
        file_bytes = system.size(fd)
        if file_bytes < stop:
            cut = [item.target.name for item in group if item.stop_bytes > file_bytes]
            do = "the file is truncated: copy or download it again"
            raise _error("a file is too short to be mapped", path, cut, f"{file_bytes} bytes", do, f"{stop} bytes")
        address = system.map_private(fd, start, stop - start)
    except OSError as error:
        names = [item.target.name for item in group]
        raise _error("a file cannot be mapped", path, names, error, "{memory_map=False} reads it") from error
    memory = (ctypes.c_ubyte * (stop - start)).from_address(address)
    # Not at exit: an ending process returns all memory by itself, and its threads may still use tensors.
    weakref.finalize(memory, system.unmap, address, stop - start).atexit = False
    return {item.target.name: _tensor(item, memory, item.offset_bytes - start) for item in group}


def _tensor(file_range: FileRange, memory: ctypes.Array[ctypes.c_ubyte], start: int) -> Tensor:
    """Return the tensor of a range; its storage covers only this range, and keeps the mapping alive."""
    target = file_range.target
    dtype = dtype_of(target.dtype, target.name)
    storage = torch.frombuffer(memory, dtype=torch.uint8, count=file_range.nbytes, offset=start).untyped_storage()
    strides = contiguous_strides(target.shape)
    return torch.empty(0, dtype=dtype, device="cpu").set_(storage, 0, target.shape, strides)


def _error(
    what: str, path: str, names: Sequence[str], found: object, do: str, expected: str | None = None
) -> ReadError:
    error = ReadError(message(what, where=path, expected=expected, found=found, do=do))
    error.add(f"  targets:\n{listing(names)}")
    return error
