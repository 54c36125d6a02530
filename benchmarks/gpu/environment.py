"""The context of all numbers: versions, the device, its driver, memory, disk; and how long imports take.

    python -m benchmarks.gpu.environment    (a worker; a cell is something to be known)

Nothing is imported at the top that is to be timed.
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

# A process each: imports are timed in one that has none yet, and may take long where a disk is slow.
IMPORTS = "imports"
TASKS = (("device", "environment", *_COMMANDS), (IMPORTS,))


def import_seconds() -> dict[str, float | None]:
    """Seconds of each import on top of the ones before it; None where it is not installed."""
    found: dict[str, float | None] = {}
    for name in _IMPORTED:
        start = time.perf_counter()
        try:
            importlib.import_module(name)
        except ImportError:
            found[name] = None
            continue
        found[name] = round(time.perf_counter() - start, 3)
    return found


def describe(name: str) -> dict[str, Any]:
    """The device's name, memory and toolkit."""
    import torch

    device = torch.device(name)
    if device.type != "cuda":
        return {"name": "CPU, interpreted", "memory_bytes": None}
    found = torch.cuda.get_device_properties(device)
    return {
        "name": found.name,
        "memory_bytes": found.total_memory,
        "multiprocessors": found.multi_processor_count,
        "capability": [found.major, found.minor],
        "cuda": torch.version.cuda,
        "devices": torch.cuda.device_count(),
    }


def which(found: Mapping[str, Any]) -> tuple[Any, Any]:
    """Numbers of two devices compare where this is the same: memory and drivers differ a little between machines."""
    return found["name"], found.get("capability")


def said(command: tuple[str, ...]) -> str:
    """The output of a command; that it is not there, where it is not."""
    if shutil.which(command[0]) is None:
        return f"{command[0]} is not installed"
    run = subprocess.run(command, capture_output=True, text=True, timeout=_COMMAND_S, check=False)
    return (run.stdout + run.stderr)[:_MOST_CHARACTERS]


def environment() -> dict[str, Any]:
    from benchmarks import measure

    return measure.environment() | {"disk_free_bytes": shutil.disk_usage(tempfile.gettempdir()).free}


def work(order: Mapping[str, Any], channel: Channel) -> None:
    found: dict[str, Callable[[], Any]] = {
        IMPORTS: import_seconds,
        "environment": environment,
        "device": lambda: describe(order["device"]),
        **{name: lambda command=command: said(command) for name, command in _COMMANDS.items()},
    }
    for cell in order["cells"]:
        channel.begin(cell)
        try:
            channel.row(cell, found=found[cell]())
        except Exception as error:  # one machine, one chance: the next cell is another matter
            channel.row(cell, error=text_of(error))


if __name__ == "__main__":
    serve(work)
