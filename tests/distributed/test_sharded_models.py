"""Tests with 2 to 8 real processes: models sharded in every way are loaded and saved, each rank its own parts."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers", reason="needs models of transformers")

from tests.distributed.sharded_models import CHECKS
from tests.distributed.starting import results, run_suite


@pytest.mark.parametrize("world", [2, 4, *(pytest.param(world, marks=pytest.mark.long) for world in (3, 8))])
def test_every_rank_holds_its_slice_of_the_full_model_and_saves_it(world, tmp_path):
    """Run loads, state dicts, saves and loads by ``torch.distributed.checkpoint`` for all types and shardings."""
    ended = run_suite("sharded_models", world, tmp_path)["all"]
    assert results(ended) == [[list(check) for check in CHECKS[world]]] * world
