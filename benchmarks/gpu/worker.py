"""A process that works for the command: it reads one order, and says line by line in JSON what it does and finds.

The order is one line of JSON on standard input: ``cells``, the names of what to do, and whatever else the stage says.
A worker says

    {"cells": [NAME, ...]}             what it will do, if the order leaves that to it
    {"cell": NAME}                     it begins a cell
    {"way": NAME}                      it begins one of several ways to do that
    {"row": {"cell": NAME, ...}}       the cell is done
    {"broken": TEXT}                   it can do nothing more; it ends

so that whoever listens knows what was at work when a worker dies. Standard input stays open as long as the listener
lives; at its end the worker ends, and where it leads a process group, all of that group with it, so that nothing keeps
a GPU whose owner is gone.

Nothing here imports torch: a worker times that itself.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any, NoReturn

TEXT_CHARACTERS = 2000
BROKEN_EXIT_CODE = 3


class Channel:
    """All that a worker says; ``write`` takes one line."""

    def __init__(self, write: Callable[[str], Any]):
        self._write = write

    def cells(self, names: list[str]) -> None:
        self._say({"cells": names})

    def begin(self, cell: str) -> None:
        self._say({"cell": cell})

    def way(self, name: str) -> None:
        self._say({"way": name})

    def row(self, cell: str, **found: Any) -> None:
        self._say({"row": {"cell": cell, **found}})

    def broken(self, text: str) -> NoReturn:
        """End here: whatever this process would do now fails too."""
        self._say({"broken": text[-TEXT_CHARACTERS:]})
        os._exit(BROKEN_EXIT_CODE)

    def _say(self, message: dict[str, Any]) -> None:
        self._write(json.dumps(message) + "\n")


SILENT = Channel(lambda line: None)
"""For work whose progress nobody follows."""


def serve(work: Callable[[dict[str, Any], Channel], None]) -> None:
    """Be a worker: read the order, do it, end."""
    # Other writes to standard output, from C too, go where errors go; and pytest puts another file at 0.
    out, control = os.fdopen(os.dup(1), "w", buffering=1), os.dup(0)  # each line goes out at once
    os.dup2(2, 1)
    line = b""
    while not line.endswith(b"\n"):
        byte = os.read(control, 1)
        if not byte:
            return
        line += byte
    threading.Thread(target=_die_with, args=(control,), daemon=True).start()
    work(json.loads(line), Channel(out.write))
    sys.stderr.flush()
    # Not by return: what hangs at the end of a process, or crashes there, costs nothing that was measured.
    os._exit(0)


def _die_with(control: int) -> None:
    while os.read(control, 1):
        pass
    if os.getpgrp() == os.getpid():
        os.killpg(os.getpgrp(), signal.SIGKILL)
    os._exit(BROKEN_EXIT_CODE)  # the group is that of whoever started this by hand


def text_of(error: BaseException) -> str:
    """The text of an error, short enough to be kept."""
    return f"{type(error).__name__}: {error}"[:TEXT_CHARACTERS]
