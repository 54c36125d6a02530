"""Tests of replicas that are read once per node, with real processes whose nodes are simulated."""

from __future__ import annotations

import pytest
import torch
from torch.distributed.tensor import DTensor, Replicate, Shard

from automodel_conv.distributed.node_replicas import host_name, nodes_for, sharing_ranks
from automodel_conv.errors import ConversionError
from tests.distributed.meshes import rank_of_mesh
from tests.distributed.nodes import DIVISIONS, VALUES
from tests.distributed.starting import results, run_suite
from tests.loopback_store import serve


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    return run_suite("nodes", 4, tmp_path_factory.mktemp("nodes"), [*DIVISIONS, "dies"])


def test_nodes_request_the_bytes_of_a_server_once_each(tmp_path):
    with serve(tmp_path) as server:
        (tmp_path / "url").write_text(server.url)
        results(run_suite("nodes", 4, tmp_path, ["kept"])["kept"])
        counts = {name: len(server.of(f"/{name}.safetensors")) for name in VALUES if name != "empty"}
    # Two loads: each of four ranks requests the header, and one rank of each of two nodes the bytes.
    assert counts == dict.fromkeys(counts, 2 * (4 + 2))


@pytest.mark.parametrize("division", DIVISIONS)
def test_each_node_reads_a_replica_once_and_all_ranks_hold_it(ended, division):
    for read, wanted in results(ended[division]):
        assert read == wanted


def test_fewer_nodes_read_less(ended):
    total = {division: sum(read for read, _ in results(ended[division])) for division in DIVISIONS}
    assert total["one"] < total["halves"] < total["four"]


def test_rank_that_dies_before_it_sends_is_an_error_on_the_others(ended):
    gone, *others = ended["dies"]
    assert not gone.results
    for other in others:
        [error] = other.results
        assert error["error"][0] == "RankError"
        assert "sending replicas on a node was not finished by all ranks" in error["text"]


@pytest.mark.parametrize(
    ("placements", "nodes", "shared"),
    [
        ([Replicate(), Replicate()], "aaaaaa", [0, 1, 2, 3, 4, 5]),
        ([Replicate(), Replicate()], "abcaaa", [0, 3, 4, 5]),
        ([Replicate(), Shard(0)], "aaaaaa", [1, 4]),
        ([Replicate(), Shard(0)], "aaabbb", [4]),
        ([Shard(0), Replicate()], "abcabc", [4]),
        ([Shard(0), Replicate()], "aaaaab", [3, 4]),
        ([Shard(0), Shard(1)], "aaaaaa", [4]),
    ],
)
def test_ranks_share_a_part_on_their_node_only(placements, nodes, shared):
    with rank_of_mesh(4, (2, 3)) as mesh:
        tensor = DTensor.from_local(torch.ones(2, 3), mesh, placements, run_check=False)
        assert sharing_ranks(tensor, dict(enumerate(nodes))) == shared
        assert sharing_ranks(torch.ones(2), dict(enumerate(nodes))) == []


def test_single_process_is_a_node_of_its_own():
    assert nodes_for(False, []) is None
    assert nodes_for(True, []) is None
    assert nodes_for("node", []) == {0: host_name()}


@pytest.mark.parametrize("value", ["nodes", "", 2, None])
def test_other_values_are_refused(value):
    with pytest.raises(ConversionError, match=r"unknown value(.|\n)*False, True or 'node'"):
        nodes_for(value, [])
