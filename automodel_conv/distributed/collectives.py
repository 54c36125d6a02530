"""Collectives over the ranks of a load or save: all ranks succeed, or all raise.

They use torch's process groups, those of the meshes that the tensors are distributed on.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from automodel_conv.errors import ConversionError, RankError, listing, message


@contextmanager
def all_or_raise(groups: Sequence[Any], what: str) -> Iterator[None]:
    """Wait, at the end of a block, until all ranks of these groups are there; if it failed on one, all of them raise.

    A rank that dies surfaces as the time-out of the process groups, as their backend reports it.

    Args:
        groups: process groups, the same on all of their ranks and in the same order; none: nothing is waited for.

    Raises:
        RankError: the block failed on other ranks, or one of them is gone. The rank's own error comes first.
    """
    try:
        yield
    except Exception as error:
        # The function that was called has not yet said which of the advice it can follow.
        text = error.reason() if isinstance(error, ConversionError) else str(error)
        _exchange(groups, f"rank {rank_of_this()}: {type(error).__name__}: {text}")
        raise
    heard = _exchange(groups, None)
    if heard.told:
        raise RankError(
            message(
                f"{what} failed on {len(heard.told)} of the ranks that do it together", found="\n" + listing(heard.told)
            )
        )
    if heard.lost:
        raise _lost_rank_error(what, "\n" + listing(heard.lost))


def same_on_all(groups: Sequence[Any], parts: Iterable[bytes], what: str) -> None:
    """Make sure that all ranks of these groups have the same bytes.

    Raises:
        RankError: they do not, on all ranks, or one of them is gone.
    """
    heard = _exchange(groups, hashlib.blake2b(b"".join(parts), digest_size=16).hexdigest())
    if heard.lost:
        raise _lost_rank_error(f"comparing {what}", "\n" + listing(heard.lost))
    if len(heard.told) > 1:
        raise RankError(
            message(f"{what} differ from rank to rank", expected="the same names, dtypes and whole shapes on all ranks")
        )


def union_over_ranks(groups: Sequence[Any], pairs: Iterable[tuple[str, str]], what: str) -> frozenset[tuple[str, str]]:
    """The pairs that any rank of these groups has found, the same on all of them.

    Raises:
        RankError: one of the ranks is gone.
    """
    heard = _exchange(groups, json.dumps(sorted(pairs)))
    if heard.lost:
        raise _lost_rank_error(what, "\n" + listing(heard.lost))
    return frozenset((first, second) for told in heard.told for first, second in json.loads(told))


def all_gather_bytes(groups: Sequence[Any], data: bytes, what: str) -> list[bytes]:
    """The texts of all ranks of these groups, by rank; the same on all of them.

    Raises:
        RankError: one of the ranks is gone.
    """
    # Packed, since it has something on each tensor of a model and most are alike.
    heard = _exchange(groups, f"{rank_of_this():010} {zlib.compress(data).hex()}")
    if heard.lost:
        raise _lost_rank_error(what, "\n" + listing(heard.lost))
    return [zlib.decompress(bytes.fromhex(told.partition(" ")[2])) for told in sorted(heard.told)]


def groups_of(meshes: Iterable[Any]) -> list[Any]:
    """The process groups of all dimensions of meshes that this rank is in."""
    return [mesh.get_group(dim) for mesh in meshes if mesh.get_coordinate() is not None for dim in range(mesh.ndim)]


def rank_of_this() -> int:
    """The number of this process among all; 0 where there is only one."""
    return dist.get_rank() if dist.is_initialized() else 0


class _Messages(NamedTuple):
    """What ranks had to tell, each thing once, and which of them could not reach another one."""

    told: list[str]
    lost: list[str]


def _exchange(groups: Sequence[Any], text: str | None) -> _Messages:
    """What ranks have to tell: after all dimensions of a mesh, every rank has heard of every other.

    A rank that cannot reach one in a group still tells those in the next, who would wait for it otherwise.
    """
    known = _Messages([] if text is None else [text], [])
    for group in groups:
        heard: list[Any] = [None] * dist.get_world_size(group)
        try:
            dist.all_gather_object(heard, known, group=group)
        except RuntimeError as error:  # what backends raise for a rank that is gone or late
            known.lost.append(f"rank {rank_of_this()}: {error}")
        else:
            known = _Messages(*(list(dict.fromkeys(chain.from_iterable(lines))) for lines in zip(*heard, strict=True)))
    return known


def send(tensors: Sequence[Tensor], parts: Sequence[Tensor]) -> None:
    """Give what the first of each set of replicas holds to the others, in place.

    Args:
        tensors: DTensors, the same on all ranks and in the same order.
        parts: of each, what this rank holds; written where this rank is not the first replica. One that is not
            contiguous goes through a contiguous copy of its own.

    Raises:
        RankError: another rank is gone.
    """
    for tensor, part in zip(tensors, parts, strict=True):
        whole = part.detach().contiguous()
        for dim, placement in enumerate(tensor.placements):  # type: ignore[attr-defined]
            if placement.is_replicate() and whole.numel():
                # From the first in this dimension, along one dimension after the other: then all have it.
                group = tensor.device_mesh.get_group(dim)  # type: ignore[attr-defined]
                sent = whole.reshape(-1).view(torch.uint8)
                try:
                    dist.broadcast(sent, src=dist.get_global_rank(group, 0), group=group)
                except RuntimeError as error:
                    raise _lost_rank_error("sending replicas", str(error)) from error
        if whole.data_ptr() != part.data_ptr():
            part.detach().copy_(whole)


def _lost_rank_error(what: str, found: str) -> RankError:
    return RankError(
        message(f"{what} was not finished by all ranks", found=found, do="look at the other ranks' errors")
    )
