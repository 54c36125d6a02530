"""Starts ranks as real processes over gloo: one process imports and prepares everything, then forks.

    python -m tests.distributed.starting SUITE WORLD DIRECTORY VARIANT...

SUITE is a module in this folder, or one of ``tests`` by its whole name. It has ``prepare(directory, world) -> common``
and ``rank(common, variant, directory)``. Each variant has its own group, one after the other. The test receives the
results that ranks send. A rank that raises ends with its traceback, and then all ranks are ended.
"""

from __future__ import annotations

import datetime
import importlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
# Longer than anything here takes, even on a busy machine.
DEADLINE_S = 200


class Ended(NamedTuple):
    """The exit code, results and standard error of a rank."""

    code: int
    results: list
    error: str


def run_suite(suite: str, world: int, directory: Path, variants: Sequence[str] = ("all",)) -> dict[str, list[Ended]]:
    """Run a suite; return how the ranks of each variant ended."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_DEACTIVATE_ASYNC_LOAD": "1"}
    # This checkout precedes an installed package, and a transformers on PYTHONPATH that of the environment.
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *sys.path[1:]])
    command = [sys.executable, "-m", "tests.distributed.starting", suite, str(world), str(directory), *variants]
    process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if process.returncode:
        raise AssertionError(process.stderr[-6000:])
    return {variant: [_read(directory / variant, rank) for rank in range(world)] for variant in variants}


def results(ended: Sequence[Ended]) -> list[list]:
    """Return the results that each rank sent; raise if a rank failed."""
    wrong = [f"rank {number} ended with {end.code}\n{end.error}" for number, end in enumerate(ended) if end.code]
    if wrong:
        raise AssertionError("\n\n".join(wrong)[-12000:])
    return [end.results for end in ended]


def _read(directory: Path, rank: int) -> Ended:
    lines = [json.loads(line) for line in (directory / f"results.{rank}").read_text().splitlines()]
    return Ended(int((directory / f"code.{rank}").read_text()), lines, (directory / f"error.{rank}").read_text())


def send(value: object) -> None:
    """Send a value from a rank to the test."""
    os.write(1, json.dumps(value).encode() + b"\n")


def main() -> None:
    suite, world, directory, *variants = sys.argv[1:]
    import torch

    torch.set_num_threads(1)
    module = importlib.import_module(suite if suite.startswith("tests.") else f"tests.distributed.{suite}")
    common = module.prepare(Path(directory), int(world))
    for variant in variants:
        own = Path(directory) / variant
        own.mkdir()
        ranks = {_forked(module, common, variant, own, rank, int(world)): rank for rank in range(int(world))}
        for rank, code in _wait_for(ranks).items():
            (own / f"code.{rank}").write_text(str(code))


def _forked(module, common, variant: str, directory: Path, rank: int, world: int) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        for number, name in ((1, "results"), (2, "error")):
            file = os.open(directory / f"{name}.{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(file, number)
        import torch.distributed as dist

        dist.init_process_group(
            "gloo",
            init_method=f"file://{directory}/rendezvous",
            rank=rank,
            world_size=world,
            timeout=datetime.timedelta(seconds=getattr(module, "TIMEOUT_S", 120)),
        )
        module.rank(common, variant, directory)
        code = 0
    except BaseException:
        os.write(2, traceback.format_exc().encode())
    finally:
        os._exit(code)


def _wait_for(ranks: dict[int, int]) -> dict[int, int]:
    """Return exit codes by rank; once a rank has failed, the others have five seconds to end."""
    codes: dict[int, int] = {}
    deadline = time.monotonic() + DEADLINE_S
    while ranks:
        for pid in list(ranks):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                code = codes[ranks.pop(pid)] = os.waitstatus_to_exitcode(status)
                if code > 0:
                    deadline = min(deadline, time.monotonic() + 5)
        if ranks and time.monotonic() > deadline:
            for pid in ranks:
                os.kill(pid, signal.SIGKILL)
            deadline += DEADLINE_S
        time.sleep(0.02)
    return codes


if __name__ == "__main__":
    main()
