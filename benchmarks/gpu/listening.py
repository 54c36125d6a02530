"""Start workers, read their messages, and end them: at a deadline, after a long silence, or when one dies."""

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
# The log stays small enough to be copied back from a remote machine.
_MOST_WORDS_BYTES = 64 << 10
MOST_LOG_BYTES = 8 << 20

Message = Mapping[str, Any]


class Place(NamedTuple):
    """The surroundings of workers: variables to add to this process's environment, and the log for their output."""

    variables: Mapping[str, str]
    log: Path


class Limits(NamedTuple):
    """The time at which a worker must end, by ``time.monotonic``, and the longest silence that is allowed."""

    deadline: float
    silence_s: float


def run_worker(
    module: str, order: Message, place: Place, limits: Limits, hear: Callable[[Message], None]
) -> str | None:
    """Run one worker from its start to any end, then append its standard error to the log.

    Returns:
        The reason why it did not end well, or None.
    """
    with tempfile.TemporaryFile() as words:  # a file per worker, since several write at once
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
        start_new_session=True,  # a process group, to be killed with all its children
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
    """Send the order and read all messages.

    Return why the worker must be killed, or None if it ended itself.
    """
    with suppress(BrokenPipeError):
        process.stdin.write(json.dumps(order).encode() + b"\n")  # type: ignore[union-attr]
        process.stdin.flush()  # type: ignore[union-attr]
    for line in _lines(process.stdout.fileno(), limits):  # type: ignore[union-attr]
        if isinstance(line, str):
            return line
        message = None
        with suppress(ValueError):  # the incomplete last line of a worker that died
            message = json.loads(line)
        if isinstance(message, dict):  # otherwise printed before ``serve`` reserved standard output for messages
            hear(message)
    try:
        process.wait(_ENDING_S)
    except subprocess.TimeoutExpired:
        return f"did not end within {_ENDING_S} s"
    return None


def _lines(descriptor: int, limits: Limits) -> Iterator[bytes | str]:
    """Yield lines as they come until the end, or a text with the reason for not waiting for the next."""
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
    """Append with one write, so that outputs of workers do not mix.

    Do nothing if the log is full.
    """
    with log.open("ab", buffering=0) as file:
        if words and file.tell() + len(words) < MOST_LOG_BYTES:
            file.write(b"--- %b\n%b\n" % (module.encode(), words.rstrip()))
