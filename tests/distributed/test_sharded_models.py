"""Real processes, 2 to 8: models sharded in every way are loaded and saved, each rank its own parts."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers", reason="the models are transformers'")

from tests.distributed.sharded_models import CHECKS
from tests.distributed.starting import said, started


@pytest.mark.parametrize("world", [2, 4, *(pytest.param(world, marks=pytest.mark.long) for world in (3, 8))])
def test_every_rank_holds_its_slice_of_the_full_model_and_saves_it(world, tmp_path):
    """Loads, state dicts, saves and loads by ``torch.distributed.checkpoint``, of all types in all ways."""
    ended = started("sharded_models", world, tmp_path)["all"]
    assert said(ended) == [[list(check) for check in CHECKS[world]]] * world
