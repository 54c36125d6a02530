"""transformers' tensor-parallel loads: equal where they are right; where they are not, this package's is."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers", reason="what is compared with is transformers' from_pretrained")

from tests.distributed.models import TRANSPOSING, rope_types
from tests.distributed.starting import said, started
from tests.distributed.upstream import RIGHT


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each rank says of transformers' load of each type, after it has found this package's load right."""
    ended = started("upstream", 2, tmp_path_factory.mktemp("upstream"))["all"]
    ranks = [{load["name"]: load for load in loads} for loads in said(ended)]
    if any("plain" in load for load in ranks[0].values()):
        pytest.skip("this transformers shards into plain tensors, which do not say what part they are")
    return ranks


@pytest.mark.parametrize("name", RIGHT)
def test_shards_equal_those_of_transformers_where_they_are_right(ranks, name):
    assert [rank[name]["wrong"] for rank in ranks] == [[], []]


def test_heads_that_are_permuted_are_right_where_transformers_has_them_wrong_or_refuses(ranks):
    """It takes its part of the rows first and permutes them then, as if they were all."""
    if not rope_types():
        pytest.skip("this transformers permutes no heads")
    for rank in ranks:
        load = rank[rope_types()[0]]
        if "refused" not in load:
            assert load["wrong"] == load["permuted"]
            assert load["wrong"]


def test_experts_that_are_transposed_are_right_where_transformers_refuses(ranks):
    for rank in ranks:
        load = rank[TRANSPOSING]
        assert "refused" in load or load["wrong"] == []
