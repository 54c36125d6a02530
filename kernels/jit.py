"""Triton, or a stand-in if it is not installed, so that the files of verbs can be imported either way.

A verb's file imports Triton if it is installed, so ``execution`` imports such a file only to run kernels.
"""

from __future__ import annotations

import importlib
import importlib.util
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, TypeAlias

IS_INSTALLED = importlib.util.find_spec("triton") is not None


def _undecorated(function: Any = None, **options: Any) -> Any:
    """Replace ``triton.jit``, with options or without, by a decorator that returns the function."""
    return _undecorated if function is None else function


jit: Any = importlib.import_module("triton").jit if IS_INSTALLED else _undecorated

if TYPE_CHECKING:
    # Compile-time arguments are declared tl.constexpr and used as plain values; no type checker can follow that.
    class tl(Any):
        constexpr: TypeAlias = Any

elif IS_INSTALLED:
    import triton.language as tl
else:
    tl = SimpleNamespace(constexpr=lambda value: value)


@jit
def _probe():
    pass


INTERPRETED = IS_INSTALLED and not isinstance(_probe, importlib.import_module("triton").JITFunction)
"""True if Triton was imported with its interpreter on, which runs kernels on host memory."""
