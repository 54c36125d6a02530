"""Loads in a process of their own.

``python -m benchmarks.peers`` starts one for each run.
"""

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
"""The layout of gate and up, and whether it is transposed."""
CACHES = ("warm", "cold")

# torch then advises huge pages for large new tensors, including the buffers that peers receive.
_HUGE_PAGES = {"THP_MEM_ALLOC_ENABLE": "1"}
# These two bypass the page cache by default, which is slower if the page cache is warm.
_BUFFERED = {"FASTSAFETENSORS_ODIRECT": "0", "RUNAI_STREAMER_FS_STRATEGY": "sync_buffered"}
# A few pages of a cold file may be cached by chance, because the system read them together with its names.
_MOST_COLD, _LEAST_WARM = 0.01, 0.99
_MOST_WAITED_SECONDS = 120


@dataclass(frozen=True)
class Job:
    """The loads of one process, one after the other.

    Args:
        points: checkpoints, and the number of threads that load each.
        warm_up: a tiny checkpoint, loaded first.
        growth: for each point, the expected ratio of its seconds to those of the one before.
        most_seconds: a point with a longer expected time is left out, and all after it.
        memory: state of free memory, one of ``memory.MEMORY``.
        meet: an empty directory, in which two processes wait for each other before and after the timing.
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
    """Return the environment variables of a process.

    Args:
        where: state of the page cache.
        huge_pages: whether torch requests huge pages.
    """
    path = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), str(overlay.FOLDER))))
    return {**(_HUGE_PAGES if huge_pages else {}), **(_BUFFERED if where == "warm" else {}), "PYTHONPATH": path}


def work(job: Job, repetition: int) -> list[dict[str, Any]]:
    """Perform the loads of a process, in this one.

    Points that are left out have only ``expected_seconds``.
    """
    warnings.simplefilter("ignore")  # dcp warns that there is no process group
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
    # This is last, because the host reclaims free memory after a second or two.
    memory.prepare(job.memory, measure.file_bytes(directory))
    share = cache.cached_share(directory)
    if not (share <= _MOST_COLD if job.cache == "cold" else share >= _LEAST_WARM):
        raise RuntimeError(f"{share:.1%} of the files are in the page cache, which is not {job.cache}")
    _meet(job, "before")
    with measure.Measured() as measured:
        loaded = run()
    _meet(job, "after")
    digest = measure.digest(loaded) if repetition == 0 and isinstance(loaded, Mapping) else None
    read_seconds = loaded.read_seconds if isinstance(loaded, Loaded) else None
    return {**measured.result, "read_seconds": read_seconds, "cached_share": share, "digest": digest}


def _meet(job: Job, when: str) -> None:
    """Wait until the other process has arrived too.

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
