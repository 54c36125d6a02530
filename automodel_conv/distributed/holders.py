"""Find which ranks hold which parts of tensors, which rank writes each part, and whether replicas hold the same bytes.

Tensors with the same name, shape and number of elements need not be replicas. Rank-local experts, as plain tensors or
as DTensors on some of the ranks, agree in all three.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from math import prod
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from automodel_conv.distributed.collectives import all_gather_bytes, rank_of_this
from automodel_conv.distributed.placements import is_distributed
from automodel_conv.errors import CoverageError, RankError, listing, message
from automodel_conv.execution.buffers import byte_view
from automodel_conv.execution.workers import run_in_threads
from automodel_conv.planning.regions import Region

MAKE_REPLICAS_EQUAL = (
    "wrap rank-local experts as DTensors with Shard(0) on the mesh that divides them, or gather them first; make "
    "replicas equal, as torch.distributed.broadcast does"
)


class Holders(NamedTuple):
    """The ranks that hold the parts of tensors, from the view of one rank."""

    written: frozenset[str]
    """Names of the tensors whose local part this rank writes, as the first of the ranks that hold it."""
    shared: frozenset[str]
    """Names of the tensors whose local part other ranks hold too."""
    replicas: list[tuple[list[str], list[list[int]]]]
    """Names of replicated tensors, and for each part of these the ranks that hold it. The same on all ranks."""


class _Part(NamedTuple):
    """The part of a tensor that one rank holds."""

    division: str
    """Hash of the mesh and the placements; empty for a plain tensor, and on ranks outside the mesh."""
    ranks: int
    """Number of ranks in the mesh; 1 for a plain tensor."""
    region: str
    """Hash of the region of the whole tensor."""
    held: int
    """Number of elements in the part."""
    whole: int
    """Number of elements in the whole tensor."""


def find_holders(groups: Sequence[Any], tensors: Mapping[str, Tensor], regions: Mapping[str, Region]) -> Holders:
    """Exchange with all ranks of these groups which parts of tensors each rank holds.

    Args:
        groups: see ``all_or_raise``.
        tensors: tensors with the same names and whole shapes on all ranks.
        regions: the region of each tensor that this rank holds.

    Raises:
        CoverageError: the ranks do not hold all of a tensor, or divide it in different ways. Raised on all ranks.
        RankError: a rank no longer responds. Raised on all ranks.
    """
    names = sorted(tensors)
    local_parts = _parts([tensors[name] for name in names], [regions[name] for name in names])
    distinct = list(dict.fromkeys(local_parts))
    numbers = {part: number for number, part in enumerate(distinct)}
    column = np.array([numbers[part] for part in local_parts], np.int32)
    data = json.dumps([distinct, column.tobytes().hex()]).encode()
    parts: dict[_Part, int] = {}
    columns = []
    for gathered in all_gather_bytes(groups, data, "determining which ranks hold each part"):
        rank_parts, packed = json.loads(gathered)
        ordinals = np.array([parts.setdefault(_Part(*part), len(parts)) for part in rank_parts], np.int32)
        columns.append(ordinals[np.frombuffer(bytes.fromhex(packed), np.int32)])
    if not names:
        return Holders(frozenset(), frozenset(), [])
    ordered, this_rank = list(parts), rank_of_this() if groups else 0
    # Most tensors of a model are divided in the same few ways, and each of these is examined once.
    patterns, pattern_of = np.unique(np.stack(columns), axis=1, return_inverse=True)
    written, shared, replicas = set(), set(), []
    for number, pattern in enumerate(patterns.T):
        members = [names[row] for row in np.flatnonzero(pattern_of.reshape(-1) == number)]
        held = [ordered[part] for part in pattern]
        _refuse_gaps(members[0], tensors[members[0]], held)
        by_region: dict[str, list[int]] = {}
        for rank, part in enumerate(held):
            if part.held:
                by_region.setdefault(part.region, []).append(rank)
        for ranks in by_region.values():
            if ranks[0] == this_rank:
                written.update(members)
            if len(ranks) > 1 and this_rank in ranks:
                shared.update(members)
        sharing = [ranks for ranks in by_region.values() if len(ranks) > 1]
        if sharing:
            replicas.append((members, sharing))
    return Holders(frozenset(written), frozenset(shared), replicas)


def checksums_of_parts(parts: Mapping[str, Tensor], threads: int, most_bytes: int) -> dict[str, int]:
    """Return the checksum of each part, computed at 2 GB/s a thread from host memory.

    Args:
        parts: tensors by name.
        threads: number of threads that compute checksums.
        most_bytes: scratch memory of each thread in bytes.
    """
    checksums: dict[str, int] = {}

    def compute(name: str) -> None:
        checksums[name] = checksum_of(parts[name], most_bytes)

    run_in_threads(sorted(parts, key=lambda name: -parts[name].nbytes), threads, lambda: compute)
    return checksums


def checksum_of(tensor: Tensor, most_bytes: int) -> int:
    """Return the CRC32 of the bytes of a tensor of any strides and device, in the order of its elements."""
    checksum = 0
    for slice_ in _slices(tensor.detach(), most_bytes):
        local = slice_.contiguous().cpu()
        checksum = zlib.crc32(byte_view(local), checksum)
    return checksum


def refuse_unlike_replicas(groups: Sequence[Any], holders: Holders, checksums: Mapping[str, int]) -> None:
    """Refuse tensors if ranks that hold the same part of one hold different bytes.

    Args:
        groups: see ``all_or_raise``.
        holders: result of ``find_holders``.
        checksums: checksums of the local parts of all names in ``holders.shared``.

    Raises:
        RankError: replicas differ, or a rank no longer responds. Raised on all ranks.
    """
    if not holders.replicas:
        return
    rows = {name: row for row, name in enumerate(name for names, _ in holders.replicas for name in names)}
    own = np.zeros(len(rows), np.uint32)
    for name, checksum in checksums.items():
        own[rows[name]] = checksum
    rank_data = all_gather_bytes(groups, own.tobytes(), "comparing replicas")
    gathered = [np.frombuffer(data, np.uint32) for data in rank_data]
    unlike: dict[str, str] = {}
    for names, sharing in holders.replicas:
        columns = [rows[name] for name in names]
        for ranks in sharing:
            sums = np.stack([gathered[rank][columns] for rank in ranks])
            for column in np.flatnonzero((sums != sums[0]).any(0)):
                others = [rank for rank, each in zip(ranks, sums[:, column], strict=True) if each != sums[0, column]]
                unlike.setdefault(names[column], _ranks(others, ranks[0]))
    if unlike:
        raise unlike_replicas(sorted(unlike.items()))


def unlike_replicas(differences: Sequence[tuple[str, str]]) -> RankError:
    """Return the error for replicas that differ, given as pairs of a name and the ranks that differ."""
    listed = listing(f"{name}: {ranks}" for name, ranks in differences)
    return RankError(
        message(
            f"ranks hold different bytes of {differences[0][0]}",
            expected="the same bytes on all ranks that hold a tensor, or the same part of it",
            found=f"{len(differences)} tensors that differ:\n{listed}",
            do=MAKE_REPLICAS_EQUAL,
        )
    )


def _parts(tensors: Sequence[Tensor], regions: Sequence[Region]) -> list[_Part]:
    divisions: dict[tuple[int, str], tuple[str, int]] = {}
    region_hashes: dict[Region, str] = {}
    parts = []
    for tensor, region in zip(tensors, regions, strict=True):
        if region not in region_hashes:
            region_hashes[region] = _hashed(str(region))
        if is_distributed(tensor) and tensor.device_mesh.get_coordinate() is not None:  # type: ignore[attr-defined]
            mesh, placements = tensor.device_mesh, str(tensor.placements)  # type: ignore[attr-defined]
            key = id(mesh), placements
            if key not in divisions:
                divisions[key] = _hashed(f"{mesh.mesh.tolist()} {placements}"), mesh.size()
            division, ranks = divisions[key]
        else:
            division, ranks = "", 1
        parts.append(_Part(division, ranks, region_hashes[region], prod(region.local_shape), prod(region.shape)))
    return parts


def _hashed(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _refuse_gaps(name: str, tensor: Tensor, held: Sequence[_Part]) -> None:
    """Raise CoverageError unless every division of a tensor has all of its ranks and all divisions cut the same parts.

    Args:
        name: name of the tensor.
        tensor: the tensor, for its whole shape.
        held: part of each rank.
    """
    counts: dict[str, int] = {}
    for part in held:
        counts[part.division] = counts.get(part.division, 0) + 1
    complete = all(not part.division or counts[part.division] == part.ranks for part in held)
    regions = {part.region: part.held for part in held}
    if complete and sum(regions.values()) == tensor.numel():
        return
    raise CoverageError(
        message(
            f"the ranks do not hold all of {name}, or divide it in different ways",
            expected=f"{tensor.numel()} elements, shape {list(tensor.shape)}, cut into the same parts by all",
            found="\n" + listing(f"rank {rank}: {part.held} elements" for rank, part in enumerate(held)),
            do="give all ranks DTensors of the same mesh, or plain tensors on all",
        )
    )


def _ranks(others: Sequence[int], first: int) -> str:
    shown = ", ".join(map(str, others[:8])) + (f" and {len(others) - 8} more" if len(others) > 8 else "")
    return f"rank {shown} and rank {first}" if len(others) == 1 else f"ranks {shown} and rank {first}"


def _slices(tensor: Tensor, most_bytes: int) -> Iterator[Tensor]:
    """Yield slices of a tensor, each of at most ``most_bytes``, in the order of its elements."""
    if tensor.nbytes <= most_bytes or not tensor.ndim:
        yield tensor
    elif tensor.is_contiguous():
        yield from tensor.reshape(-1).split(max(1, most_bytes // tensor.element_size()))
    else:
        rows = most_bytes * len(tensor) // tensor.nbytes
        for part in tensor.split(max(1, rows)):
            yield from _slices(part[0], most_bytes) if not rows else iter([part])
