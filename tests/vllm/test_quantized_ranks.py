"""Quantized models of vLLM that are divided over two ranks: each rank loads what the default loader loads there."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm", reason="its models are built and loaded")

from tests.distributed.starting import results, run_suite
from tests.vllm.quantized_ranks import CASES, VARIANTS


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    return run_suite("tests.vllm.quantized_ranks", 2, tmp_path_factory.mktemp("ranks"), list(VARIANTS))


@pytest.mark.parametrize("variant", VARIANTS)
def test_each_rank_loads_what_the_default_loader_loads(ended, variant):
    for loads in results(ended[variant]):
        assert [load["case"] for load in loads] == [[architecture.__name__, name] for architecture, name in CASES]
        assert [load["computed"] for load in loads] == [[]] * len(CASES)


DIVIDED = {
    ("qwen3_moe", "fp8 per block"): {"w2_weight": [4, 256, 128], "w2_weight_scale_inv": [4, 2, 1]},
    # A rank has half a block, so vLLM repeats the scales for smaller ones.
    ("qwen3_moe_of_one_block", "fp8 per block"): {"w2_weight": [4, 256, 64], "w2_weight_scale_inv": [4, 4, 1]},
    ("qwen3_moe", "compressed-tensors w4a16"): {"w2_weight_packed": [4, 256, 16], "w2_weight_scale": [4, 256, 4]},
    ("qwen3_moe", "modelopt nvfp4"): {"w13_weight": [4, 256, 128], "w13_weight_scale": [4, 256, 16]},
    ("gpt_oss", "mxfp4"): {"w2_weight": [4, 256, 64], "w2_weight_scale": [4, 256, 4]},
}


@pytest.mark.parametrize("case", DIVIDED, ids=", ".join)
def test_codes_and_scales_are_divided(ended, case):
    for loads in results(ended["tensor"]):
        [shapes] = [load["shapes"] for load in loads if tuple(load["case"]) == case]
        found = {name.rpartition(".")[2]: shape for name, shape in shapes.items() if ".layers.1.mlp.experts." in name}
        assert DIVIDED[case].items() <= found.items()


def test_loading_code_runs_once_and_once_more_where_it_reads_a_map_of_experts(ended):
    for variant, runs in {"tensor": {1}, "expert": {1, 2}}.items():
        for loads in results(ended[variant]):
            assert {load["runs"] for load in loads} == runs
