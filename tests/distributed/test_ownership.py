"""Tests with 2 and 4 real processes: every rank yields what a save writes, and holds what its owners are stated to."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers", reason="needs models of transformers")

from tests.distributed.published import EVERY_TYPE, KINDS, SOME_TYPES, TYPES
from tests.distributed.starting import results, run_suite


@pytest.mark.parametrize("world", KINDS)
def test_published_tensors_and_their_owners_are_those_of_the_save(world, tmp_path):
    for ranks in run_suite("published", world, tmp_path, KINDS[world]).values():
        assert results(ranks) == [SOME_TYPES] * world


@pytest.mark.long
@pytest.mark.parametrize("world", KINDS)
def test_published_tensors_of_every_type_are_those_of_the_save(world, tmp_path):
    for ranks in run_suite("published", world, tmp_path, [kind + EVERY_TYPE for kind in KINDS[world]]).values():
        assert results(ranks) == [TYPES] * world
