"""What a kernel is compiled for, and what it is then told: integers and names, without Triton."""

from __future__ import annotations

from typing import NamedTuple

import torch

from automodel_conv.errors import UnsupportedError, message

CASTS: dict[torch.dtype, str] = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}
"""The dtypes between which verbs cast, by Triton's names; each to each, rounding to nearest even."""

NUM_WARPS = 4

OPERANDS = {
    "copy_tiles": (1, 2),
    "transpose_tiles": (1, 2),
    "interleave_tiles": (1, 3),
    "deinterleave_tiles": (2, 3),
    "dequantize_tiles": (1, 4),
}
"""Destinations, and all operands, in a row of the table of each kernel."""


class Decoding(NamedTuple):
    """What ``dequantize_tiles`` is compiled for, besides what every kernel is."""

    bits: int  # of a code
    cell: str  # Triton's name of the type of a cell
    by_shifts: bool  # blocks come as binary logarithms
    is_transposed: bool  # the destination's rows are the source's columns
    is_stepped: bool  # elements of a destination's row are not adjacent


class Blocks(NamedTuple):
    """What a launch of ``dequantize_tiles`` passes besides the geometry; columns are bytes of codes."""

    step: int  # between elements of a destination's row, in elements
    block_rows: int  # or its binary logarithm, like the next
    block_columns: int
    start_row: int  # where in its first block a matrix begins
    start_column: int
    across: int  # cells in a row of them


class Variant(NamedTuple):
    """A kernel of ``moves_triton`` and all its compile-time constants: what is compiled once.

    A launch promises that every vector starts at a multiple of its size, on either side. Tiles are those of the source.
    """

    kernel: str
    src: str  # Triton's name of the type of an element
    dst: str
    src_vector: int  # in elements, or in pairs where the source holds pairs moved as words
    dst_vector: int  # likewise
    tile_rows: int
    tile_columns: int
    bytewise: bool = False  # the source is read byte by byte, from any address
    pairs: bool = False  # two elements are moved as one word
    decoding: Decoding | None = None  # of dequantize_tiles: elements of the source are bytes of codes

    @property
    def integers(self) -> int:
        """How many integers the kernel takes."""
        return len(Geometry._fields) - 1 + (len(Blocks._fields) if self.decoding else 0)


class Geometry(NamedTuple):
    """What a launch passes besides the table: the source matrix, and a row's step on either side.

    In elements of the variant's ``src``, but the destination's step in those of its ``dst``.
    """

    rows: int
    columns: int
    src_stride: int
    dst_stride: int
    blocks: Blocks | None = None


def word(nbytes: int) -> str:
    """Triton's name of the unsigned integer of that size."""
    return f"uint{8 * nbytes}"


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
