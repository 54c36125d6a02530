"""Kernels, the variants they are compiled to, and the geometry of a launch: integers, names and functions of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from automodel_conv.errors import UnsupportedError, message

CASTS: dict[torch.dtype, str] = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}
"""The dtypes that verbs cast between, each to each, rounding to nearest even; with Triton's names for them."""


@dataclass(frozen=True, eq=False, repr=False)
class Kernel:
    """A Triton kernel with all that is needed to compile and launch it; compared by identity."""

    name: str
    function: Any
    """The function that ``triton.jit`` returned; ``tiles`` describes its arguments."""
    destinations: int
    """Destinations in a row of the table."""
    operands: int
    """Operands in a row of the table: destinations and all others."""
    constants: Callable[[Variant], dict[str, Any]]
    """Returns the compile-time arguments of a variant, by name."""
    in_vectors: Callable[[Variant, Geometry], tuple[int, ...]]
    """Returns the integer arguments of a launch; lengths and strides are divided by the vector length."""
    reach: Callable[[Variant, Geometry], Reach]
    """Returns how far a tile reaches."""
    integers: int = 4
    """Number of integer arguments."""

    def __repr__(self) -> str:
        return self.name


class Reach(NamedTuple):
    """How far a tile reaches in a destination, in elements, and where the kernel starts to count."""

    lines: int  # rows of a destination that a tile writes
    run: int  # distance between the ends of what it writes to one of these rows
    first_row: int = 0
    first_column: int = 0


class Variant(NamedTuple):
    """A kernel and all its compile-time constants: the unit of compilation.

    A launch guarantees that every vector starts at a multiple of its size, on both sides. Tiles are measured in the
    source.
    """

    kernel: Kernel
    src: str  # Triton's name for the type of a source element
    dst: str  # the same for a destination element
    src_vector: int  # length in elements, or in pairs if the source holds pairs that move as words
    dst_vector: int  # the same for the destination
    tile_rows: int
    tile_columns: int
    bytewise: bool = False  # the source is read byte by byte, from any address
    pairs: bool = False  # two elements move as one word
    details: Any = None  # further compile-time constants of this kernel; hashable


class Geometry(NamedTuple):
    """The arguments of a launch besides the table: the shape of the source matrix and the row strides of both sides.

    All count elements of the variant's ``src``, except ``dst_stride``, which counts elements of its ``dst``.
    """

    rows: int
    columns: int
    src_stride: int
    dst_stride: int
    details: Any = None  # further integer arguments of this kernel; hashable


def word(nbytes: int) -> str:
    """Return Triton's name for the unsigned integer of this size."""
    return f"uint{8 * nbytes}"


def is_moved(dst: torch.dtype, src: torch.dtype) -> bool:
    """Return whether kernels copy or cast between these dtypes; the size of an element may still rule it out."""
    return dst == src or (dst in CASTS and src in CASTS)


def element_types(dst: torch.dtype, src: torch.dtype) -> tuple[str, str]:
    """Return Triton's names for a destination's and a source's elements; without a cast they are unsigned integers.

    Raises:
        UnsupportedError: a cast that is not between bfloat16, float16 and float32, or elements of over 4 bytes.
    """
    if dst == src and dst.itemsize in (1, 2, 4):
        return word(dst.itemsize), word(src.itemsize)
    if dst != src and dst in CASTS and src in CASTS:
        return CASTS[dst], CASTS[src]
    raise UnsupportedError(
        message(
            "kernels do not copy between these dtypes",
            expected=f"equal dtypes of 1, 2 or 4 bytes, or two of {sorted(CASTS.values())}",
            found=f"{src} to {dst}",
        )
    )
