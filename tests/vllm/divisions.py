"""Ranks of vLLM's engine that send what each of them holds of a model, by the kind of module."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import torch

from tests.distributed.starting import send
from tests.vllm.cases import write
from tests.vllm.engine import engine_config, every_platform, join, loaded_by_vllm
from tests.vllm.ranks import written_of

ARCHITECTURES = ("DeepseekV3ForCausalLM", "Qwen3MoeForCausalLM")
# Sizes of tp and dp, and whether experts are divided whole.
VARIANTS = {
    "tp=2": (2, 1, False),
    "tp=2,ep=2": (2, 1, True),
    "ep=2": (1, 2, True),
    "tp=2,ep=4": (2, 2, True),
    "dp=2,tp=2": (2, 2, False),
}
_FUSED = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "qkv_proj"),
    **dict.fromkeys(("gate_proj", "up_proj"), "gate_up_proj"),
    **dict.fromkeys(("q_a_proj", "kv_a_proj_with_mqa"), "fused_qkv_a_proj"),
    "routed_experts": "experts",
}


def kind(name: str) -> str:
    """Return the last part of the name of a tensor's module, as vLLM has it."""
    module = name.split(".")[-2]
    shared = "shared " if re.search(r"\.shared_experts?\.", name) else ""
    return shared + _FUSED.get(module, module)


def by_kind(sizes: Iterable[tuple[str, int]]) -> dict[str, int]:
    """Return the bytes of each kind of module."""
    totals: Counter[str] = Counter()
    for name, nbytes in sizes:
        totals[kind(name)] += nbytes
    return dict(totals)


def prepare(directory: Path, world: int) -> Path:
    """Write the checkpoints, and return their folder."""
    for name in ARCHITECTURES:
        write(name, directory / name)
    return directory


def rank(checkpoints: Path, variant: str, directory: Path) -> None:
    """Send the bytes that a load writes, for each model, by the kind of module."""
    tp, dp, has_ep = VARIANTS[variant]
    number = torch.distributed.get_rank()
    options = {"tensor_parallel_size": tp, "data_parallel_size": dp, "enable_expert_parallel": has_ep}
    own = {"data_parallel_rank": number // tp} if dp > 1 else {}
    with every_platform():
        for name in ARCHITECTURES:
            config = engine_config(checkpoints / name, **options, **own)
            join(config, number % tp)
            model = loaded_by_vllm(config).model
            send(by_kind((name, written_of(parameter)) for name, parameter in model.named_parameters()))
