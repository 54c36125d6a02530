"""Ranks of vLLM's engine, started by ``tests.distributed.starting``, that load their parts of quantized models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.distributed.starting import send
from tests.vllm import quantized_checkpoints as checkpoints
from tests.vllm.quantized_checkpoints import FORMATS
from tests.vllm.quantized_models import (
    assert_same,
    built,
    engine_config,
    kernels_on_a_cpu,
    load_by_default,
    load_by_plan,
    process,
    ranks,
    tensors_of,
)

VARIANTS: dict[str, dict[str, Any]] = {
    "tensor": {"tensor_parallel_size": 2},
    "expert": {"tensor_parallel_size": 2, "enable_expert_parallel": True},
}
CASES = (
    (checkpoints.qwen3_moe, "fp8 per block"),
    (checkpoints.qwen3_moe_of_one_block, "fp8 per block"),
    (checkpoints.deepseek_v3, "fp8 per block"),
    (checkpoints.qwen3_moe, "compressed-tensors fp8 per channel"),
    (checkpoints.qwen3_moe, "compressed-tensors w4a16"),
    (checkpoints.qwen3_moe, "compressed-tensors w4a16 with zero points"),
    (checkpoints.kimi_k2, "compressed-tensors w4a16"),
    (checkpoints.qwen3_moe, "compressed-tensors nvfp4"),
    (checkpoints.qwen3_moe, "modelopt nvfp4"),
    (checkpoints.qwen3_moe, "awq"),
    (checkpoints.qwen3_moe, "gptq"),
    (checkpoints.gpt_oss, "mxfp4"),
)


def prepare(directory: Path, world: int) -> Path:
    """Write the checkpoints, and return their folder."""
    for number, (architecture, name) in enumerate(CASES):
        (directory / str(number)).mkdir()
        architecture(FORMATS[name]).write(directory / str(number))
    return directory


def rank(directory: Path, variant: str, own: Path) -> None:
    """Send for each model how often its code ran, what it computed, and the shapes of its tensors."""
    number = torch.distributed.get_rank()
    with kernels_on_a_cpu(), ranks(engine_config(directory / "0", **VARIANTS[variant]), own / "rendezvous", number, 2):
        for case, (architecture, name) in enumerate(CASES):
            config = engine_config(directory / str(case), **VARIANTS[variant])
            expected, actual = built(config), built(config)
            load_by_default(config, expected)
            planned = load_by_plan(config, actual)
            assert planned is not None
            assert_same(actual, expected)
            shapes = {name: [*tensor.shape] for name, tensor in tensors_of(actual).items()}
            process(config, expected)
            process(config, actual)
            assert_same(actual, expected)
            send(
                {
                    "case": [architecture.__name__, name],
                    "runs": planned.runs,
                    "computed": sorted(planned.report.computed),
                    "shapes": shapes,
                }
            )
