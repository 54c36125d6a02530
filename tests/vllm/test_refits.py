"""Tests of refits into vLLM's models: each rank gets what vLLM's default loader makes of the trainer's checkpoint."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm")

from tests.distributed.starting import results, run_suite
from tests.vllm.refits import ARCHITECTURES, CHECKS, STEPS, TRAINERS


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    return run_suite("tests.vllm.refits", 4, tmp_path_factory.mktemp("refits"), list(CHECKS))


@pytest.mark.parametrize("variant", CHECKS)
def test_engine_holds_what_the_default_loader_loads_and_each_byte_is_sent_once(ended, variant):
    ranks = results(ended[variant])
    wanted = [name for name in ARCHITECTURES if (variant, name) != ("redundant", "GptOssForCausalLM")]
    for models in zip(*ranks, strict=True):
        assert {model["name"] for model in models} == {wanted.pop(0)}
        for step in range(STEPS):
            reports = [model["reports"][step] for model in models]
            received = [report["received"] for report in reports[TRAINERS:]]
            held = [report["held"] for report in reports[TRAINERS:]]
            assert sum(report["sent"] for report in reports[:TRAINERS]) == sum(received)
            if variant == "redundant":  # a rank gets an expert once of which it has two copies
                assert all(0 < got <= has for got, has in zip(received, held, strict=True))
            else:
                assert received == held
    assert not wanted
