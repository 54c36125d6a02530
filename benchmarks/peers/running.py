"""Run jobs alternately, each in a process of its own, on a machine in one of the states of ``machines``."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from benchmarks import measure, memory
from benchmarks.peers import cache
from benchmarks.peers.machines import State
from benchmarks.peers.methods import METHODS
from benchmarks.peers.worker import Job, variables


def run_jobs(jobs: Mapping[str, Job], repetitions: int, state: State) -> dict[str, list[dict[str, Any]]]:
    """Return the measurements of each job, by its key and repetition.

    A run that was killed has only ``killed``.

    Raises:
        RuntimeError: a run failed.
    """
    return measure.interleaved(list(jobs), repetitions, lambda key, repetition: _run(jobs[key], repetition, state))


def _run(job: Job, repetition: int, state: State) -> dict[str, Any]:
    if job.cache == "cold":  # before the wait, because this also frees memory
        for directory, _ in job.points:
            cache.evict(directory)
    state.before()
    memory.wait(job.memory)
    free = memory.free()
    try:
        return (_load if state.loads == 1 else _load_twice)(job, repetition, state) | free
    except measure.Killed:
        return {"killed": True}


def _load(job: Job, repetition: int, state: State) -> dict[str, Any]:
    huge_pages = job.method in METHODS and job.memory in METHODS[job.method].huge_pages
    result = measure.run_worker(
        ["-m", "benchmarks.peers", "--worker", json.dumps(job.as_dict())],
        repetition,
        variables=variables(job.cache, huge_pages),
        prefix=state.prefix,
    )
    return result["loads"][0]


def _load_twice(job: Job, repetition: int, state: State) -> dict[str, Any]:
    """Start two loads at the same time.

    Return the measurements of the one that ends last.
    """
    with tempfile.TemporaryDirectory(prefix="benchmark-meet-") as place, ThreadPoolExecutor(2) as pool:
        both = list(pool.map(lambda _: _load(replace(job, meet=place), repetition, state), range(2)))
    measure.check_digests({f"load {number}": load["digest"] for number, load in enumerate(both)})
    return max(both, key=lambda load: load["seconds"])
