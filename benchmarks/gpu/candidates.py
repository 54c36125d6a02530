"""The table of alternatives that the sweep tries against the kernels.

Add candidates here.

A candidate names the operations of ``kernels.MEASURED`` and ``quantized.QUANTIZED`` on which it is tried, and the
patches that are active while it runs: module, name, new value. Like everything, it is verified bit by bit before it is
timed. If it does not compile, or writes a wrong byte, only its own cell fails. A constant that a kernel has compiled in
can be patched only if the kernels have never run in that process: such a candidate gets ``own_process=True``.

To try another kernel function, patch a verb's kernel: see ``_decoder``.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, NamedTuple
from unittest import mock

_LAUNCH = "automodel_conv.kernels.launch"
_TILES = "automodel_conv.kernels.tiles"
_COPY = "automodel_conv.kernels.strided_copy"
_TRANSPOSE = "automodel_conv.kernels.transpose"
_INTERLEAVE = "automodel_conv.kernels.interleave"
_DEINTERLEAVE = "automodel_conv.kernels.deinterleave"
_DEQUANTIZE = "automodel_conv.kernels.dequantize"

_PLAIN = ("concatenate",)
_TURNED = ("concatenate transposed", "interleave columns", "deinterleave columns")
_DECODED = ("dequantize fp8", "dequantize mxfp4")
_DECODED_TURNED = ("dequantize fp8 transposed", "dequantize mxfp4 transposed")


class Derived(NamedTuple):
    """A value that is computed from the original one on first use, so that this file needs no Triton."""

    make: Callable[[Any], Any]


class Patch(NamedTuple):
    """``value`` in place of a module's attribute, or of the entry ``key`` of a dictionary in the module."""

    module: str
    name: str
    value: Any
    key: Any = None

    def found(self) -> Any:
        """Return the current value.

        Raises:
            AttributeError, KeyError: there is none.
        """
        owner = getattr(importlib.import_module(self.module), self.name)
        return owner if self.key is None else owner[self.key]


class Candidate(NamedTuple):
    name: str
    operations: tuple[str, ...]
    patches: tuple[Patch, ...] = ()
    own_process: bool = False


def _warps(count: int) -> Patch:
    return Patch(_LAUNCH, "OPTIONS", count, key="num_warps")


def _tiles(rows: int, columns: int) -> tuple[Patch, ...]:
    """Patch the tiles of elements of 2 bytes to this number of rows and columns."""
    return tuple(
        Patch(module, "_TILES", (rows, columns), key=(2, 2)) for module in (_TRANSPOSE, _INTERLEAVE, _DEINTERLEAVE)
    )


def _group(count: int) -> Patch:
    return Patch(_TILES, "_GROUP", Derived(lambda found: type(found)(count)))  # a tl.constexpr


def _decoder(name: str) -> Patch:
    """Patch the package's kernel with one of ``benchmarks.gpu.decoders``."""
    decoders = "benchmarks.gpu.decoders"
    replacement = Derived(lambda kernel: replace(kernel, function=importlib.import_module(decoders).KERNELS[name]))
    return Patch(_DEQUANTIZE, "DEQUANTIZE_TILES", replacement)


DECODERS = ("in two dimensions", "codes past L1", "codes evicted first", "arithmetic")
"""Kernels of ``benchmarks.gpu.decoders``."""

CANDIDATES: tuple[Candidate, ...] = (
    # Operations are tried in this order. Those with the largest differences between candidates come first, in case time
    # runs out.
    Candidate("as it is", (*_DECODED, *_DECODED_TURNED, *_TURNED, *_PLAIN)),
    *(
        Candidate(f"{rows}x{columns}, {warps} warps", _TURNED, (*_tiles(rows, columns), _warps(warps)))
        for rows, columns in ((64, 64), (64, 128), (128, 64))
        for warps in (4, 8)
    ),
    *(Candidate(f"groups of {count}", _TURNED, (_group(count),), own_process=True) for count in (1, 16)),
    *(
        Candidate(
            f"{rows}x{nbytes} bytes, {warps} warps", _PLAIN, (Patch(_COPY, "_WIDE", (rows, nbytes)), _warps(warps))
        )
        for rows, nbytes, warps in ((8, 2048, 4), (8, 2048, 8), (4, 4096, 4), (4, 4096, 8))
    ),
    *(
        Candidate(f"{rows}x{columns} numbers", _DECODED, (Patch(_DEQUANTIZE, "_TILE", (rows, columns)),))
        for rows, columns in ((8, 256), (32, 256), (16, 128), (8, 512))
    ),
    *(
        Candidate(
            f"{rows}x{columns} numbers", _DECODED_TURNED, (Patch(_DEQUANTIZE, "_TRANSPOSED_TILE", (rows, columns)),)
        )
        for rows, columns in ((16, 128), (64, 128), (64, 64), (32, 64))
    ),
    *(Candidate(name, (*_DECODED, *_DECODED_TURNED), (_decoder(name),)) for name in DECODERS),
)


@contextmanager
def patched(candidate: Candidate) -> Iterator[None]:
    """Apply the patches of a candidate to the kernels.

    Raises:
        AttributeError, KeyError: a name that it patches does not exist.
    """
    with ExitStack() as stack:
        for patch in candidate.patches:
            found = patch.found()
            value = patch.value.make(found) if isinstance(patch.value, Derived) else patch.value
            module = importlib.import_module(patch.module)
            if patch.key is None:
                stack.enter_context(mock.patch.object(module, patch.name, value))
            else:
                stack.enter_context(mock.patch.dict(getattr(module, patch.name), {patch.key: value}))
        yield
