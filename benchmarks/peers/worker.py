"""Loads in a process of their own, which is what ``python -m benchmarks.peers`` starts for each of them."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from automodel_conv.measuring import ready_memory
from benchmarks import measure
from benchmarks.peers import cache, overlay
from benchmarks.peers.methods import METHODS
from benchmarks.peers.roofs import ROOFS

LAYOUTS = {"[E, 2I, H]": False, "[E, H, 2I]": True}
"""How gate and up lie, and whether that is transposed."""
CACHES = ("warm", "cold")

# torch then advises large new tensors to use huge pages; buffers given to peers are advised besides.
_HUGE_PAGES = {"THP_MEM_ALLOC_ENABLE": "1"}
# Else these two would read past the page cache, which is what they are good at, but not while it is warm.
_BUFFERED = {"FASTSAFETENSORS_ODIRECT": "0", "RUNAI_STREAMER_FS_STRATEGY": "sync_buffered"}
# Of a cold file, a few pages may be found by chance: those that the system has read for its names.
_MOST_COLD, _LEAST_WARM = 0.01, 0.99


@dataclass(frozen=True)
class Job:
    """What one process loads, one after the other.

    Args:
        points: checkpoints, and how many threads load each.
        warm_up: a tiny checkpoint, loaded first.
        growth: for each point, how many times the seconds of the one before are to be expected.
        most_seconds: a point that is expected to take longer is left out, and all after it.
    """

    method: str
    points: Sequence[tuple[str, int]]
    warm_up: str
    layout: str = "[E, 2I, H]"
    cache: str = "warm"
    growth: Sequence[float] = ()
    most_seconds: float = float("inf")

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def variables(where: str, huge_pages: bool = True) -> dict[str, str]:
    """Of the environment of a process.

    Args:
        where: state of the page cache.
        huge_pages: torch asks for them.
    """
    path = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), str(overlay.FOLDER))))
    return {**(_HUGE_PAGES if huge_pages else {}), **(_BUFFERED if where == "warm" else {}), "PYTHONPATH": path}


def work(job: Job, repetition: int) -> list[dict[str, Any]]:
    """The loads of a process, in this one; of those left out, ``expected_seconds`` only."""
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
    # On a virtual machine the first touch of memory that the host has taken is many times slower than the reading, and
    # the host takes free memory after a second or two: this is last.
    ready_memory(3 * measure.file_bytes(directory))
    share = cache.cached_share(directory)
    if not (share <= _MOST_COLD if job.cache == "cold" else share >= _LEAST_WARM):
        raise RuntimeError(f"{share:.1%} of the files are in the page cache, which is not {job.cache}")
    with measure.Measured() as measured:
        made = run()
    digest = measure.digest(made) if repetition == 0 and isinstance(made, Mapping) else None
    return {**measured.result, "cached_share": share, "digest": digest}


def _prepare(job: Job, directory: str, threads: int):
    if job.method in ROOFS:
        return ROOFS[job.method].prepare(directory, threads)
    return METHODS[job.method].prepare(directory, threads, LAYOUTS[job.layout])
