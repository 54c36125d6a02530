"""Starts ranks as real processes that talk over gloo: one process imports and prepares everything, then divides.

    python -m tests.distributed.starting SUITE WORLD DIRECTORY

SUITE is a module beside this one with ``prepare(directory, world) -> common`` and ``rank(common)``; what a rank says is
what the test sees. A rank that raises ends with its traceback; then all are ended.
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
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
# Longer than anything here takes, on a busy machine too.
DEADLINE_S = 240


class Ended(NamedTuple):
    """How a rank ended, and what it said."""

    code: int
    said: list
    error: str


def started(suite: str, world: int, directory: Path, *, allowed_codes: tuple[int, ...] = (0,)) -> list[list]:
    """Run a suite; what each rank said.

    Args:
        allowed_codes: how ranks may end; a killed one ends with the negative number of its signal.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_DEACTIVATE_ASYNC_LOAD": "1"}
    # This checkout comes before an installed one, a transformers given by PYTHONPATH before the environment's.
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *sys.path[1:]])
    command = [sys.executable, "-m", "tests.distributed.starting", suite, str(world), str(directory)]
    process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=2 * DEADLINE_S)
    if process.returncode:
        raise AssertionError(process.stderr[-6000:])
    ended = [_read(directory, rank) for rank in range(world)]
    wrong = [f"rank {n} ended with {e.code}\n{e.error}" for n, e in enumerate(ended) if e.code not in allowed_codes]
    if wrong:
        raise AssertionError("\n\n".join(wrong)[-12000:])
    return [end.said for end in ended]


def _read(directory: Path, rank: int) -> Ended:
    said = [json.loads(line) for line in (directory / f"said.{rank}").read_text().splitlines()]
    return Ended(int((directory / f"code.{rank}").read_text()), said, (directory / f"error.{rank}").read_text())


def say(value: object) -> None:
    """From a rank to the test."""
    os.write(1, json.dumps(value).encode() + b"\n")


def main() -> None:
    suite, world, directory = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    import torch

    torch.set_num_threads(1)
    module = importlib.import_module(f"tests.distributed.{suite}")
    common = module.prepare(directory, world)
    ranks = {_forked(module, common, rank, world, directory): rank for rank in range(world)}
    codes = _wait_for(dict(ranks))
    for rank in range(world):
        (directory / f"code.{rank}").write_text(str(codes[rank]))


def _forked(module, common, rank: int, world: int, directory: Path) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        for number, name in ((1, "said"), (2, "error")):
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
        module.rank(common)
        code = 0
    except BaseException:
        os.write(2, traceback.format_exc().encode())
    finally:
        os._exit(code)


def _wait_for(ranks: dict[int, int]) -> dict[int, int]:
    """Exit codes by rank; once one has failed, the others have a little time to tell what they saw."""
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
