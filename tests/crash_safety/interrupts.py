"""Interrupts at every place where Python can run the handler of a signal such as Ctrl-C."""

from __future__ import annotations

import contextlib
import dis
import itertools
import sys
from collections.abc import Callable, Sequence
from types import FrameType, ModuleType
from typing import Any

# Python runs handlers after these instructions, and at the start of a function.
# Source: CHECK_EVAL_BREAKER in Python/bytecodes.c of CPython (Python/ceval.c before 3.12).
_FOLLOWED_BY_HANDLERS = ("CALL", "JUMP_BACKWARD", "JUMP_ABSOLUTE")


def interrupt_at(number: int, call: Callable[[], Any], modules: Sequence[ModuleType]) -> KeyboardInterrupt | None:
    """Interrupt a call at the n-th place in the code of the modules and of contextlib.

    Returns the exception, or None if the call has ended before.
    """
    try:
        _run_until(number, call, {module.__file__ for module in (*modules, contextlib)})
    except KeyboardInterrupt as error:
        return error
    return None


def _run_until(number: int, call: Callable[[], Any], files: set[str | None]) -> None:
    places = itertools.count(1)

    def pass_place() -> None:
        if next(places) == number:
            raise KeyboardInterrupt

    def enter(frame: FrameType, event: str, _: Any) -> Callable[..., Any] | None:
        if frame.f_code.co_filename not in files:
            return None
        frame.f_trace_opcodes = True
        instruction = ""

        def step(frame: FrameType, event: str, _: Any) -> Callable[..., Any]:
            nonlocal instruction
            if event == "opcode":
                last, instruction = instruction, dis.opname[frame.f_code.co_code[frame.f_lasti]]
                if last.startswith(_FOLLOWED_BY_HANDLERS):
                    pass_place()
            return step

        pass_place()
        return step

    tracer = sys.gettrace()
    sys.settrace(enter)
    try:
        call()
    finally:
        sys.settrace(tracer)
