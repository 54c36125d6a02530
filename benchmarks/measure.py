"""How the benchmarks measure: interleaved runs in new processes, medians and spread, environment.

A method is timed by a worker, a command that prints one JSON object on its last line. Workers take
turns, and the order is rotated every round, so that a slow minute hits all methods alike.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy
from rich.console import Console
from rich.table import Table

import automodel_conv

_REPOSITORY = Path(__file__).resolve().parent.parent
_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_PACKAGES = ("torch", "transformers", "safetensors", "numpy")


class Spread(NamedTuple):
    """A median and the 20th and 80th percentile around it."""

    median: float
    p20: float
    p80: float

    def text(self, scale: float = 1.0, digits: int = 2) -> str:
        median, p20, p80 = (f"{value * scale:.{digits}f}" for value in self)
        return f"{median} ({p20}-{p80})"


def spread(values: Sequence[float]) -> Spread:
    p20, median, p80 = numpy.percentile(values, [20, 50, 80])
    return Spread(float(median), float(p20), float(p80))


def rotated(names: Sequence[str], repetition: int) -> list[str]:
    """The order of a round: every method comes first in turn."""
    start = repetition % len(names)
    return [*names[start:], *names[:start]]


def run_interleaved(
    commands: Mapping[str, Sequence[str]], repetitions: int, before: Callable[[], None]
) -> dict[str, list[dict[str, Any]]]:
    """What every worker printed, by method and repetition.

    Args:
        commands: arguments to this Python interpreter, by method.
        before: called before each worker starts.

    Raises:
        RuntimeError: a worker failed; with the end of what it printed.
    """
    results: dict[str, list[dict[str, Any]]] = {method: [] for method in commands}
    for repetition in range(repetitions):
        for method in rotated(list(commands), repetition):
            before()
            results[method].append(run_worker(commands[method], repetition))
            show(f"  round {repetition + 1} of {repetitions}: {method}", err=True)
    return results


def run_worker(arguments: Sequence[str], repetition: int) -> dict[str, Any]:
    command = [sys.executable, *arguments, "--repetition", str(repetition)]
    run = subprocess.run(command, capture_output=True, text=True, cwd=_REPOSITORY)
    if run.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{run.stderr[-4000:]}")
    return json.loads(run.stdout.splitlines()[-1])


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def read_through(directory: str) -> int:
    """Read every file once, so that all are in the page cache; returns their bytes."""
    buffer = bytearray(16 << 20)
    total = 0
    for path in sorted(Path(directory).iterdir()):
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                total += count
    return total


def environment() -> dict[str, Any]:
    """What a number cannot be read without."""
    versions: dict[str, str | None] = {"automodel_conv": automodel_conv.__version__}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "kernel": platform.release(),
        "machine": platform.machine(),
        "cores": cores(),
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "huge_pages": _HUGE_PAGES.read_text().strip() if _HUGE_PAGES.exists() else None,
        "commit": _commit(),
        "versions": versions,
    }


def _commit() -> str | None:
    command = ["git", "-C", str(_REPOSITORY), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        run = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return run.stdout.strip() or None


def show(what: str | Table, err: bool = False) -> None:
    terminal = sys.stderr.isatty() if err else sys.stdout.isatty()
    Console(stderr=err, width=None if terminal else 140, highlight=False).print(what)


def show_environment(found: Mapping[str, Any]) -> None:
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    load = ", ".join(str(load) for load in found["load_average"])
    show(f"Python {found['python']}, {versions}; {found['cores']} cores, load average {load}")


def write_json(path: str | None, result: Mapping[str, Any]) -> None:
    if path is not None:
        Path(path).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
