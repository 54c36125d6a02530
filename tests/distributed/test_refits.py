"""Tests of refits with 3 to 8 real processes: each engine gets what a load of the trainer's checkpoint gives it.

``python -m pytest -m long tests/distributed/test_refits.py`` runs every combination of kinds and types.
"""

from __future__ import annotations

import pytest

pytest.importorskip("transformers", reason="needs models of transformers")

from tests.distributed.refit_toys import VARIANTS
from tests.distributed.refits import SPLITS, WORLD, checks_of
from tests.distributed.starting import results, run_suite

# As many as end long before the deadline of a group.
CHECKS_OF_A_PART = 40


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    return run_suite("refits", WORLD, tmp_path_factory.mktemp("refits"), SPLITS)


@pytest.mark.parametrize("split", SPLITS)
def test_engines_hold_what_loads_give_and_each_byte_is_sent_once(ended, split):
    """Refit three times for each pair of kinds; bytes, messages and memory are those of the forecast."""
    trainers, engines = map(int, split.split("+"))
    wanted = [list(check) for check in checks_of(split)]
    outside = WORLD - trainers - engines
    assert results(ended[split]) == [wanted] * (trainers + engines) + [[]] * outside


@pytest.mark.long
@pytest.mark.parametrize("split", SPLITS)
def test_every_combination_of_kinds_and_types(split, tmp_path):
    parts = -(-len(checks_of(split, every=True)) // CHECKS_OF_A_PART)
    variants = [f"{number} of {parts} {split}" for number in range(parts)]
    done = [results(run_suite("refits", WORLD, tmp_path, [variant])[variant])[0] for variant in variants]
    assert sum(map(len, done)) == len(checks_of(split, every=True))


def test_unusual_tensors_buckets_groups_and_places(tmp_path):
    for variant, ranks in run_suite("refit_toys", 4, tmp_path, list(VARIANTS)).items():
        assert results(ranks) == [[variant]] * 4
