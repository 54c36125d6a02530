"""Faults at the n-th file call, and a program that runs conversions so that tests can kill them.

The program imports everything once and then forks a child for each line of JSON that it reads. So killing two hundred
conversions takes seconds, and pytest's own process is never forked.
"""

from __future__ import annotations

import gc
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from automodel_conv.files import system
from automodel_conv.files.uploads import s3_store

# The functions of files/system.py that call the system, except those that never fail.
CHANGING = (
    *("create", "open_append", "open_existing", "pwritev", "copy_range", "write_end", "truncate", "reserve", "sync"),
    *("make_directory", "sync_directory", "rename", "copy_file", "remove", "remove_directory"),
    "make_temporary_directory",
)
READING = (
    "open_readonly",
    "preadv",
    "read_into_cache",
    "size",
    "map_private",
    "list_names",
    "identity",
    "is_at",
    "lock",
    "lock_range",
    "open_again",
    "free_bytes",
)
NEVER_FAILING = (
    *("exists", "is_file", "is_directory", "is_link", "real_path", "unlock", "begin_writeback"),
    *("unlock_range", "can_lock_ranges"),
    *("is_cached", "drop_cache", "seconds_ready", "can_map", "unmap", "read_text", "cache_directory"),
)

Hook = Callable[[int, str, tuple[Any, ...]], None]


def replace_calls(
    names: tuple[str, ...],
    before: Hook = lambda *call: None,
    after: Hook = lambda *call: None,
    put: Callable[[Any, str, Any], None] = setattr,
) -> None:
    """Count calls of these functions, from 1. Pass each to ``before`` and, unless it fails, to ``after``."""
    numbers = itertools.count(1)

    def watched(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            number = next(numbers)
            before(number, name, arguments)
            result = real(*arguments)
            after(number, name, arguments)
            return result

        return call

    for name in names:
        put(system, name, watched(name, getattr(system, name)))


def descriptors() -> int:
    """Return the number of open files.

    Sockets and pipes do not count: those of servers and connections of earlier tests may be closed at any time.
    """
    opened = 0
    for number in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # that of the listing itself is closed
            opened += os.readlink(f"/proc/self/fd/{number}").startswith("/")
    return opened


def mapped_files() -> list[str]:
    """Return the file of each mapping of a checkpoint file into memory."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return [line.split(maxsplit=5)[5] for line in lines if ".safetensors" in line]


def workers() -> list[str]:
    """Return the names of the package's live threads, after giving idle ones a moment to end."""
    until = time.monotonic() + 10
    while True:
        alive = [thread.name for thread in threading.enumerate() if thread.name.startswith("automodel_conv")]
        if not alive or time.monotonic() > until:
            return alive
        time.sleep(0.001)


class Forks:
    """A handle that tests use to talk to the program."""

    def __init__(self) -> None:
        path = os.pathsep.join([str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")])
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": path},
        )

    def start(self, verb: str, **job: Any) -> None:
        """Run ``convert_checkpoint(**arguments)`` in a child, or ``save_checkpoint`` of a model.

        Keywords of a job: ``arguments``; ``signal``, sent at ``call`` (a number among ``CHANGING``), ``when`` "before"
        or "after" it, or without a call after ``delay`` seconds; ``limit``, the largest size of a file in bytes;
        ``hold``, wait at the call instead until the process is killed; ``part_bytes``, the size of a part of an upload.
        """
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"verb": verb, **job}) + "\n")
        self._process.stdin.flush()

    def answer(self) -> dict[str, Any]:
        """Return the ``status`` of the last job, as of waitpid, and the report of a child that lived to write one."""
        assert self._process.stdout is not None
        return json.loads(self._process.stdout.readline())

    def run(self, verb: str, **job: Any) -> dict[str, Any]:
        self.start(verb, **job)
        return self.answer()

    def close(self) -> None:
        self._process.communicate("")


@contextmanager
def forks() -> Iterator[Forks]:
    program = Forks()
    try:
        yield program
    finally:
        program.close()


def _child(job: dict[str, Any], answer: int, convert: Callable[..., Any], save: Callable[..., Any]) -> None:
    outcome: dict[str, Any] = {"calls": 0}
    number = getattr(signal, job["signal"]) if "signal" in job else 0

    def note(call: int, *_: Any) -> None:
        outcome["calls"] = call

    def send(call: int, *_: Any) -> None:
        note(call)
        if call == job.get("call"):
            if job.get("hold"):
                os.write(answer, b"\n")  # reports that it holds
                time.sleep(60)
            os.kill(os.getpid(), number)

    signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a shell ignore it
    hooks = {"before": note} | ({job.get("when", "before"): send} if "call" in job else {})
    replace_calls(CHANGING, **hooks)
    if "part_bytes" in job:
        s3_store.PART_BYTES = job["part_bytes"]
    if "limit" in job:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (job["limit"], job["limit"]))  # Python ignores SIGXFSZ
    open_before = descriptors()
    try:
        report = (convert if job["verb"] == "convert" else save)(**job["arguments"])
        outcome |= {"outcome": "done", "resumed": getattr(report, "files_resumed", 0)}
    except BaseException as error:
        outcome |= {"outcome": type(error).__name__, "text": str(error)}
    calls = outcome["calls"]
    if descriptors() > open_before:
        gc.collect()  # contextlib.ExitStack refers to an error of its own end in a circle
    outcome |= {"descriptors": descriptors() - open_before, "workers": workers(), "later": outcome["calls"] - calls}
    os.write(answer, json.dumps(outcome).encode())


def _serve() -> None:
    import torch

    torch.set_num_threads(1)
    import automodel_conv as amc
    from tests.model_zoo import build_model

    with suppress(ImportError):
        import s3fs  # noqa: F401 - a second for each child that uploads

    model = build_model("mixtral")
    os.fsync = lambda fd: None  # killing a process loses nothing that the system has accepted
    for line in sys.stdin:
        job = json.loads(line)
        if job["verb"] == "warm":  # once here, so that no child repeats the imports and look-ups
            amc.convert_checkpoint(**job["arguments"])
            print("{}", flush=True)
            continue
        read, write = os.pipe()
        child = os.fork()
        if not child:
            os.close(read)
            try:
                _child(job, write, amc.convert_checkpoint, lambda **arguments: amc.save_checkpoint(model, **arguments))
            finally:
                os._exit(0)
        os.close(write)
        if "signal" in job and "call" not in job:
            time.sleep(job["delay"])
            os.kill(child, getattr(signal, job["signal"]))
        with os.fdopen(read, "rb") as pipe:
            if job.get("hold"):
                pipe.readline()
                print(json.dumps({"holds": child}), flush=True)
            text = pipe.read().strip()
        status = os.waitpid(child, 0)[1]
        print(json.dumps({"status": status, **(json.loads(text) if text else {})}), flush=True)


if __name__ == "__main__":
    _serve()
