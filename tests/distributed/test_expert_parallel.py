"""Tests of experts divided over ranks: the whole model is saved, or nothing is and every rank has the same error."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers", reason="needs models of transformers")

from tests.distributed.expert_parallel import VARIANTS
from tests.distributed.starting import results, run_suite

# Kind -> error type and parts of its text.
EXPERTS = "CoverageError", "experts.gate_up_proj does not hold all experts", "8 experts, as Qwen3MoeConfig.num_experts"
ROUTED = "CoverageError", "8 experts, as model.layers.1.mlp.gate.weight says", "found:    4 experts"
UNLIKE = "RankError", "ranks hold different bytes of model.layers.1.mlp.experts.", "rank 0"
REFUSED = {
    "local experts": EXPERTS,
    "local experts, plain": EXPERTS,
    "local experts, fsdp": EXPERTS,
    "local experts, replicated": EXPERTS,
    "local experts, plain, without a model": ROUTED,
    "local experts, plain, without a router": UNLIKE,
    "local experts, fsdp, without a router": UNLIKE,
    "drifted": (
        "RankError",
        "ranks hold different bytes of model.layers.1.mlp.experts.down_proj",
        "found:    1 tensors",
    ),
    "other buffers": ("RankError", "ranks hold different bytes of steps"),
    "other sizes": ("RankError", "rank to rank"),
}
# torch's own planner cannot describe shards of gate and up that are each cut in their rows. Source: torch 2.13.0,
# ``_validate_global_plan`` in checkpoint/default_planner.py.
REFUSED_BY_PLANNER = {"tp": ("ValueError", "overlapping chunks")}


def check(world, variant, tmp_path):
    ranks = results(run_suite("expert_parallel", world, tmp_path, [variant])[variant])
    for outcomes in zip(*ranks, strict=True):
        first = outcomes[0]
        assert all(outcome == first for outcome in outcomes), outcomes
        kind = first["kind"]
        if not first["supported"]:
            continue
        for way in ("save", "dcp"):
            refused = REFUSED | (REFUSED_BY_PLANNER if way == "dcp" else {})
            if kind not in refused:
                assert first[way] is None, first
                continue
            assert first[way] is not None, f"{kind}, {way}: nothing was refused"
            error, *texts = refused[kind]
            assert first[way][0] == error, first
            assert all(text in first[way][1] for text in texts), first
            assert first[f"{way} left"] == [], first
    assert [outcome["kind"] for outcome in ranks[0]] == VARIANTS[variant][world]


@pytest.mark.parametrize("world", VARIANTS["some"])
def test_experts_are_saved_whole_or_not_at_all(world, tmp_path):
    check(world, "some", tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("world", VARIANTS["all"])
def test_experts_of_every_parallelism_are_saved_whole_or_not_at_all(world, tmp_path):
    """Save each kind of parallelism in both ways."""
    check(world, "all", tmp_path)
