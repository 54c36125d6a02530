"""Loads in a process of their own, which is what ``python -m benchmarks.peers`` starts for each of them."""

from __future__ import annotations

import logging
import os
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import measure, memory
from benchmarks.peers import cache, overlay
from benchmarks.peers.methods import METHODS, Loaded
from benchmarks.peers.roofs import ROOFS

LAYOUTS = {"[E, 2I, H]": False, "[E, H, 2I]": True}
"""How gate and up lie, and whether that is transposed."""
CACHES = ("warm", "cold")

# torch then advises large new tensors to use huge pages, those that peers are given as buffers too.
_HUGE_PAGES = {"THP_MEM_ALLOC_ENABLE": "1"}
# Else these two would read past the page cache, which is what they are good at, but not while it is warm.
_BUFFERED = {"FASTSAFETENSORS_ODIRECT": "0", "RUNAI_STREAMER_FS_STRATEGY": "sync_buffered"}
# A few pages of a cold file may be there by chance: those that the system has read for its names.
_MOST_COLD, _LEAST_WARM = 0.01, 0.99
_MOST_WAITED_SECONDS = 120


@dataclass(frozen=True)
class Job:
    """The loads of one process, one after the other.

    Args:
        points: checkpoints, and how many threads load each.
        warm_up: a tiny checkpoint, loaded first.
        growth: for each point, how many times the seconds of the one before are to be expected.
        most_seconds: a point that is expected to take longer is left out, and all after it.
        memory: state of free memory, one of ``memory.MEMORY``.
        meet: an empty directory, in which two processes wait for each other before the timing and after it.
    """

    method: str
    points: Sequence[tuple[str, int]]
    warm_up: str
    layout: str = "[E, 2I, H]"
    cache: str = "warm"
    growth: Sequence[float] = ()
    most_seconds: float = float("inf")
    memory: str = memory.READY
    meet: str | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def variables(where: str, huge_pages: bool = True) -> dict[str, str]:
    """Variables of the environment of a process.

    Args:
        where: state of the page cache.
        huge_pages: torch asks for them.
    """
    path = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), str(overlay.FOLDER))))
    return {**(_HUGE_PAGES if huge_pages else {}), **(_BUFFERED if where == "warm" else {}), "PYTHONPATH": path}


def work(job: Job, repetition: int) -> list[dict[str, Any]]:
    """The loads of a process, in this one; those left out have ``expected_seconds`` only."""
    warnings.simplefilter("ignore")  # dcp's, about there being no process group
    logging.disable(logging.INFO)
    results: list[dict[str, Any]] = []
    expected = 0.0
    for number, (directory, threads) in enumerate(job.points):
        if number and job.growth:
            expected *= job.growth[number]
        if expected > job.most_seconds:
            results.append({"expected_seconds": expected})
            continue
        torch.set_num_threads(threads)
        _prepare(job, job.warm_up, threads)()
        result = _load(job, directory, threads, repetition)
        expected = result["seconds"]
        results.append(result)
    return results


def _load(job: Job, directory: str, threads: int, repetition: int) -> dict[str, Any]:
    run = _prepare(job, directory, threads)
    if job.cache == "cold":
        cache.evict(directory)
    else:
        measure.read_through(directory)
    # The host takes free memory back after a second or two: this is last.
    memory.prepare(job.memory, measure.file_bytes(directory))
    share = cache.cached_share(directory)
    if not (share <= _MOST_COLD if job.cache == "cold" else share >= _LEAST_WARM):
        raise RuntimeError(f"{share:.1%} of the files are in the page cache, which is not {job.cache}")
    _meet(job, "before")
    with measure.Measured() as measured:
        made = run()
    _meet(job, "after")
    digest = measure.digest(made) if repetition == 0 and isinstance(made, Mapping) else None
    read_seconds = made.read_seconds if isinstance(made, Loaded) else None
    return {**measured.result, "read_seconds": read_seconds, "cached_share": share, "digest": digest}


def _meet(job: Job, when: str) -> None:
    """Wait until the other process is there too.

    Raises:
        TimeoutError: it does not come.
    """
    if job.meet is None:
        return
    Path(job.meet, f"{when}-{os.getpid()}").touch()
    latest = time.monotonic() + _MOST_WAITED_SECONDS
    while len(list(Path(job.meet).glob(f"{when}-*"))) < 2:
        if time.monotonic() > latest:
            raise TimeoutError(f"the other process has not come in {_MOST_WAITED_SECONDS} s")
        time.sleep(0.001)


def _prepare(job: Job, directory: str, threads: int):
    if job.method in ROOFS:
        return ROOFS[job.method].prepare(directory, threads)
    return METHODS[job.method].prepare(directory, threads, LAYOUTS[job.layout])
