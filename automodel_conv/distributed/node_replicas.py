"""Replicas on one node: the rank that reads the part of a DTensor for the ranks of its node, and sends it to them."""

from __future__ import annotations

import json
import socket
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from automodel_conv.distributed.collectives import all_gather_bytes, lost_rank_as_error, rank_of_this
from automodel_conv.distributed.placements import is_distributed
from automodel_conv.distributed.point_to_point import start_batch, wait_for
from automodel_conv.errors import ConversionError, message

Nodes = Mapping[int, str]
"""Host name of the node of each rank."""


def host_name() -> str:
    """Return the host name of this machine, by which ranks know that they are on one node."""
    return socket.gethostname()


def nodes_for(broadcast: bool | str, groups: Sequence[Any]) -> Nodes | None:
    """Return the nodes of the ranks of these groups, or None if ranks do not share replicas by node.

    Args:
        broadcast: see ``LoadOptions``.
        groups: process groups of all dimensions of some meshes, the same on all of their ranks and in the same order.

    Raises:
        ConversionError: ``broadcast`` has another value.
        RankError: a rank no longer responds.
    """
    if broadcast not in (False, True, "node"):
        raise ConversionError(
            message("broadcast has an unknown value", expected="False, True or 'node'", found=repr(broadcast))
        )
    if broadcast != "node":
        return None
    own = json.dumps([rank_of_this(), host_name()]).encode()
    return dict(map(json.loads, all_gather_bytes(groups, own, "comparing host names")))


def sharing_ranks(tensor: Tensor, nodes: Nodes) -> list[int]:
    """Return the ranks of this node that hold the same part of a tensor as this rank, in the order of the mesh.

    Empty if the tensor is no DTensor, or this rank is not in its mesh.
    """
    if not is_distributed(tensor):
        return []
    mesh = tensor.device_mesh  # type: ignore[attr-defined]
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        return []
    placements = tensor.placements  # type: ignore[attr-defined]
    index = tuple(
        slice(None) if placement.is_replicate() else at for at, placement in zip(coordinate, placements, strict=True)
    )
    holders = mesh.mesh[index].reshape(-1).tolist()
    own = nodes[rank_of_this()]
    return [rank for rank in holders if nodes[rank] == own]


def send_on_node(tensors: Sequence[Tensor], parts: Sequence[Tensor], nodes: Nodes) -> None:
    """Copy the part that the first of the sharing ranks holds to the others of its node, in place.

    Args:
        tensors: DTensors, in the same order on all ranks that share one.
        parts: the part of each tensor that this rank holds. It is overwritten unless this rank is the first. A part
            that is not contiguous is copied through a contiguous buffer.
        nodes: see ``nodes_for``.

    Raises:
        RankError: another rank no longer responds.
    """
    for tensor, part in zip(tensors, parts, strict=True):
        first, *others = sharing_ranks(tensor, nodes)
        buffer = part.detach().contiguous()
        if buffer.numel():
            data = buffer.reshape(-1).view(torch.uint8)
            reads = rank_of_this() == first
            sends, receives = [(rank, data) for rank in others if reads], [] if reads else [(first, data)]
            with lost_rank_as_error("sending replicas on a node"):
                wait_for(start_batch(dist.group.WORLD, sends, receives))
        if buffer.data_ptr() != part.data_ptr():
            part.detach().copy_(buffer)
