"""Find which ranks hold which parts of tensors, which rank writes each part, and whether replicas hold the same bytes.

Tensors with the same name, shape and number of elements need not be replicas. Experts that each rank holds alone, as
plain tensors or as DTensors on some of the ranks, agree in all three.
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

ALIKE = (
    "wrap rank-local experts as DTensors with Shard(0) on the mesh that divides them, or gather them first; make "
    "replicas equal, as torch.distributed.broadcast does"
)


class Holders(NamedTuple):
    """Who holds the parts of tensors, as far as this rank knows."""

    written: frozenset[str]
    """Names of tensors whose part here this rank writes: of those that hold it, it is the first."""
    shared: frozenset[str]
    """Names of those whose part here other ranks hold too."""
    alike: list[tuple[list[str], list[list[int]]]]
    """Names, and the ranks that hold the same part of each of them; the same on all ranks."""


class _Part(NamedTuple):
    """The part of a tensor that one rank holds."""

    way: str
    """How the tensor is divided: mesh and placements; empty for a plain tensor, and on ranks outside of the mesh."""
    ranks: int
    """How many divide it so."""
    region: str
    held: int
    """Elements here."""
    whole: int


def find_holders(groups: Sequence[Any], tensors: Mapping[str, Tensor], regions: Mapping[str, Region]) -> Holders:
    """Learn from all ranks of these groups what they hold.

    Args:
        groups: see ``together``.
        tensors: with the same names and shapes on all ranks.
        regions: of each, what this rank holds.

    Raises:
        CoverageError: all ranks together do not hold all of a tensor, or not all of them divide it in the same way; the
            same on all ranks, as the next one.
        RankError: one of the ranks is gone.
    """
    names = sorted(tensors)
    here = _parts([tensors[name] for name in names], [regions[name] for name in names])
    own = list(dict.fromkeys(here))
    numbers = {part: number for number, part in enumerate(own)}
    column = np.array([numbers[part] for part in here], np.int32)
    told = all_gather_bytes(groups, json.dumps([own, column.tobytes().hex()]).encode(), "finding out who holds what")
    parts: dict[_Part, int] = {}
    columns = []
    for each in told:
        known, packed = json.loads(each)
        ordinals = np.array([parts.setdefault(_Part(*part), len(parts)) for part in known], np.int32)
        columns.append(ordinals[np.frombuffer(bytes.fromhex(packed), np.int32)])
    if not names:
        return Holders(frozenset(), frozenset(), [])
    ordered, me = list(parts), rank_of_this() if groups else 0
    # Most tensors of a model are divided in the same few ways: each way is looked at once.
    patterns, of = np.unique(np.stack(columns), axis=1, return_inverse=True)
    written, shared, alike = set(), set(), []
    for number, pattern in enumerate(patterns.T):
        those = [names[row] for row in np.flatnonzero(of.reshape(-1) == number)]
        held = [ordered[part] for part in pattern]
        _refuse_gaps(those[0], tensors[those[0]], held)
        by_region: dict[str, list[int]] = {}
        for rank, part in enumerate(held):
            if part.held:
                by_region.setdefault(part.region, []).append(rank)
        for ranks in by_region.values():
            if ranks[0] == me:
                written.update(those)
            if len(ranks) > 1 and me in ranks:
                shared.update(those)
        alike.append((those, [ranks for ranks in by_region.values() if len(ranks) > 1]))
    return Holders(frozenset(written), frozenset(shared), [each for each in alike if each[1]])


def checksums_of_parts(parts: Mapping[str, Tensor], threads: int, most_bytes: int) -> dict[str, int]:
    """The checksum of each, by so many threads, with ``most_bytes`` of scratch each; host memory at 2 GB/s a thread."""
    found: dict[str, int] = {}

    def take(name: str) -> None:
        found[name] = checksum_of(parts[name], most_bytes)

    run_in_threads(sorted(parts, key=lambda name: -parts[name].nbytes), threads, lambda: take)
    return found


def checksum_of(tensor: Tensor, most_bytes: int) -> int:
    """CRC32 of the bytes of a tensor of any strides and device, in the order of its elements."""
    found = 0
    for window in _windows(tensor.detach(), most_bytes):
        here = window.contiguous().cpu()
        found = zlib.crc32(byte_view(here), found)
    return found


def refuse_unlike_replicas(groups: Sequence[Any], holders: Holders, checksums: Mapping[str, int]) -> None:
    """Refuse tensors of which ranks that hold the same part do not hold the same bytes.

    Args:
        checksums: of all names in ``holders.shared``.

    Raises:
        RankError: they do not, the same on all ranks; or one of them is gone.
    """
    if not holders.alike:
        return
    rows = {name: row for row, name in enumerate(name for those, _ in holders.alike for name in those)}
    own = np.zeros(len(rows), np.uint32)
    for name, checksum in checksums.items():
        own[rows[name]] = checksum
    told = [np.frombuffer(each, np.uint32) for each in all_gather_bytes(groups, own.tobytes(), "comparing replicas")]
    unlike: dict[str, str] = {}
    for those, together in holders.alike:
        at = [rows[name] for name in those]
        for ranks in together:
            sums = np.stack([told[rank][at] for rank in ranks])
            for column in np.flatnonzero((sums != sums[0]).any(0)):
                others = [rank for rank, each in zip(ranks, sums[:, column], strict=True) if each != sums[0, column]]
                unlike.setdefault(those[column], _ranks(others, ranks[0]))
    if unlike:
        raise unlike_replicas(sorted(unlike.items()))


def unlike_replicas(found: Sequence[tuple[str, str]]) -> RankError:
    """The error for names whose replicas differ, each with which ranks differ from which."""
    return RankError(
        message(
            f"ranks hold different bytes of {found[0][0]}",
            expected="the same bytes on all ranks that hold a tensor, or the same part of it",
            found=f"{len(found)} tensors that differ:\n" + listing(f"{name}: {ranks}" for name, ranks in found),
            do=ALIKE,
        )
    )


def _parts(tensors: Sequence[Tensor], regions: Sequence[Region]) -> list[_Part]:
    ways: dict[tuple[int, str], tuple[str, int]] = {}
    named: dict[Region, str] = {}
    parts = []
    for tensor, region in zip(tensors, regions, strict=True):
        if region not in named:
            named[region] = _hashed(str(region))
        if is_distributed(tensor) and tensor.device_mesh.get_coordinate() is not None:  # type: ignore[attr-defined]
            mesh, placements = tensor.device_mesh, str(tensor.placements)  # type: ignore[attr-defined]
            key = id(mesh), placements
            if key not in ways:
                ways[key] = _hashed(f"{mesh.mesh.tolist()} {placements}"), mesh.size()
            way, ranks = ways[key]
        else:
            way, ranks = "", 1
        parts.append(_Part(way, ranks, named[region], prod(region.local_shape), prod(region.shape)))
    return parts


def _hashed(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _refuse_gaps(name: str, tensor: Tensor, held: Sequence[_Part]) -> None:
    """Each way of dividing a tensor must have all of its ranks, and all ways must cut the same parts."""
    told: dict[str, int] = {}
    for part in held:
        told[part.way] = told.get(part.way, 0) + 1
    complete = all(not part.way or told[part.way] == part.ranks for part in held)
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


def _windows(tensor: Tensor, most_bytes: int) -> Iterator[Tensor]:
    """A tensor in pieces of at most so many bytes, in the order of its elements."""
    if tensor.nbytes <= most_bytes or not tensor.ndim:
        yield tensor
    elif tensor.is_contiguous():
        yield from tensor.reshape(-1).split(max(1, most_bytes // tensor.element_size()))
    else:
        rows = most_bytes * len(tensor) // tensor.nbytes
        for part in tensor.split(max(1, rows)):
            yield from _windows(part[0], most_bytes) if not rows else iter([part])
