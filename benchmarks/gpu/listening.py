"""Starting workers, hearing what they say, and ending them: at a deadline, when they fall silent, when one dies."""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, NamedTuple

from benchmarks import measure

_ENDING_S = 10
_TAIL_BYTES = 1500
# The log stays small enough to come back from wherever this runs.
_MOST_WORDS_BYTES = 64 << 10
MOST_LOG_BYTES = 8 << 20

Message = Mapping[str, Any]


class Place(NamedTuple):
    """The surroundings of workers: variables added to the environment of this process, and the log for their words."""

    variables: Mapping[str, str]
    log: Path


class Limits(NamedTuple):
    """When a worker has to end, by ``time.monotonic``, and the longest time for which it may say nothing."""

    deadline: float
    silence_s: float


def run_worker(
    module: str, order: Message, place: Place, limits: Limits, hear: Callable[[Message], None]
) -> str | None:
    """One worker from its start to its end, whatever that is; then its words on standard error join the log.

    Returns:
        Why it did not end well; None where it did.
    """
    with tempfile.TemporaryFile() as words:  # its own, since several workers speak at once
        why = _from_start_to_end(module, order, place, limits, hear, words)
        _log(place.log, module, _end_of_words(words, _MOST_WORDS_BYTES))
        return why


def _from_start_to_end(
    module: str, order: Message, place: Place, limits: Limits, hear: Callable[[Message], None], words: IO[bytes]
) -> str | None:
    path = os.pathsep.join(filter(None, [str(measure.REPOSITORY), os.environ.get("PYTHONPATH")]))
    process = subprocess.Popen(
        [sys.executable, "-m", module],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=words,
        cwd=measure.REPOSITORY,
        env={**os.environ, **place.variables, "PYTHONPATH": path},
        start_new_session=True,  # its own group, to be killed with all that it starts
    )
    broken: list[str] = []

    def heard(message: Message) -> None:
        if "broken" in message:
            broken.append(message["broken"])
        else:
            hear(message)

    try:
        ended = _converse(process, order, limits, heard)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for pipe in (process.stdin, process.stdout):
            with suppress(OSError):
                pipe.close()  # type: ignore[union-attr]
    if broken:
        return broken[0]
    if ended is None and process.returncode == 0:
        return None
    tail = _end_of_words(words, _TAIL_BYTES).decode(errors="replace")
    return f"{ended or _end_of(process.returncode)}\n{tail}".strip()


def _converse(
    process: subprocess.Popen[bytes], order: Message, limits: Limits, hear: Callable[[Message], None]
) -> str | None:
    """Say the order and hear all that is said; returns why the worker is to be killed, None where it ended itself."""
    with suppress(BrokenPipeError):
        process.stdin.write(json.dumps(order).encode() + b"\n")  # type: ignore[union-attr]
        process.stdin.flush()  # type: ignore[union-attr]
    for line in _lines(process.stdout.fileno(), limits):  # type: ignore[union-attr]
        if isinstance(line, str):
            return line
        message = None
        with suppress(ValueError):  # the end of one who died in the middle of a word
            message = json.loads(line)
        if isinstance(message, dict):  # else printed before ``serve`` kept standard output for the worker
            hear(message)
    try:
        process.wait(_ENDING_S)
    except subprocess.TimeoutExpired:
        return f"did not end within {_ENDING_S} s"
    return None


def _lines(descriptor: int, limits: Limits) -> Iterator[bytes | str]:
    """Lines as they come, until there are no more; or a text that says why nobody waits for the next."""
    rest = b""
    with selectors.DefaultSelector() as selector:
        selector.register(descriptor, selectors.EVENT_READ)
        while True:
            left_s = min(limits.deadline - time.monotonic(), limits.silence_s)
            if left_s <= 0 or not selector.select(left_s):
                out_of_time = time.monotonic() >= limits.deadline
                yield "killed: its time was up" if out_of_time else f"killed: no word for {limits.silence_s:.0f} s"
                return
            read = os.read(descriptor, 1 << 16)
            if not read:
                return
            *lines, rest = (rest + read).split(b"\n")
            yield from lines


def _end_of(code: int) -> str:
    return f"killed by signal {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def _end_of_words(words: IO[bytes], most_bytes: int) -> bytes:
    words.seek(max(0, words.seek(0, os.SEEK_END) - most_bytes))
    return words.read()


def _log(log: Path, module: str, words: bytes) -> None:
    """One write, so that workers that end at the same time follow each other; none into a log that is full."""
    with log.open("ab", buffering=0) as file:
        if words and file.tell() + len(words) < MOST_LOG_BYTES:
            file.write(b"--- %b\n%b\n" % (module.encode(), words.rstrip()))
