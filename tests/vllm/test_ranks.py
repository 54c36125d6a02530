"""Tests of vLLM's models that are divided over two ranks: each rank loads what vLLM's default loader loads there."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm")

from tests.distributed.starting import results, run_suite
from tests.vllm.ranks import VARIANTS, architectures


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    return run_suite("tests.vllm.ranks", 2, tmp_path_factory.mktemp("ranks"), list(VARIANTS))


@pytest.mark.parametrize("variant", VARIANTS)
def test_each_rank_loads_what_the_default_loader_loads(ended, variant):
    for loads in results(ended[variant]):
        assert [load["name"] for load in loads] == [*architectures(variant)]
        assert all(load["runs_again"] == bool(load["computed"]) for load in loads)


@pytest.mark.parametrize("variant", VARIANTS)
def test_each_rank_reads_only_its_own_bytes(ended, variant):
    # Half of each row of matrices that are transposed: a row is read whole, at real sizes too (a few KB).
    in_rows = {("tensor", "GptOssForCausalLM"), ("tensor", "Llama4ForCausalLM")}
    for loads in results(ended[variant]):
        for load in loads:
            if (variant, load["name"]) not in in_rows:
                assert max(load["bytes_read"]) <= 1.01 * load["written_bytes"], load


def test_a_map_of_experts_starts_a_trace_again_once(ended):
    for variant, runs in {"tensor": 1, "expert": 2, "redundant": 2, "pipeline": 1}.items():
        for loads in results(ended[variant]):
            assert [load["runs"] for load in loads if load["name"] == "Qwen3MoeForCausalLM"] == [runs]


def test_redundant_experts_are_loaded_twice(ended):
    written = [
        {load["name"]: load["written_bytes"] for loads in results(ended[variant]) for load in loads}
        for variant in ("expert", "redundant")
    ]
    without, redundant = (numbers["Qwen3MoeForCausalLM"] for numbers in written)
    assert redundant - without == 2 * 2 * 3 * 28 * 48 * 2  # experts of a rank, layers, matrices, their shape, bytes
