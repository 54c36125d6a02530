"""Tests of the bytes that a rank reads: its own bytes, or at most the rows that contain them."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers", reason="needs models of transformers")

from tests.distributed.reading import FIRST_DIMENSION, KINDS, Counts
from tests.distributed.starting import results, run_suite


@pytest.mark.parametrize("world", KINDS)
def test_a_rank_reads_its_own_bytes(world, tmp_path):
    """Allow one percent more for small gaps that are thrown away; inner dimensions read whole rows, and no others."""
    ranks = [[Counts(**load) for load in loads] for loads in results(run_suite("reading", world, tmp_path)["all"])]
    for loads in ranks:
        assert [load.kind for load in loads] == KINDS[world]
        for load in loads:
            assert load.owned <= load.reported == load.read
            if load.kind in FIRST_DIMENSION:
                assert load.read <= 1.01 * load.owned, load
            else:
                assert load.owned < load.read <= 1.01 * load.rows, load
    for number, kind in enumerate(KINDS[world]):
        if kind == "fsdp":  # all ranks together, everything once
            assert sum(loads[number].owned for loads in ranks) == ranks[0][number].owned * world
