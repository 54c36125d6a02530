"""Tests against transformers' tensor-parallel loads: equal if those are right; otherwise this package's are."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers", reason="compares with from_pretrained of transformers")

from tests.distributed.models import TRANSPOSING, rope_types
from tests.distributed.starting import results, run_suite
from tests.distributed.upstream import RIGHT


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """Return each rank's result of transformers' load by type. The suite checks this package's load."""
    ended = run_suite("upstream", 2, tmp_path_factory.mktemp("upstream"))["all"]
    ranks = [{load["name"]: load for load in loads} for loads in results(ended)]
    if any("plain" in load for load in ranks[0].values()):
        pytest.skip("this transformers shards into plain tensors, which do not record what part they are")
    return ranks


@pytest.mark.parametrize("name", RIGHT)
def test_shards_equal_those_of_transformers_if_those_are_right(ranks, name):
    assert [rank[name]["wrong"] for rank in ranks] == [[], []]


def test_permuted_heads_are_right_if_transformers_is_wrong_or_refuses(ranks):
    """Check types of which transformers cuts rows first and then permutes the part as if it were the whole."""
    if not rope_types():
        pytest.skip("this transformers permutes no heads")
    for rank in ranks:
        load = rank[rope_types()[0]]
        if "refused" not in load:
            assert load["wrong"] == load["permuted"]
            assert load["wrong"]


def test_transposed_experts_are_right_if_transformers_refuses(ranks):
    for rank in ranks:
        load = rank[TRANSPOSING]
        assert "refused" in load or load["wrong"] == []
