"""Bytes from rank to rank of one group, in batches that are under way together."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from automodel_conv.distributed.collectives import all_gather_bytes, lost_rank_as_error

# Tag of these messages, so that gloo keeps them apart from others of the same group.
_TAG = 0x5EF17


def start_batch(group: Any, sends: Iterable[tuple[int, Tensor]], receives: Iterable[tuple[int, Tensor]]) -> list[Any]:
    """Start to send and to receive tensors; return what has to be waited for.

    Args:
        group: the process group.
        sends: ranks of the group, and a contiguous uint8 tensor for each.
        receives: the same.

    Raises:
        RuntimeError: a rank no longer responds.
    """
    operations = [
        dist.P2POp(operation, tensor, dist.get_global_rank(group, rank), group, _TAG)
        for operation, batch in ((dist.irecv, receives), (dist.isend, sends))
        for rank, tensor in batch
    ]
    return dist.batch_isend_irecv(operations) if operations else []


def wait_for(works: Iterable[Any]) -> None:
    """Wait for what ``start_batch`` started.

    Raises:
        RuntimeError: a rank no longer responds.
    """
    for work in works:
        work.wait()


def exchange_bytes(group: Any, outgoing: Mapping[int, bytes], device: torch.device, what: str) -> dict[int, bytes]:
    """Send bytes to some ranks of a group, and return those that other ranks send to this one, by rank.

    All ranks of the group must call this.

    Args:
        group: the process group.
        outgoing: bytes for each rank.
        device: device that the group sends from.
        what: name of the exchange in error texts.

    Raises:
        RankError: a rank no longer responds.
    """
    own = dist.get_rank(group)
    sizes = json.dumps([own, {rank: len(data) for rank, data in outgoing.items()}]).encode()
    stated = map(json.loads, all_gather_bytes([group], sizes, what))
    lengths = {rank: lengths[str(own)] for rank, lengths in stated if lengths.get(str(own))}
    lengths.pop(own, None)
    receives = {rank: torch.empty(length, dtype=torch.uint8, device=device) for rank, length in lengths.items()}
    sends = [
        (rank, torch.frombuffer(bytearray(data), dtype=torch.uint8).to(device))
        for rank, data in outgoing.items()
        if data and rank != own
    ]
    with lost_rank_as_error(what):
        wait_for(start_batch(group, sends, receives.items()))
    incoming = {rank: data.cpu().numpy().tobytes() for rank, data in receives.items()}
    return {**incoming, own: outgoing[own]} if outgoing.get(own) else incoming
