"""Collectives over the ranks of a load or save, in which all ranks succeed or all ranks raise.

They use torch's process groups, namely those of the meshes that the tensors are distributed on.
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
    """Wait for all ranks at the end of a block, and raise on all ranks if the block failed on any of them.

    A rank that dies is noticed by the time-out of the process groups, as their backend reports it.

    Args:
        groups: process groups, the same on all of their ranks and in the same order. Without groups there is no wait.
        what: name of the block's work in error texts.

    Raises:
        RankError: the block failed on other ranks, or a rank no longer responds. If it failed on this rank, the
            original error is raised instead.
    """
    try:
        yield
    except Exception as error:
        _exchange(groups, error_text(error))
        raise
    errors, lost = _exchange(groups, None)
    if errors:
        raise RankError(
            message(f"{what} failed on {len(errors)} of the participating ranks", found="\n" + listing(errors))
        )
    if lost:
        raise _lost_rank_error(what, "\n" + listing(lost))


def require_same_on_all(groups: Sequence[Any], parts: Iterable[bytes], what: str) -> None:
    """Raise on all ranks of these groups unless all of them pass the same bytes.

    Args:
        groups: see ``all_or_raise``.
        parts: bytes to compare, joined.
        what: name of the compared objects in error texts.

    Raises:
        RankError: the bytes differ, or a rank no longer responds.
    """
    hashes, lost = _exchange(groups, hashlib.blake2b(b"".join(parts), digest_size=16).hexdigest())
    if lost:
        raise _lost_rank_error(f"comparing {what}", "\n" + listing(lost))
    if len(hashes) > 1:
        raise RankError(
            message(
                f"{what} differ from rank to rank",
                expected="the same names, dtypes and whole shapes on all ranks",
                do="pass the whole state dict on all ranks, and wrap the parts of one rank as DTensors",
            )
        )


def failures_on(groups: Sequence[Any], own: BaseException | None) -> tuple[list[str], list[str]]:
    """Return the errors of all ranks of these groups, and those of ranks that could not reach another one.

    Args:
        groups: see ``all_or_raise``.
        own: the error of this rank, or None.
    """
    exchanged = _exchange(groups, None if own is None else error_text(own))
    return exchanged.texts, exchanged.lost


def error_text(error: BaseException) -> str:
    """Return the text of an error of this rank for other ranks."""
    # Only the reason: the public function that was called has not chosen the advice that applies to it yet.
    text = error.reason() if isinstance(error, ConversionError) else str(error)
    return f"rank {rank_of_this()}: {type(error).__name__}: {text}"


@contextmanager
def lost_rank_as_error(what: str) -> Iterator[None]:
    """Raise RankError for a RuntimeError in a block, which process groups raise for a rank that died or is late."""
    try:
        yield
    except RuntimeError as error:
        raise _lost_rank_error(what, str(error)) from error


def union_over_ranks(groups: Sequence[Any], pairs: Iterable[tuple[str, str]], what: str) -> frozenset[tuple[str, str]]:
    """Return the union of the pairs that the ranks of these groups pass; it is the same on all ranks.

    Raises:
        RankError: a rank no longer responds.
    """
    texts, lost = _exchange(groups, json.dumps(sorted(pairs)))
    if lost:
        raise _lost_rank_error(what, "\n" + listing(lost))
    return frozenset((first, second) for text in texts for first, second in json.loads(text))


def all_gather_bytes(groups: Sequence[Any], data: bytes, what: str) -> list[bytes]:
    """Return the data of all ranks of these groups in the order of the ranks; it is the same on all ranks.

    Raises:
        RankError: a rank no longer responds.
    """
    # Compressed, since it has an entry for each tensor of a model and most entries are the same.
    texts, lost = _exchange(groups, f"{rank_of_this():010} {zlib.compress(data).hex()}")
    if lost:
        raise _lost_rank_error(what, "\n" + listing(lost))
    return [zlib.decompress(bytes.fromhex(text.partition(" ")[2])) for text in sorted(texts)]


def groups_of(meshes: Iterable[Any]) -> list[Any]:
    """Return the process groups of all dimensions of those meshes that contain this rank."""
    return [mesh.get_group(dim) for mesh in meshes if mesh.get_coordinate() is not None for dim in range(mesh.ndim)]


def rank_of_this() -> int:
    """Return the rank of this process; 0 if there is only one process."""
    return dist.get_rank() if dist.is_initialized() else 0


class _Exchanged(NamedTuple):
    """The result of an exchange between ranks."""

    texts: list[str]
    """Texts of the ranks without duplicates."""
    lost: list[str]
    """Errors of the ranks that could not reach another rank."""


def _exchange(groups: Sequence[Any], text: str | None) -> _Exchanged:
    """Gather the texts of all ranks; after all dimensions of a mesh, every rank has the text of every other.

    A rank that cannot reach a rank of one group still takes part in the next groups, which would otherwise wait for it.
    """
    known = _Exchanged([] if text is None else [text], [])
    for group in groups:
        gathered: list[Any] = [None] * dist.get_world_size(group)
        try:
            dist.all_gather_object(gathered, known, group=group)
        except RuntimeError as error:  # backends raise it for a rank that died or is late
            known.lost.append(f"rank {rank_of_this()}: {error}")
        else:
            columns = zip(*gathered, strict=True)
            known = _Exchanged(*(list(dict.fromkeys(chain.from_iterable(column))) for column in columns))
    return known


def send_replicas(tensors: Sequence[Tensor], parts: Sequence[Tensor]) -> None:
    """Copy the part that the first replica holds to the other replicas, in place.

    Args:
        tensors: DTensors, the same on all ranks and in the same order.
        parts: the part of each tensor that this rank holds. It is overwritten unless this rank is the first replica. A
            part that is not contiguous is copied through a contiguous buffer.

    Raises:
        RankError: another rank no longer responds.
    """
    for tensor, part in zip(tensors, parts, strict=True):
        buffer = part.detach().contiguous()
        for dim, placement in enumerate(tensor.placements):  # type: ignore[attr-defined]
            if placement.is_replicate() and buffer.numel():
                # The first rank of each dimension sends, one dimension after the other, so that all ranks receive it.
                group = tensor.device_mesh.get_group(dim)  # type: ignore[attr-defined]
                data = buffer.reshape(-1).view(torch.uint8)
                with lost_rank_as_error("sending replicas"):
                    dist.broadcast(data, src=dist.get_global_rank(group, 0), group=group)
        if buffer.data_ptr() != part.data_ptr():
            part.detach().copy_(buffer)


def _lost_rank_error(what: str, found: str) -> RankError:
    return RankError(
        message(
            f"{what} was not finished by all ranks",
            found=found,
            do="read the output of the other ranks: one has ended, or is slower than the time-out of its process group",
        )
    )
