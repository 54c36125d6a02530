"""Tests with real processes: ranks map their parts of a checkpoint in the model's own layout."""

from __future__ import annotations

import sys

import pytest

pytest.importorskip("transformers", reason="needs models of transformers")

from tests.distributed.starting import results, run_suite

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="files are mapped on Linux")


def test_ranks_map_contiguous_shards_and_not_received_ones(tmp_path):
    assert results(run_suite("mapped", 2, tmp_path)["all"]) == [["[false, true]"], ["[true, true]"]]
