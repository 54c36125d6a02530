"""From files in the page cache to tensors on the device: ours and others', a process for each load.

    python -m benchmarks.gpu.loading METHOD DIRECTORY WARM_UP DEVICE THREADS    (one load; prints JSON)

The process first loads a tiny checkpoint in the same way: imports, the device's context and compiled kernels are not
timed. Timed is from the call until the device is idle. Memory is the peak that torch's allocator gave out in that time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import automodel_conv as amc
from benchmarks import measure
from benchmarks.gpu.timing import seconds
from benchmarks.operations import Mismatch, synchronize


def load_ours(directory: str, device: torch.device, threads: int, layout: str) -> tuple[dict[str, Tensor], Any]:
    loaded = amc.load_state_dict(directory, layout=layout, device=device, threads=threads)
    names = {
        name: name.replace("gate_and_up_projs", "gate_up_proj").replace("down_projs", "down_proj") for name in loaded
    }
    detail = {
        **loaded.report.seconds,
        "copied_by_kernels": loaded.report.copied_by_kernels,
        "copied_by_torch": loaded.report.copied_by_torch,
        "without_kernels": loaded.report.without_kernels,
    }
    return {names[name]: tensor for name, tensor in loaded.items()}, detail


def load_transformers(directory: str, device: torch.device, threads: int) -> tuple[dict[str, Tensor], Any]:
    from transformers import AutoModelForCausalLM
    from transformers.utils import is_accelerate_available

    if is_accelerate_available():
        model = AutoModelForCausalLM.from_pretrained(directory, device_map=str(device))
        return model.state_dict(), "device_map"
    model = AutoModelForCausalLM.from_pretrained(directory).to(device)
    return model.state_dict(), "to the CPU, then to the device: device_map needs accelerate"


def load_safetensors(
    directory: str, device: torch.device, threads: int, transposed: bool
) -> tuple[dict[str, Tensor], Any]:
    from safetensors.torch import load_file

    found: dict[str, Tensor] = {}
    for path in sorted(Path(directory).glob("*.safetensors")):
        found |= load_file(path, device=str(device))
    made = {name: tensor for name, tensor in found.items() if ".experts." not in name}
    for prefix in sorted({name.partition(".experts.")[0] for name in found if ".experts." in name}):
        count = len([name for name in found if name.startswith(f"{prefix}.experts.") and ".down_proj." in name])
        gate, up, down = (
            torch.stack([found.pop(f"{prefix}.experts.{e}.{part}.weight") for e in range(count)])
            for part in ("gate_proj", "up_proj", "down_proj")
        )
        both = torch.cat([gate, up], 1)
        del gate, up
        made[f"{prefix}.experts.gate_up_proj"] = both.transpose(1, 2).contiguous() if transposed else both
        made[f"{prefix}.experts.down_proj"] = down.transpose(1, 2).contiguous() if transposed else down
    return made, None


METHODS: Mapping[str, tuple[Callable[..., tuple[dict[str, Tensor], Any]], bool]] = {
    "ours": (partial(load_ours, layout="transformers"), False),
    "from_pretrained": (load_transformers, False),
    "load_file, stack, cat": (partial(load_safetensors, transposed=False), False),
    "ours, nemo": (partial(load_ours, layout="nemo"), True),
    "load_file, stack, cat, transpose": (partial(load_safetensors, transposed=True), True),
}
"""How to load, and whether experts end as ``[E, H, 2I]``."""


def work(method: str, directory: str, warm_up: str, device: torch.device, threads: int, first: bool) -> dict[str, Any]:
    """One load in this process; the first of a method also gives a digest of its tensors."""
    load = METHODS[method][0]
    load(warm_up, device, threads)
    synchronize(device)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    made: list[Any] = []
    taken = seconds(lambda: made.extend(load(directory, device, threads)), device)
    tensors, detail = made
    return {
        "seconds": taken,
        "detail": detail,
        "nbytes": sum(tensor.nbytes for tensor in tensors.values()),
        "peak_device_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
        "digest": measure.digest(tensors) if first else None,
    }


def measure_loads(
    directory: str, warm_up: str, device: torch.device, threads: int, repetitions: int, deadline: float
) -> dict[str, list[dict[str, Any]]]:
    """Interleaved loads by method; no round begins that would not be over by ``deadline``.

    The first round is always run.

    Raises:
        RuntimeError: a load failed; with the end of what it printed.
        Mismatch: two methods did not make the same tensors.
    """
    runs: dict[str, list[dict[str, Any]]] = {method: [] for method in METHODS}
    for repetition in range(repetitions):
        start = time.monotonic()
        for method in measure.shuffled(list(METHODS), repetition):
            measure.read_through(directory)
            command = ["-m", "benchmarks.gpu.loading", method, directory, warm_up, str(device), str(threads)]
            runs[method].append(measure.run_worker(command, repetition, timeout_s=180))
            sys.stderr.write(f"    round {repetition + 1} of {repetitions}: {method}\n")
        if repetition == 0:
            _same_tensors(runs)
        now = time.monotonic()
        if now + (now - start) > deadline:
            break
    return runs


def median_load_seconds(runs: list[dict[str, Any]]) -> float:
    return statistics.median(run["seconds"] for run in runs)


def _same_tensors(runs: Mapping[str, list[dict[str, Any]]]) -> None:
    for transposed in (False, True):
        found = {method: runs[method][0]["digest"] for method in runs if METHODS[method][1] == transposed}
        if len(set(found.values())) > 1:
            raise Mismatch(f"the methods do not make the same tensors: {found}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.loading")
    parser.add_argument("method", choices=METHODS)
    parser.add_argument("directory")
    parser.add_argument("warm_up")
    parser.add_argument("device", type=torch.device)
    parser.add_argument("threads", type=int)
    parser.add_argument("--repetition", type=int, default=0)
    options = parser.parse_args()
    if options.method == "from_pretrained":
        from transformers.utils import logging

        logging.disable_progress_bar()
    result = work(
        options.method, options.directory, options.warm_up, options.device, options.threads, options.repetition == 0
    )
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
