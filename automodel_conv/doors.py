"""Errors in the words of the function that was called: its advice names only arguments that this function has."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar

from automodel_conv.errors import ConversionError, Words, message

# Texts of Python and torch for a lack of memory or threads; these errors have no class of their own.
_EXHAUSTED = re.compile("can't start new thread|DefaultCPUAllocator|std::bad_alloc")

_Given = ParamSpec("_Given")
_Returned = TypeVar("_Returned")


def door(doing: str) -> Callable[[Callable[_Given, _Returned]], Callable[_Given, _Returned]]:
    """Decorate a public function: see ``at_door``, with the arguments of its call."""

    def decorate(function: Callable[_Given, _Returned]) -> Callable[_Given, _Returned]:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def called(*args: _Given.args, **kwargs: _Given.kwargs) -> _Returned:
            with at_door(doing, lambda: _given(signature, args, kwargs)):
                return function(*args, **kwargs)

        return called

    return decorate


@contextmanager
def at_door(doing: str, arguments: Callable[[], Mapping[str, object]]) -> Iterator[None]:
    """The body of a public function: errors advise its arguments only, and a lack of memory is one of them.

    Memory and threads that the system does not give are a ConversionError. What a device lacks, and pinned memory,
    stays torch's own error, which callers know how to meet.

    Args:
        doing: what the function does, for that error.
        arguments: tells those of this call, by name.
    """
    try:
        yield
    except ConversionError as error:
        error.say(_in_python(arguments()))
        raise
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not _EXHAUSTED.search(str(error)):
            raise
        found = "\n".join([f"{type(error).__name__}: {error}", *getattr(error, "__notes__", ())])
        do = [
            "free memory",
            "raise the limits of this process (ulimit -a)",
            "pass less for {threads=}",
            "pass less for {scratch_bytes=}",
        ]
        text = message(f"{doing} needs more memory or threads than the system gives", found=found, do=do)
        exhausted = ConversionError(text)
        exhausted.say(_in_python(arguments()))
        raise exhausted from error


def _given(signature: inspect.Signature, args: Any, kwargs: Any) -> Mapping[str, object]:
    given = signature.bind(*args, **kwargs)
    given.apply_defaults()
    return given.arguments


def _in_python(arguments: Mapping[str, object]) -> Words:
    """How a caller writes an argument; None if there is no such argument, or it has that value already."""

    def words(said: str) -> str | None:
        name, _, value = said.partition("=")
        if "(" in name:  # another function
            return said
        if name not in arguments or (value and repr(arguments[name]) == value.replace('"', "'")):
            return None
        return said

    return words
