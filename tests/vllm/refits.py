"""Ranks of a trainer of transformers and of vLLM's engine, started by ``tests.distributed.starting``.

Ranks 0 and 1 train, ranks 2 and 3 are the engine. After each refit, the engine's models equal those that vLLM's default
loader makes of the checkpoint that ``save_pretrained`` writes for the trainer's new weights.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import transformers
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from vllm.config import set_current_vllm_config

from automodel_conv.refit import Refit
from automodel_conv.testing import POISON, assert_bytes_equal
from tests.distributed.models import local, part_of, sharded
from tests.distributed.starting import send
from tests.model_zoo import fill
from tests.vllm.cases import write
from tests.vllm.engine import Loaded, engine_config, every_platform, join, loaded_by_vllm, tensors
from tests.vllm.ranks import VARIANTS, written_bytes

TRAINERS = 2
STEPS = 3
ARCHITECTURES = ("Qwen3MoeForCausalLM", "DeepseekV3ForCausalLM", "GptOssForCausalLM")
CHECKS: dict[str, tuple[str, ...]] = {
    "tensor": ("fsdp", "experts", "inner"),
    "expert": ("experts", "fsdp", "columns"),
    "redundant": ("fsdp", "experts", "columns"),
}
"""Parallelism of the engine, and the placement of the trainer for each architecture."""


class Trained(NamedTuple):
    """A model of the trainer, its weights for each step, and the checkpoint of each step."""

    model: nn.Module
    steps: list[dict[str, Tensor]]
    saved: list[Path]


def prepare(directory: Path, world: int) -> dict[str, Trained]:
    """Write the checkpoints of all steps with the config that vLLM reads."""
    return {name: _trained(name, directory) for name in ARCHITECTURES}


def _trained(name: str, directory: Path) -> Trained:
    write(name, directory / name)
    model = getattr(transformers, name).from_pretrained(directory / name, dtype=torch.bfloat16).eval()
    steps, saved = [], []
    for number in range(STEPS):
        fill(model, seed=1 + number)
        path = directory / f"{name} {number}"
        model.save_pretrained(path)
        shutil.copy(directory / name / "config.json", path)
        steps.append({key: tensor.clone() for key, tensor in model.state_dict().items()})
        saved.append(path)
    return Trained(model, steps, saved)


def rank(common: dict[str, Trained], variant: str, directory: Path) -> None:
    """Send for each model what each rank of the engine received, and the bytes of what it holds."""
    own = dist.get_rank()
    mesh = DeviceMesh("cpu", [0, 1])
    with every_platform():
        for name, kind in zip(ARCHITECTURES, CHECKS[variant], strict=True):
            if variant == "redundant" and name == "GptOssForCausalLM":
                continue  # vLLM itself does not divide it so
            source = common[name]
            configs = [engine_config(path, **VARIANTS[variant]) for path in source.saved]
            join(configs[0], own)
            step = _trainer(source, kind, mesh) if own < TRAINERS else _engine(configs)
            try:
                reports = [step(number) for number in range(STEPS)]
            except Exception as error:
                raise AssertionError(f"{name}, {variant}, {kind}") from error
            send({"name": name, "reports": reports})


def _trainer(source: Trained, kind: str, mesh: DeviceMesh) -> Callable[[int], Any]:
    model = sharded(source, kind, lambda *shape: mesh, world=TRAINERS)
    refit = Refit(model, sends=True, bucket_bytes=100_000)

    def step(number: int) -> Any:
        for name, tensor in model.state_dict().items():
            local(tensor).copy_(part_of(source.steps[number][name], tensor))
        return {"sent": refit().bytes_sent}

    return step


def _engine(configs: list[Any]) -> Callable[[int], Any]:
    started = loaded_by_vllm(configs[0])
    config = copy.deepcopy(configs[0])
    with set_current_vllm_config(config):
        refit = Refit(started.model, sends=False, loader=started.model.load_weights, bucket_bytes=100_000)

    def step(number: int) -> Any:
        expected = loaded_by_vllm(configs[number])
        for parameter in started.model.parameters():
            torch.empty(0, dtype=torch.uint8).set_(parameter.detach().untyped_storage()).fill_(POISON)
        report = refit()
        _assert_same_tensors(started, expected)
        return {"received": report.bytes_received, "held": written_bytes(expected.model), "out": report.left_out}

    return step


def _assert_same_tensors(actual: Loaded, expected: Loaded) -> None:
    left, right = tensors(actual.model), tensors(expected.model)
    assert list(left) == list(right)
    for name, tensor in right.items():
        try:
            assert_bytes_equal(left[name], tensor, strides=True)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None
