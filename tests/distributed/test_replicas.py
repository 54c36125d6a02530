"""Tests of which rank reads a replicated part, and which parts are sent."""

import pytest
import torch
from torch.distributed.tensor import DTensor, Replicate, Shard

from automodel_conv.distributed.replicas import targets_to_read
from automodel_conv.planning.boxes import run_of
from automodel_conv.planning.copies import SourceTable, StridedCopy, Target
from automodel_conv.planning.plan import CopyPlan
from tests.distributed.meshes import rank_of_mesh

NAMES = ("replicated", "sharded", "plain", "not in the state")
RUN = (StridedCopy(run_of(4), (0,), (0,), (0,)),)
PLAN = CopyPlan(
    SourceTable(NAMES, ["F32"] * 4, [(4,)] * 4),
    tuple(Target(name, "F32", (4,), -1, (row,), RUN) for row, name in enumerate(NAMES)),
)


def state_on(mesh):
    return {
        "plain": torch.ones(4),
        "replicated": DTensor.from_local(torch.ones(4), mesh, [Replicate()], run_check=False),
        "sharded": DTensor.from_local(torch.ones(2), mesh, [Shard(0)], run_check=False),
        "not in the plan": DTensor.from_local(torch.ones(4), mesh, [Replicate()], run_check=False),
    }


@pytest.mark.parametrize("rank", [0, 1])
def test_only_the_first_replica_reads_and_all_ranks_know_what_is_sent(rank):
    with rank_of_mesh(rank, (2,)) as mesh:
        plan, sent = targets_to_read(PLAN, state_on(mesh), broadcast=True)
    assert sent == ["replicated"]
    assert [target.name for target in plan.targets] == list(NAMES if rank == 0 else NAMES[1:])
    assert plan.sources is PLAN.sources


def test_without_broadcast_every_rank_reads_all_it_holds():
    with rank_of_mesh(1, (2,)) as mesh:
        assert targets_to_read(PLAN, state_on(mesh), broadcast=False) == (PLAN, [])


def test_one_rank_has_nothing_to_send():
    with rank_of_mesh(0, (1,)) as mesh:
        assert targets_to_read(PLAN, state_on(mesh), broadcast=True) == (PLAN, [])
    assert targets_to_read(PLAN, {}, broadcast=True) == (PLAN, [])
