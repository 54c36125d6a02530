"""Tests of the bytes that a web server sends to each rank: those that the rank owns, and headers."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers", reason="needs models of transformers")

from automodel_conv.files.remote.connections import basic
from tests.distributed.reading import FIRST_DIMENSION
from tests.distributed.remote_reading import KINDS, URL, Owned
from tests.distributed.starting import results, run_suite
from tests.loopback_store import serve


@pytest.mark.parametrize("world", KINDS)
def test_a_rank_receives_its_own_bytes(world, tmp_path):
    """Allow two percent more for small gaps; ranges from the first byte of a file are for its header."""
    with serve(tmp_path) as server:
        (tmp_path / URL).write_text(server.url)
        ranks = results(run_suite("remote_reading", world, tmp_path)["all"])
        requests = server.of(".safetensors")
    loads = [Owned(**load) for of_rank in ranks for load in of_rank]
    assert len(loads) == world * len(KINDS[world])
    for load in loads:
        own = [one for one in requests if one.headers["authorization"] == basic(load.user, "x")]
        data = sum(one.sent for one in own if not one.range.startswith("bytes=0-"))
        assert data > 0.9 * load.owned, load
        assert data <= 1.02 * (load.owned if load.kind in FIRST_DIMENSION else load.rows), load
        assert load.received >= sum(one.sent for one in own)
