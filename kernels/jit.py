"""Triton, or a stand-in where it is not installed, so that the files of verbs can be imported.

A verb's file imports Triton where it is installed. So ``execution`` imports such a file only where kernels run.
"""

from __future__ import annotations

import importlib
import importlib.util
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, TypeAlias

IS_INSTALLED = importlib.util.find_spec("triton") is not None


def _undecorated(function: Any = None, **options: Any) -> Any:
    """Stands for ``triton.jit``, with options or without."""
    return _undecorated if function is None else function


jit: Any = importlib.import_module("triton").jit if IS_INSTALLED else _undecorated

if TYPE_CHECKING:
    # Compile-time arguments are declared tl.constexpr and used as the values they hold, which no type checker follows.
    class tl(Any):
        constexpr: TypeAlias = Any

elif IS_INSTALLED:
    import triton.language as tl
else:
    tl = SimpleNamespace(constexpr=lambda value: value)


@jit
def _nothing():
    pass


INTERPRETED = IS_INSTALLED and not isinstance(_nothing, importlib.import_module("triton").JITFunction)
"""Whether Triton was imported with its interpreter on, which runs kernels on host memory."""
