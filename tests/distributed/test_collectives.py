"""Tests of collectives with threads as ranks: all ranks get the values of one rank, and raise its errors."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import Replicate, Shard

from automodel_conv.distributed import collectives
from automodel_conv.distributed.collectives import (
    all_gather_bytes,
    all_or_raise,
    groups_of,
    rank_of_this,
    require_same_on_all,
    send_replicas,
    union_over_ranks,
)
from automodel_conv.errors import ConversionError, RankError, ReadError, message
from tests.distributed.meshes import Group, Ranks, rank_of_mesh


@pytest.fixture
def ranks(monkeypatch):
    made = Ranks()
    monkeypatch.setattr(collectives, "dist", made)
    return made


def square():
    """Return the groups of each rank of a 2 x 2 mesh: those of its column and of its row."""
    columns, rows = [Group([0, 2]), Group([1, 3])], [Group([0, 1]), Group([2, 3])]
    return lambda rank: [columns[rank % 2], rows[rank // 2]]


def test_an_error_of_one_rank_is_raised_on_all_with_its_rank_and_reason(ranks):
    groups = square()

    def work(rank):
        with all_or_raise(groups(rank), "loading"):
            if rank == 3:
                raise ReadError(message("no disk", do=["{threads=1} helps", "buy one"]))

    *others, own = ranks.run(4, work)
    assert type(own) is ReadError
    for error in others:
        assert type(error) is RankError
        assert "loading failed on 1 of the participating ranks" in str(error)
        assert "rank 3: ReadError: no disk" in str(error)
        assert "buy one" in str(error)
        assert "threads=1" not in str(error)


def test_errors_of_several_ranks_are_all_listed(ranks):
    groups = square()

    def work(rank):
        with all_or_raise(groups(rank), "saving"):
            if rank in (1, 2):
                raise ValueError(f"of {rank}")

    errors = ranks.run(4, work)
    assert [type(error) for error in errors] == [RankError, ValueError, ValueError, RankError]
    for error in (errors[0], errors[3]):
        assert "failed on 2 of the participating ranks" in str(error)
        assert "rank 1: ValueError: of 1" in str(error)
        assert "rank 2: ValueError: of 2" in str(error)


def test_without_errors_or_groups_nothing_is_raised(ranks):
    groups = square()

    def work(rank):
        with all_or_raise(groups(rank), "loading"):
            return rank

    assert ranks.run(4, work) == [0, 1, 2, 3]
    with all_or_raise([], "loading"):
        pass
    with pytest.raises(ZeroDivisionError), all_or_raise([], "loading"):
        1 / 0  # noqa: B018


def test_a_rank_that_is_gone_is_an_error_on_all_that_are_left(ranks):
    groups = square()

    def work(rank):
        if rank == 3:
            for group in groups(rank):
                group.barrier.abort()
            return "gone"
        with all_or_raise(groups(rank), "loading"):
            pass
        return None

    *left, _ = ranks.run(4, work)
    for error in left:
        assert type(error) is RankError
        assert "loading was not finished by all ranks" in str(error)


def test_equal_bytes_pass_and_other_bytes_are_refused_on_all_ranks(ranks):
    groups = square()
    assert ranks.run(4, lambda rank: require_same_on_all(groups(rank), [b"a", b"b"], "plans")) == [None] * 4
    parts = {0: [b"ab"], 1: [b"a", b"b"], 2: [b"", b"ab"], 3: [b"ba"]}
    for error in ranks.run(4, lambda rank: require_same_on_all(groups(rank), parts[rank], "plans")):
        assert type(error) is RankError
        assert "plans differ from rank to rank" in str(error)


def test_pairs_of_all_ranks_are_united(ranks):
    groups = square()
    pairs = [[], [("a", "b")], [("c", "d"), ("a", "b")], [("e", "f")]]
    wanted = frozenset({("a", "b"), ("c", "d"), ("e", "f")})
    assert ranks.run(4, lambda rank: union_over_ranks(groups(rank), pairs[rank], "ties")) == [wanted] * 4
    assert union_over_ranks([], [], "ties") == frozenset()


def test_bytes_come_in_the_order_of_the_ranks_equal_ones_too(ranks):
    group = Group(range(12))
    data = [b"same"] * 5 + [b""] * 2 + [bytes([rank]) for rank in range(7, 12)]
    assert ranks.run(12, lambda rank: all_gather_bytes([group], data[rank], "sums")) == [data] * 12


@pytest.mark.parametrize("transposed", [False, True])
def test_replicas_are_those_of_the_first_rank_on_each_replicated_dimension(ranks, transposed):
    groups = square()
    values = [torch.arange(6.0).reshape(2, 3) + 10 * rank for rank in range(4)]
    parts = [value.t().contiguous().t() if transposed else value.clone() for value in values]

    def work(rank):
        mesh = SimpleNamespace(get_group=lambda dim: groups(rank)[dim])
        tensor = SimpleNamespace(placements=(Replicate(), Shard(0)), device_mesh=mesh)
        empty = SimpleNamespace(placements=(Replicate(), Replicate()), device_mesh=mesh)
        send_replicas([tensor, empty], [parts[rank], torch.empty(0, 3)])

    assert ranks.run(4, work) == [None] * 4
    for rank, part in enumerate(parts):
        assert torch.equal(part, values[rank % 2])


def test_a_rank_that_is_gone_cannot_send_its_replica(ranks):
    group = Group([0, 1])

    def work(rank):
        if rank == 0:
            return group.barrier.abort()
        mesh = SimpleNamespace(get_group=lambda dim: group)
        send_replicas([SimpleNamespace(placements=(Replicate(),), device_mesh=mesh)], [torch.ones(2)])

    error = ranks.run(2, work)[1]
    assert isinstance(error, ConversionError)
    assert "sending replicas was not finished" in str(error)


def test_groups_are_those_of_all_dimensions_of_the_meshes_that_have_this_rank():
    assert rank_of_this() == 0
    with rank_of_mesh(5, (2, 3), "dp", "tp") as mesh:
        assert rank_of_this() == 5
        found = groups_of([mesh["tp"], SimpleNamespace(get_coordinate=lambda: None), mesh])
        assert [dist.get_process_group_ranks(group) for group in found] == [[3, 4, 5], [2, 5], [3, 4, 5]]


def test_a_real_group_of_one_rank_agrees_with_itself(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        groups = [dist.group.WORLD]
        assert all_gather_bytes(groups, b"mine", "sums") == [b"mine"]
        require_same_on_all(groups, [b"mine"], "plans")
        with pytest.raises(ZeroDivisionError), all_or_raise(groups, "loading"):
            1 / 0  # noqa: B018
    finally:
        dist.destroy_process_group()
