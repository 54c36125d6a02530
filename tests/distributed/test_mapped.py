"""Real processes: ranks map what they hold of a checkpoint in the model's own layout."""

from __future__ import annotations

import sys

import pytest

pytest.importorskip("transformers", reason="the models are transformers'")

from tests.distributed.starting import said, started

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="files are mapped on Linux")


def test_ranks_map_shards_that_lie_in_one_run_and_not_what_they_receive(tmp_path):
    assert said(started("mapped", 2, tmp_path)["all"]) == [["[false, true]"], ["[true, true]"]]
