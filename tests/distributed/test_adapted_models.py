"""Tests with two real processes: adapters are merged into the parts of each rank."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers", reason="needs models of transformers")

from tests.distributed.adapted_models import CHECKS
from tests.distributed.starting import results, run_suite


def test_every_rank_holds_its_part_of_the_merged_weights(tmp_path):
    ended = run_suite("adapted_models", 2, tmp_path)["all"]
    assert results(ended) == [CHECKS] * 2
