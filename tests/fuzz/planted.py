"""Planted mistakes of a parser, which fuzzing must find: wrong lines of ``files/header.py``."""

from __future__ import annotations

import inspect
from types import FunctionType, ModuleType

# Lines and their replacements; fuzzing ``header`` finds each.
PLANTED = {
    "a range check that is off by one": (
        [("if stop > data_bytes:", "if stop > data_bytes + 1:"), ("if stop < data_bytes:", "if stop + 1 < data_bytes:")]
    ),
    "no check of overlaps": (
        [("if starts != expected:", "if any(start > end for start, end in zip(starts, expected)):")]
    ),
    "a product that wraps": (
        [
            ("size_bits *= dim\n", "size_bits = size_bits * dim % 2**64\n"),
            ("if size_bits > MAX_BITS or dim > MAX_BITS:", "if dim >= 2**64:"),
        ]
    ),
}


def plant(name: str, module: ModuleType) -> list[FunctionType]:
    """Redefine the functions of a module with a mistake; return them."""
    source = inspect.getsource(module)
    for right, wrong in PLANTED[name]:
        if source.count(right) != 1:
            raise LookupError(f"{module.__name__} has {right!r} {source.count(right)} times")
        source = source.replace(right, wrong)
    exec(compile(source, module.__file__ or "planted", "exec"), vars(module))
    return [value for value in vars(module).values() if isinstance(value, FunctionType)]
