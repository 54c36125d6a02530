"""A comparison of transformers and this package: both load the same checkpoint.

Each load is a process of its own. Its timing starts after the imports and after the load of a tiny checkpoint of the
same kind. The big checkpoint was just written, so its files are in the page cache. The memory that the load will use
was touched and freed (see ``ready_memory``). The two methods alternate.
"""

from __future__ import annotations

import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from automodel_conv.cli.measuring import PeakMemory, ready_memory
from automodel_conv.errors import ConversionError, UnsupportedError, message
from automodel_conv.files.write_errors import write_errors
from automodel_conv.loading import load_state_dict
from automodel_conv.upstream.registry import transformers_available

METHODS = ("transformers", "automodel_conv")
RUNS = 3


@dataclass(frozen=True)
class DemoModel:
    """The sizes of a Qwen3-MoE model."""

    layers: int
    experts: int
    hidden_size: int
    intermediate_size: int
    shard_size: str


BIG = DemoModel(layers=2, experts=64, hidden_size=2048, intermediate_size=640, shard_size="300MB")
TINY = DemoModel(layers=2, experts=3, hidden_size=64, intermediate_size=32, shard_size="20KB")


@dataclass(frozen=True)
class DemoLoad:
    """Loads with one method: median time, peak memory above the level after imports, and a digest of every tensor."""

    seconds: float
    anonymous_bytes: int | None
    resident_bytes: int | None
    digests: Mapping[str, str]


@dataclass(frozen=True)
class DemoResult:
    """The results of the demo.

    The demo has removed its files.
    """

    directory: str
    files: int
    file_bytes: int
    write_seconds: float
    loads: Mapping[str, DemoLoad]
    different: tuple[str, ...]
    """Names of the tensors that are not bit-exact."""


def run_demo(model: DemoModel = BIG, directory: str | None = None) -> DemoResult:
    """Write a checkpoint with transformers, load it with both, and compare all tensors bit by bit.

    Args:
        model: sizes of the model.
        directory: where to create a temporary directory, which is removed; None: the system's default.

    Raises:
        UnsupportedError: transformers is not installed.
        WriteError: the directory cannot be written to.
        ConversionError: a load failed; the error has the end of its output.
    """
    if not transformers_available():
        raise UnsupportedError(message("the demo needs transformers", do="pip install transformers"))
    parent = tempfile.gettempdir() if directory is None else directory
    with write_errors(parent):
        temporary = tempfile.TemporaryDirectory(prefix="automodel-conv-demo-", dir=parent)
    with temporary as root:
        big, tiny = os.path.join(root, "big"), os.path.join(root, "tiny")
        start = time.perf_counter()
        with write_errors(parent):
            write_checkpoint(model, big)
            write_seconds = time.perf_counter() - start
            write_checkpoint(TINY, tiny)
        files = [os.path.join(big, file) for file in os.listdir(big) if file.endswith(".safetensors")]
        runs: dict[str, list[DemoLoad]] = {method: [] for method in METHODS}
        for _ in range(RUNS):
            for method in METHODS:
                runs[method].append(_in_new_process(method, big, tiny))
        loads = {method: _merged(of_method) for method, of_method in runs.items()}
        first, second = (loads[method].digests for method in METHODS)
        different = [name for name in {**first, **second} if first.get(name) != second.get(name)]
        return DemoResult(
            big,
            len(files),
            sum(map(os.path.getsize, files)),
            write_seconds,
            loads,
            tuple(different),
        )


def write_checkpoint(model: DemoModel, directory: str, seed: int = 0) -> None:
    """Write a bfloat16 checkpoint with transformers: a tensor for each expert and projection, several files."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    sizes = {
        "vocab_size": 1024,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.intermediate_size,
        "moe_intermediate_size": model.intermediate_size,
        "num_hidden_layers": model.layers,
        "num_experts": model.experts,
        "num_experts_per_tok": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": model.hidden_size // 16,
        "tie_word_embeddings": False,
    }
    config = Qwen3MoeConfig(**sizes)
    with torch.device("meta"):
        moe = Qwen3MoeForCausalLM._from_config(config, dtype=torch.bfloat16)
    moe.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(seed)
    for parameter in moe.parameters():
        fill_with_random_bits(parameter.data, generator)
    moe.save_pretrained(directory, max_shard_size=model.shard_size)


def fill_with_random_bits(tensor: Tensor, generator: torch.Generator) -> None:
    """Fill a tensor with random values between -2 and 2 from random bits, several times faster than ``normal_``.

    Args:
        tensor: contiguous, bfloat16, on the CPU; filled in place.
        generator: source of the random bits.
    """
    bits = tensor.view(-1).view(torch.int16)
    quads = torch.empty(-(-bits.numel() // 4), dtype=torch.int64)
    quads.random_(-(2**63), None, generator=generator)
    bits.copy_(quads.view(torch.int16)[: bits.numel()])
    # An exponent without its top bit cannot be that of a NaN or an infinity.
    bits.bitwise_and_(~0x4000)


def digests(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Return a digest of dtype, shape and bytes by name; copies tensors that are not contiguous."""
    by_name = {}
    for name, tensor in tensors.items():
        content = hashlib.blake2b(f"{tensor.dtype} {list(tensor.shape)}".encode(), digest_size=16)
        content.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().data)
        by_name[name] = content.hexdigest()
    return by_name


def _merged(runs: Sequence[DemoLoad]) -> DemoLoad:
    """Merge the runs of one method into one; a tensor's digest joins those of all runs."""
    names = {name: None for run in runs for name in run.digests}
    return DemoLoad(
        statistics.median(run.seconds for run in runs),
        max((run.anonymous_bytes for run in runs if run.anonymous_bytes is not None), default=None),
        max((run.resident_bytes for run in runs if run.resident_bytes is not None), default=None),
        {name: " ".join(run.digests.get(name, "none") for run in runs) for name in names},
    )


def _in_new_process(method: str, directory: str, warm_up: str) -> DemoLoad:
    command = [sys.executable, "-m", "automodel_conv.cli.demo", method, directory, warm_up]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        output = f"exit status {run.returncode}\n{run.stderr[-4000:]}"
        raise ConversionError(message(f"loading with {method} failed", found=output))
    return DemoLoad(**json.loads(run.stdout.splitlines()[-1]))


def _load(method: str, directory: str) -> tuple[Any, dict[str, Tensor]]:
    """Return the loaded object, which keeps its tensors alive, and its state dict."""
    if method == "automodel_conv":
        tensors = load_state_dict(directory)
        return tensors, tensors
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory)
    return model, model.state_dict()


def _measure(method: str, directory: str, warm_up: str) -> DemoLoad:
    from transformers.utils import logging

    logging.disable_progress_bar()
    _load(method, warm_up)
    ready_memory(2 * sum(file.stat().st_size for file in os.scandir(directory)))
    with PeakMemory() as peak:
        start = time.perf_counter()
        _, tensors = _load(method, directory)
        seconds = time.perf_counter() - start
    return DemoLoad(seconds, peak.anonymous_bytes, peak.resident_bytes, digests(tensors))


if __name__ == "__main__":
    sys.stdout.write(json.dumps(vars(_measure(*sys.argv[1:4]))) + "\n")
