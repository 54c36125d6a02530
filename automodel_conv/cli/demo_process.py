"""The process that carries out the demo: ``python -m automodel_conv.cli.demo_process``.

It imports transformers once. Each step then runs in a new process, which is forked from this one, so it starts without
tensors or threads of the steps before it. The process writes a line of JSON to a descriptor after each step.

Timing starts after the load of a tiny checkpoint of the same kind. The checkpoint was just written, so its files are in
the page cache. The memory that the load will use was touched and freed (see ``ready_memory``). The methods alternate.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import automodel_conv
from automodel_conv.cli.demo import METHODS, TINY, DemoLoad, DemoModel
from automodel_conv.cli.measuring import PeakMemory, ready_memory
from automodel_conv.execution.cores import cores
from automodel_conv.planning.plan_picture import plan_page
from automodel_conv.upstream.registry import transformers_available


def main() -> None:
    """Carry out the steps that the process arguments name."""
    sizes, root, runs, descriptor = sys.argv[1:]
    with open(int(descriptor), "w", buffering=1) as events:
        for event in steps(DemoModel(**json.loads(sizes)), Path(root), int(runs)):
            events.write(json.dumps(event) + "\n")


def steps(model: DemoModel, root: Path, runs: int) -> Iterator[dict[str, Any]]:
    """Write a checkpoint and load it, and yield the outcome of each step."""
    if not transformers_available():
        yield {"unsupported": "the demo needs transformers 5.1 or newer"}
        return
    import transformers
    from transformers.models.qwen3_moe import modeling_qwen3_moe  # noqa: F401  # the processes below have it imported

    yield {"transformers": transformers.__version__, "automodel_conv": automodel_conv.__version__}
    big, tiny = root / "big", root / "tiny"
    yield in_new_process(_write, model, big)
    in_new_process(_write, TINY, tiny)
    for _ in range(runs):
        for method in METHODS:
            yield {"method": method, "load": vars(in_new_process(measure, method, str(big), str(tiny)))}


def in_new_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in a process forked from this one, and return its result."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork")) as process:
        return process.submit(function, *arguments).result()


def _write(model: DemoModel, directory: Path) -> dict[str, Any]:
    start = time.perf_counter()
    write_checkpoint(model, str(directory))
    seconds = time.perf_counter() - start
    checkpoint = automodel_conv.open_checkpoint(directory)
    files = list(directory.glob("*.safetensors"))
    plan = automodel_conv.compile_plan(checkpoint)
    title = f"The demo: {model.layers} layers with {model.experts} experts each"
    return {
        "directory": str(directory),
        "tensors": len(checkpoint.names),
        "files": len(files),
        "bytes": sum(file.stat().st_size for file in files),
        "seconds": seconds,
        "page": plan_page(plan, plan.unused_sources, title, {}),
    }


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


def measure(method: str, directory: str, warm_up: str) -> DemoLoad:
    """Load a checkpoint with one method, and return its time, memory and a digest of every tensor."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    load(method, warm_up)
    ready_memory(2 * sum(file.stat().st_size for file in os.scandir(directory)))
    with PeakMemory() as peak:
        start = time.perf_counter()
        model = load(method, directory)
        seconds = time.perf_counter() - start
    return DemoLoad(seconds, peak.anonymous_bytes, peak.resident_bytes, digests(model.state_dict()))


def load(method: str, directory: str) -> nn.Module:
    """Return the model of a checkpoint with its parameters on the CPU."""
    from transformers import AutoConfig, AutoModelForCausalLM

    if method == "transformers":
        return AutoModelForCausalLM.from_pretrained(directory)
    config = AutoConfig.from_pretrained(directory)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    automodel_conv.load_model(model, directory)
    return model


def digests(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Return a digest of dtype, shape and bytes by name; copies tensors that are not contiguous."""
    with ThreadPoolExecutor(cores()) as threads:
        return dict(zip(tensors, threads.map(_digest, tensors.values()), strict=True))


def _digest(tensor: Tensor) -> str:
    content = hashlib.blake2b(f"{tensor.dtype} {list(tensor.shape)}".encode(), digest_size=16)
    content.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().data)
    return content.hexdigest()


if __name__ == "__main__":
    main()
