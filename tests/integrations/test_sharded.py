"""Tests of loads that transformers shards, with two real processes, without and under the hook."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="hooks from_pretrained of transformers")

from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText

from tests.model_zoo import fill, small_config, write_checkpoint

ROOT = Path(__file__).parents[2]
RANKS = 2


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """Return the results of each rank for each kind of parallelism; the ranks compare both loads."""
    path = tmp_path_factory.mktemp("published")
    config = small_config(CONFIG_MAPPING["qwen3_moe"], vocab_size=66 * RANKS)  # 5.17 requires equal shares
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    fill(model)
    write_checkpoint(model, path)
    square = tmp_path_factory.mktemp("square")
    config = small_config(CONFIG_MAPPING["qwen3_vl_moe"], "2I == H")
    config.text_config.vocab_size = 66 * RANKS
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    fill(model)
    write_checkpoint(model, square)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"WORLD_SIZE": str(RANKS), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path[1:]])}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.integrations.ranks", path, square],
            cwd=ROOT,
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(RANKS)
    ]
    try:
        ended = [process.communicate(timeout=240) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, error) in zip(processes, ended, strict=True):
        assert process.returncode == 0, error[-3000:]
    results = [[json.loads(line) for line in output.splitlines() if line.startswith("{")] for output, _ in ended]
    return [{load["kind"]: load for load in loads} for loads in results]


def of(ranks, kind):
    if kind not in ranks[0]:
        pytest.skip(f"this transformers has no {kind} parallelism")
    return [rank[kind] for rank in ranks]


@pytest.mark.parametrize("kind", ["tensor", "expert", "data"])
def test_experts_that_are_sharded_are_left_to_transformers(ranks, kind):
    for load in of(ranks, kind):
        assert load["lowered"] == []
        assert len(load["left"]) == 2 * 2  # the first of three layers has none
        assert set(load["left"].values()) == {"it is sharded while it is loaded"}


def test_experts_of_a_pipeline_stage_are_converted_by_plan_on_its_rank_only(ranks):
    loads = of(ranks, "pipeline")
    for load in loads:
        assert load["left"] == {}
        assert set(load["lowered"]) == {name for name in load["shapes"] if ".experts." in name}
    lowered = [name for load in loads for name in load["lowered"]]
    assert len(lowered) == len(set(lowered)) == 2 * 2


@pytest.mark.parametrize("kind", ["tensor", "expert", "data"])
def test_square_experts_that_transformers_would_misread_are_refused(ranks, kind):
    """Check that square experts are refused, except if transformers cuts experts before it checks shapes."""
    for load in of(ranks, f"square, {kind}"):
        assert load["wrong"] == []
        if load["refused"]:
            assert kind == "tensor" or "data" not in ranks[0]
            assert "mlp.experts.gate_up_proj: it is sharded while it is loaded" in load["refused"]
            assert "down_proj" not in load["refused"]
