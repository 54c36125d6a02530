"""Ranks of vLLM's engine, started by ``tests.distributed.starting``: each loads its part of the models both ways."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn

from automodel_conv.testing import POISON
from tests.distributed.starting import send
from tests.vllm.cases import write
from tests.vllm.engine import (
    assert_same_models,
    engine_config,
    every_platform,
    join,
    loaded_by_vllm,
    loaded_here,
)

_EXPERT = {"enable_expert_parallel": True}
VARIANTS: dict[str, dict[str, Any]] = {
    "tensor": {"tensor_parallel_size": 2},
    "expert": {"tensor_parallel_size": 2, **_EXPERT},
    "round robin": {"tensor_parallel_size": 2, **_EXPERT, "expert_placement_strategy": "round_robin"},
    "redundant": {
        "tensor_parallel_size": 2,
        **_EXPERT,
        "enable_eplb": True,
        "eplb_config": {"num_redundant_experts": 4},
    },
    "pipeline": {"pipeline_parallel_size": 2},
    "data": {"data_parallel_size": 2, **_EXPERT},
}

_PER_EXPERT = ("DeepseekV3ForCausalLM", "Qwen3MoeForCausalLM")
_FUSED = ("GptOssForCausalLM", "Llama4ForCausalLM", "Qwen3_5MoeForCausalLM")
_COMPUTED = ("NemotronHForCausalLM",)


def architectures(variant: str) -> tuple[str, ...]:
    """Return the models of a variant, those that vLLM itself can divide so."""
    if variant == "redundant":
        return (*_PER_EXPERT, "Qwen3_5MoeForCausalLM")
    return (*_PER_EXPERT, *_FUSED, *(() if variant == "pipeline" else _COMPUTED))


def prepare(directory: Path, world: int) -> Path:
    """Write the checkpoints, and return their folder."""
    for name in architectures("tensor"):
        write(name, directory / name)
    return directory


def rank(checkpoints: Path, variant: str, directory: Path) -> None:
    """Send for each model how often its code ran, and the bytes that were read and written."""
    number = torch.distributed.get_rank()
    is_data = "data_parallel_size" in VARIANTS[variant]
    own = {"data_parallel_rank": number} if is_data else {}
    traces = directory / f"traces {number}"
    with every_platform(), _without_gaps():
        for name in architectures(variant):
            config = engine_config(checkpoints / name, **VARIANTS[variant], **own)
            join(config, 0 if is_data else number)
            expected = loaded_by_vllm(config)
            actual, again = loaded_here(config, traces), loaded_here(config, traces)
            assert_same_models(actual, expected)
            assert_same_models(again, expected)
            assert actual.report is not None
            assert again.report is not None
            send(
                {
                    "name": name,
                    "runs": actual.runs,
                    "runs_again": again.runs,
                    "computed": sorted(actual.report.computed),
                    "bytes_read": [actual.report.bytes_read, again.report.bytes_read],
                    "written_bytes": written_bytes(expected.model),
                }
            )


@contextlib.contextmanager
def _without_gaps() -> Iterator[None]:
    """Read only wanted bytes: in so small tensors most bytes would lie in gaps that are read across."""
    with contextlib.ExitStack() as stack:
        for name, module in sys.modules.items():
            if name.startswith("automodel_conv.") and hasattr(module, "GAP_BYTES"):
                stack.enter_context(mock.patch.object(module, "GAP_BYTES", 0))
        yield


def written_bytes(model: nn.Module) -> int:
    """Return the bytes of the elements that a load wrote: checkpoints have no zeros, and padding has nothing else."""
    return sum(map(written_of, model.parameters()))


def written_of(parameter: nn.Parameter) -> int:
    """Return the bytes of a parameter that a load wrote."""
    size = parameter.element_size()
    raw = parameter.detach().contiguous().reshape(-1, 1).view(torch.uint8)
    return int(((raw != POISON).any(1) & (raw != 0).any(1)).sum()) * size
