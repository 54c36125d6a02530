"""A process that works for the command: it reads one order, and reports progress and results in lines of JSON.

The order is one line of JSON on standard input: ``cells``, the names of the cells to run, and other keys of the stage.
A worker writes

    {"cells": [NAME, ...]}             the cells that it will run, if the order leaves that to it
    {"cell": NAME}                     it begins a cell
    {"way": NAME}                      it begins one of several ways of the cell
    {"row": {"cell": NAME, ...}}       the cell is done
    {"broken": TEXT}                   it cannot continue; it ends

so that the listener knows the work in progress when a worker dies. Standard input stays open as long as the listener
lives. When it closes, the worker ends. If the worker leads a process group, the whole group ends with it, so that no
process keeps a GPU after its owner has ended.

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
    """All messages of a worker.

    ``write`` accepts one line.
    """

    def __init__(self, write: Callable[[str], Any]):
        self._write = write

    def cells(self, names: list[str]) -> None:
        self._say({"cells": names})

    def begin(self, cell: str) -> None:
        self._say({"cell": cell})

    def way(self, name: str) -> None:
        self._say({"way": name})

    def row(self, cell: str, **results: Any) -> None:
        self._say({"row": {"cell": cell, **results}})

    def broken(self, text: str) -> NoReturn:
        """End this process, because all further work in it would fail too."""
        self._say({"broken": text[-TEXT_CHARACTERS:]})
        os._exit(BROKEN_EXIT_CODE)

    def _say(self, message: dict[str, Any]) -> None:
        self._write(json.dumps(message) + "\n")


SILENT = Channel(lambda line: None)
"""For work without a listener."""


def serve(work: Callable[[dict[str, Any], Channel], None]) -> None:
    """Act as a worker: read the order, run it, end."""
    # Redirect other writes to standard output, from C too, to standard error. pytest replaces descriptor 0.
    out, control = os.fdopen(os.dup(1), "w", buffering=1), os.dup(0)  # line buffered: each message is sent at once
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
    # Exit without returning, so that a hang or crash at process exit loses no results.
    os._exit(0)


def _die_with(control: int) -> None:
    while os.read(control, 1):
        pass
    if os.getpgrp() == os.getpid():
        os.killpg(os.getpgrp(), signal.SIGKILL)
    os._exit(BROKEN_EXIT_CODE)  # the group belongs to a shell that started this by hand


def text_of(error: BaseException) -> str:
    """Return the text of an error, short enough to be kept."""
    return f"{type(error).__name__}: {error}"[:TEXT_CHARACTERS]
