"""From tensors in memory to slabs: what this process holds of each source, on whatever device, and so writes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from automodel_conv.dtypes import dtype_code
from automodel_conv.errors import ConversionError, UnsupportedError, message
from automodel_conv.execution.cuda import transfer_device
from automodel_conv.execution.memory import with_source_strides
from automodel_conv.execution.writing import DeviceTensorProducer, HostTensorProducer, SlabProducer
from automodel_conv.planning.boxes import NotAffine, Piece, chain
from automodel_conv.planning.copies import StridedCopy, Target, group_pieces
from automodel_conv.planning.plan import CopyPlan
from automodel_conv.planning.regions import Region
from automodel_conv.schedule.writes import Slab, slab_schedule


class LocalTensor(NamedTuple):
    """A region of a source, and the tensor of its local shape that holds it; any strides, any device."""

    region: Region
    tensor: Tensor


# Of each source of a target, what is held.
_Regions = tuple[tuple[Region, ...], ...]


class TensorSlabs(NamedTuple):
    """Slabs made of the tensors of one device, by the number of their file, and what starts their maker in a thread."""

    by_file: dict[int, list[Slab]]
    start: Callable[[], SlabProducer]

    @property
    def nbytes(self) -> int:
        return sum(slab.nbytes for slabs in self.by_file.values() for slab in slabs)


def tensor_slabs(
    plan: CopyPlan,
    local_tensors: Mapping[int, Sequence[LocalTensor]],
    places: Sequence[tuple[int, int]],
    *,
    most_bytes: int,
) -> list[TensorSlabs]:
    """What writes those parts of a plan's targets that are made of what is held.

    Args:
        holdings: by source row; they share no element. Of rows that are missing nothing is written.
        places: of each target, see ``slab_schedule``.
        most_bytes: of a slab, see there.

    Raises:
        ConversionError: what a target is made of is on several devices.
        UnsupportedError: a target is not made of regions like these by strided copies.
    """
    by_device: dict[torch.device, _Group] = {}
    chained: dict[tuple[int, _Regions], Sequence[StridedCopy]] = {}  # by identity of copies, which layers share
    for target, place in zip(plan.targets, places, strict=True):
        held = [holding for row in target.sources for holding in local_tensors.get(row, ())]
        if not held or not prod(target.shape):
            continue
        devices = {holding.tensor.device for holding in held}
        if len(devices) > 1:
            raise ConversionError(
                message(f"the parts of {target.name} are on several devices", found=sorted(map(str, devices)))
            )
        group = by_device.setdefault(devices.pop(), _Group([], [], [], []))
        regions = tuple(tuple(holding.region for holding in local_tensors.get(row, ())) for row in target.sources)
        key = id(target.copies), regions
        if key not in chained:
            chained[key] = _from_held(target, regions)
        copies, read = with_source_strides(chained[key], [holding.tensor.detach() for holding in held])
        first = len(group.operands)
        group.targets.append(target._replace(sources=tuple(range(first, first + len(read)))))
        group.copies.append(copies)
        group.places.append(place)
        group.operands.extend(read)
    return [_slabs_on(device, group, most_bytes) for device, group in by_device.items()]


class _Group(NamedTuple):
    """Targets made on one device; their sources are rows of ``operands``."""

    targets: list[Target]
    copies: list[Sequence[StridedCopy]]
    places: list[tuple[int, int]]
    operands: list[Tensor]


class _InMemory(NamedTuple):
    """Sources that each lie in memory of their own; see ``writes.Places``."""

    dtypes: Sequence[str]
    file_ids: Sequence[int]
    offsets: Sequence[int]


def _slabs_on(device: torch.device, group: _Group, most_bytes: int) -> TensorSlabs:
    operands = group.operands
    codes = [dtype_code(tensor.dtype) or "" for tensor in operands]
    sources = _InMemory(codes, range(len(operands)), [0] * len(operands))
    made = slab_schedule(group.targets, group.copies, sources, group.places, most_bytes=most_bytes)
    streamed = transfer_device(device)
    if streamed is None:
        return TensorSlabs(made.by_file(), lambda: HostTensorProducer(operands, made.dtypes, most_bytes))
    return TensorSlabs(
        made.by_file(), lambda: DeviceTensorProducer(operands, made.dtypes, most_bytes, streamed, "auto")
    )


def _from_held(target: Target, regions: _Regions) -> Sequence[StridedCopy]:
    """The copies of a target that read what is held; ordinals number the holdings of its sources, one after another."""
    if all(len(held) == 1 and held[0].is_whole for held in regions):
        return target.copies
    pieces: list[Piece] = []
    for copy in target.copies:
        for piece in copy.pieces():
            before = sum(map(len, regions[: piece.source]))
            for number, region in enumerate(regions[piece.source]):
                pieces += _read_from(region, piece, before + number, target)
    return group_pieces(pieces)


def _read_from(region: Region, piece: Piece, ordinal: int, target: Target) -> list[Piece]:
    placed = [part.inverse()._replace(source=ordinal) for part in region.pieces()]
    try:
        return [made.canonical() for made in chain(placed, [piece], prod(region.shape))]
    except NotAffine as error:
        text = f"{target.name} cannot be made of a part of its source: {error}"
        raise UnsupportedError(message(text, found=f"{region}")) from None
