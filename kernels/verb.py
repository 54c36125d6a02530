"""``Verb``: which strided copies a verb carries out, and how it is launched."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from automodel_conv.kernels.launch import MAX_STRIDE, Launches
from automodel_conv.kernels.variants import is_moved


class Matrix(NamedTuple):
    """The elements that one source of a verb gives to one destination, as they lie in the source.

    Strides count elements, from one row to the next: of a source and of a destination, as the verb takes them.
    """

    rows: int
    columns: int
    source_stride: int
    target_stride: int


@dataclass(frozen=True)
class Verb:
    """A verb that strided copies may become; ``verbs`` has the table of them.

    Where it takes several sources, each gives one element in turn to a row of the one destination; where it takes
    several destinations, each gets one in turn from a row of the one source.
    """

    name: str
    transposes: bool  # the fastest dimension of the source is another than that of the target
    steps: tuple[int, int]  # along the fastest dimension, in elements: of the source and of the target
    destinations: int
    sources: int
    shapes: Callable[[Matrix], tuple[tuple[int, int], tuple[int, int]]]  # of a destination and of a source
    supports: Callable[[Matrix, torch.dtype, torch.dtype], bool]  # from the source's dtype to the destination's
    launches: Callable[..., Launches]  # what it launches for ``Matrices``, destinations first


def supports_transposed(matrix: Matrix, src: torch.dtype, dst: torch.dtype) -> bool:
    """Whether the verbs that transpose take matrices of these sides, strides and dtypes."""
    return is_moved(dst, src) and src.itemsize <= 4 and max(matrix) <= MAX_STRIDE
