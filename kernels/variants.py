"""What a kernel is, what it is compiled for, and what it is then told: integers, names and functions of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from automodel_conv.errors import UnsupportedError, message

CASTS: dict[torch.dtype, str] = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}
"""The dtypes between which verbs cast, by Triton's names; each to each, rounding to nearest even."""


@dataclass(frozen=True, eq=False, repr=False)
class Kernel:
    """A kernel and what is needed to compile and launch it; compared by identity."""

    name: str
    function: Any  # of Triton; ``tiles`` says what it takes
    destinations: int  # in a row of the table
    operands: int  # likewise, destinations and all others
    constants: Callable[[Variant], dict[str, Any]]  # the compile-time arguments of a variant, by name
    in_vectors: Callable[[Variant, Geometry], tuple[int, ...]]  # its integers: what a vector divides, divided by it
    reach: Callable[[Variant, Geometry], Reach]
    integers: int = 4  # how many it takes

    def __repr__(self) -> str:
        return self.name


class Reach(NamedTuple):
    """How far a tile reaches in a destination, in elements, and where the kernel starts to count."""

    lines: int  # rows of a destination that a tile writes
    run: int  # from end to end of what it writes of one
    first_row: int = 0
    first_column: int = 0


class Variant(NamedTuple):
    """A kernel and all its compile-time constants: what is compiled once.

    A launch promises that every vector starts at a multiple of its size, on either side. Tiles are those of the source.
    """

    kernel: Kernel
    src: str  # Triton's name of the type of an element
    dst: str
    src_vector: int  # in elements, or in pairs where the source holds pairs moved as words
    dst_vector: int  # likewise
    tile_rows: int
    tile_columns: int
    bytewise: bool = False  # the source is read byte by byte, from any address
    pairs: bool = False  # two elements are moved as one word
    details: Any = None  # what only this kernel is compiled for besides; hashable


class Geometry(NamedTuple):
    """What a launch passes besides the table: the source matrix, and a row's step on either side.

    In elements of the variant's ``src``, but the destination's step in those of its ``dst``.
    """

    rows: int
    columns: int
    src_stride: int
    dst_stride: int
    details: Any = None  # the integers that only this kernel takes; hashable


def word(nbytes: int) -> str:
    """Triton's name of the unsigned integer of that size."""
    return f"uint{8 * nbytes}"


def is_moved(dst: torch.dtype, src: torch.dtype) -> bool:
    """Whether elements move as they are or are cast, as far as dtypes tell."""
    return dst == src or (dst in CASTS and src in CASTS)


def element_types(dst: torch.dtype, src: torch.dtype) -> tuple[str, str]:
    """Triton's names for a destination's and a source's elements: words where nothing is computed.

    Raises:
        UnsupportedError: a cast that is not between bfloat16, float16 and float32, or elements of over 4 bytes.
    """
    if dst == src and dst.itemsize in (1, 2, 4):
        return word(dst.itemsize), word(src.itemsize)
    if dst != src and dst in CASTS and src in CASTS:
        return CASTS[dst], CASTS[src]
    raise UnsupportedError(
        message(
            "the kernels do not move between these dtypes",
            expected=f"equal ones of 1, 2 or 4 bytes, or two of {sorted(CASTS.values())}",
            found=f"{src} to {dst}",
        )
    )
