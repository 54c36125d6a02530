"""The context of all figures: versions, the device, its driver, memory, disk, and the time of imports.

    python -m benchmarks.gpu.environment    (a worker; a cell is one fact)

This module imports at the top nothing that it times.
"""

from __future__ import annotations

import importlib
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import Any

from benchmarks.gpu.worker import Channel, serve, text_of

_IMPORTED = ("numpy", "torch", "triton", "transformers", "safetensors", "automodel_conv")
_COMMANDS = {
    "nvidia-smi": ("nvidia-smi",),
    "topology": ("nvidia-smi", "topo", "-m"),
    "df": ("df", "-h", tempfile.gettempdir(), "/dev/shm"),
    "free": ("free", "-m"),
    "cpu": ("lscpu",),
}
_COMMAND_S = 15
_MOST_CHARACTERS = 4000

# A process each: imports are timed in a new process, and may take long on a slow disk.
IMPORTS = "imports"
TASKS = (("device", "environment", *_COMMANDS), (IMPORTS,))


def import_seconds() -> dict[str, float | None]:
    """Return the seconds of each import on top of the ones before it, or None if it is not installed."""
    seconds: dict[str, float | None] = {}
    for name in _IMPORTED:
        start = time.perf_counter()
        try:
            importlib.import_module(name)
        except ImportError:
            seconds[name] = None
            continue
        seconds[name] = round(time.perf_counter() - start, 3)
    return seconds


def describe(name: str) -> dict[str, Any]:
    """Return the device's name, memory and toolkit."""
    import torch

    device = torch.device(name)
    if device.type != "cuda":
        return {"name": "CPU, interpreted", "memory_bytes": None}
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "capability": [properties.major, properties.minor],
        "cuda": torch.version.cuda,
        "devices": torch.cuda.device_count(),
    }


def which(device: Mapping[str, Any]) -> tuple[Any, Any]:
    """Return the key of a device.

    Figures with equal keys are comparable; memory and drivers differ a little.
    """
    return device["name"], device.get("capability")


def output_of(command: tuple[str, ...]) -> str:
    """Return the output of a command, or a text that it is not installed."""
    if shutil.which(command[0]) is None:
        return f"{command[0]} is not installed"
    run = subprocess.run(command, capture_output=True, text=True, timeout=_COMMAND_S, check=False)
    return (run.stdout + run.stderr)[:_MOST_CHARACTERS]


def environment() -> dict[str, Any]:
    from benchmarks import measure

    return measure.environment() | {"disk_free_bytes": shutil.disk_usage(tempfile.gettempdir()).free}


def work(order: Mapping[str, Any], channel: Channel) -> None:
    facts: dict[str, Callable[[], Any]] = {
        IMPORTS: import_seconds,
        "environment": environment,
        "device": lambda: describe(order["device"]),
        **{name: lambda command=command: output_of(command) for name, command in _COMMANDS.items()},
    }
    for cell in order["cells"]:
        channel.begin(cell)
        try:
            channel.row(cell, found=facts[cell]())
        except Exception as error:  # the next cell may work, and this machine may not come back
            channel.row(cell, error=text_of(error))


if __name__ == "__main__":
    serve(work)
