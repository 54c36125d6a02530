"""Slabs of output files whose bytes come from tensors in memory: the parts of the sources that this process holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from automodel_conv.dtypes import dtype_code
from automodel_conv.errors import ConversionError, message
from automodel_conv.execution.cuda import transfer_device
from automodel_conv.execution.memory import with_source_strides
from automodel_conv.execution.writing import DeviceTensorProducer, HostTensorProducer, SlabProducer
from automodel_conv.planning.boxes import reach
from automodel_conv.planning.copies import StridedCopy, Target
from automodel_conv.planning.parts_of_sources import copies_from_regions
from automodel_conv.planning.plan import CopyPlan
from automodel_conv.planning.regions import Region
from automodel_conv.schedule.writes import Slab, slab_schedule


class LocalTensor(NamedTuple):
    """The part of a source that a tensor of this process holds."""

    region: Region
    """The region of the source."""
    tensor: Tensor
    """The values of the region, in its local shape, with any strides, on any device."""


# For each source of a target, the regions that this process holds.
_Regions = tuple[tuple[Region, ...], ...]


class TensorSlabs(NamedTuple):
    """The slabs that are computed from the tensors of one device."""

    by_file: dict[int, list[Slab]]
    """Slabs by the number of their output file."""
    start: Callable[[], SlabProducer]
    """Starts the producer of the slabs in a thread."""

    @property
    def nbytes(self) -> int:
        """Bytes of all slabs."""
        return sum(slab.nbytes for slabs in self.by_file.values() for slab in slabs)


def tensor_slabs(
    plan: CopyPlan,
    local_tensors: Mapping[int, Sequence[LocalTensor]],
    places: Sequence[tuple[int, int]],
    *,
    most_bytes: int,
) -> list[TensorSlabs]:
    """Return the slabs that write the parts of a plan's targets that local tensors determine.

    Args:
        plan: the plan of the targets.
        local_tensors: the parts of each source that this process holds, by source row. They share no element. Nothing
            is written from rows that are missing.
        places: output file and offset of each target; see ``slab_schedule``.
        most_bytes: size limit of a slab; see ``slab_schedule``.

    Returns:
        The slabs of each device.

    Raises:
        ConversionError: the parts of the sources of a target are on several devices.
        UnsupportedError: strided copies cannot compute a target from such regions of its sources.
    """
    by_device: dict[torch.device, _Group] = {}
    # Layers share their copies, so the key is the identity of the copies.
    copies_by_key: dict[tuple[int, _Regions], Sequence[StridedCopy]] = {}
    for target, place in zip(plan.targets, places, strict=True):
        parts = [part for row in target.sources for part in local_tensors.get(row, ())]
        if not parts or not prod(target.shape):
            continue
        devices = {part.tensor.device for part in parts}
        if len(devices) > 1:
            raise ConversionError(
                message(f"the parts of {target.name} are on several devices", found=sorted(map(str, devices)))
            )
        group = by_device.setdefault(devices.pop(), _Group([], [], [], []))
        regions = tuple(tuple(part.region for part in local_tensors.get(row, ())) for row in target.sources)
        key = id(target.copies), regions
        if key not in copies_by_key:
            copies_by_key[key] = copies_from_regions(target, regions)
        copies, read = with_source_strides(copies_by_key[key], [part.tensor.detach() for part in parts])
        first = len(group.operands)
        fills = target.fills if _ends_copies(target, copies) else ()  # one process writes them
        group.targets.append(target._replace(sources=tuple(range(first, first + len(read))), fills=fills))
        group.copies.append(copies)
        group.places.append(place)
        group.operands.extend(read)
    return [_slabs_on(device, group, most_bytes) for device, group in by_device.items()]


class _Group(NamedTuple):
    """The targets that are computed on one device."""

    targets: list[Target]
    """Targets. Their sources are rows of ``operands``."""
    copies: list[Sequence[StridedCopy]]
    """The copies of each target."""
    places: list[tuple[int, int]]
    """Output file and offset of each target."""
    operands: list[Tensor]
    """Tensors that the copies read."""


class _InMemory(NamedTuple):
    """Locations of tensors as ``writes.SourceLocations``: each tensor is a file of its own, and starts at byte 0."""

    dtypes: Sequence[str]
    file_ids: Sequence[int]
    offsets: Sequence[int]


def _ends_copies(target: Target, copies: Sequence[StridedCopy]) -> bool:
    """Return whether one of these copies writes the last element of a target that copies fill."""
    return _end(copies) == _end(target.copies)


def _end(copies: Sequence[StridedCopy]) -> int:
    """Return the last element that copies write; -1 if there are none."""
    ends = (max(copy.target_offsets) + reach(copy.box.shape, copy.box.target_strides) for copy in copies)
    return max(ends, default=-1)


def _slabs_on(device: torch.device, group: _Group, most_bytes: int) -> TensorSlabs:
    operands = group.operands
    dtypes = [dtype_code(tensor.dtype) or "" for tensor in operands]
    sources = _InMemory(dtypes, range(len(operands)), [0] * len(operands))
    schedule = slab_schedule(group.targets, group.copies, sources, group.places, most_bytes=most_bytes)
    transfer = transfer_device(device)
    if transfer is None:
        return TensorSlabs(schedule.by_file(), lambda: HostTensorProducer(operands, schedule.dtypes, most_bytes))
    return TensorSlabs(
        schedule.by_file(), lambda: DeviceTensorProducer(operands, schedule.dtypes, most_bytes, transfer, "auto")
    )
