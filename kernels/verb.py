"""``Verb``: the strided copies that a verb executes, and how it is launched."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from automodel_conv.kernels.launch import MAX_STRIDE, Launches
from automodel_conv.kernels.variants import is_moved


class Matrix(NamedTuple):
    """The elements that move from one source of a verb to one destination, with the source's rows and columns.

    Both strides count elements from one row to the next, for the operands as the verb accepts them.
    """

    rows: int
    columns: int
    source_stride: int
    target_stride: int


@dataclass(frozen=True)
class Verb:
    """A verb that executes strided copies; ``verbs`` has the table of them.

    With several sources, a row of the one destination holds one element of each source, then the next of each. With
    several destinations, the elements of a row of the one source go to the destinations in the same order.
    """

    name: str
    transposes: bool
    """True if the fastest dimension of the source is not the fastest dimension of the target."""
    steps: tuple[int, int]
    """Steps along the fastest dimension, in elements: of the source, of the target."""
    destinations: int
    """Number of destinations."""
    sources: int
    """Number of sources."""
    shapes: Callable[[Matrix], tuple[tuple[int, int], tuple[int, int]]]
    """Returns the shape of a destination and the shape of a source."""
    supports: Callable[[Matrix, torch.dtype, torch.dtype], bool]
    """Returns whether the verb moves this matrix from the source's dtype to the destination's."""
    launches: Callable[..., Launches]
    """Returns the launches for its operands, ``Matrices`` with the destinations first."""


def supports_transposed(matrix: Matrix, src: torch.dtype, dst: torch.dtype) -> bool:
    """Return whether the verbs that transpose support matrices of these sides, strides and dtypes."""
    return is_moved(dst, src) and src.itemsize <= 4 and max(matrix) <= MAX_STRIDE
