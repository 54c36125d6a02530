"""Choose the rank that reads each replicated part of a DTensor, and send the part to the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from automodel_conv.distributed.collectives import rank_of_this, send_replicas
from automodel_conv.distributed.node_replicas import Nodes, send_on_node, sharing_ranks
from automodel_conv.distributed.placements import is_distributed, is_first_replica, is_replicated
from automodel_conv.planning.plan import CopyPlan


def targets_to_read(
    plan: CopyPlan, state: Mapping[str, Tensor], broadcast: bool | str, nodes: Nodes | None = None
) -> tuple[CopyPlan, list[str]]:
    """Return the plan of the targets that this rank reads, and the names of targets that ranks send to each other.

    Args:
        plan: the plan of this rank.
        state: the tensors of the model by name.
        broadcast: see ``LoadOptions``.
        nodes: nodes of the ranks, if only the ranks of one node send to each other.
    """
    if not broadcast:
        return plan, []
    names = [target.name for target in plan.targets if target.name in state]
    if nodes is None:
        shared = [name for name in names if is_distributed(state[name]) and is_replicated(state[name])]
        received = {name for name in shared if not is_first_replica(state[name])}
    else:
        ranks = {name: sharing_ranks(state[name], nodes) for name in names}
        shared = [name for name in names if len(ranks[name]) > 1]
        received = {name for name in shared if ranks[name][0] != rank_of_this()}
    return replace(plan, targets=tuple(t for t in plan.targets if t.name not in received)), shared


def send_shared(tensors: Sequence[Tensor], parts: Sequence[Tensor], nodes: Nodes | None) -> None:
    """Send the parts that only one rank has read; see ``send_on_node`` and, without nodes, ``send_replicas``.

    Raises:
        RankError: another rank no longer responds.
    """
    if nodes is None:
        send_replicas(tensors, parts)
    else:
        send_on_node(tensors, parts, nodes)
