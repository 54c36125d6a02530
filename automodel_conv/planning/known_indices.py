"""Indices whose values are known, as runs, each of which is a view."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

_MOST_RUNS = 4096
"""Most runs of indices that become copies of their own."""


class Run(NamedTuple):
    """Indices ``first, first + step, ...``."""

    start: int
    """Position of the first one among all indices."""
    first: int
    count: int
    step: int

    def of(self, tensor: Tensor, dim: int) -> Tensor:
        """Return the elements of a dimension that have these indices, as a view."""
        narrow = tensor.narrow(dim, self.first, (self.count - 1) * self.step + 1)
        return narrow[(slice(None),) * dim + (slice(None, None, self.step),)]


def runs_of(indices: Sequence[int]) -> list[Run]:
    """Return indices as few runs."""
    runs: list[Run] = []
    for position, index in enumerate(indices):
        if runs:
            last = runs[-1]
            step = index - last.first if last.count == 1 else last.step
            if step > 0 and index == last.first + last.count * step:
                runs[-1] = last._replace(count=last.count + 1, step=step)
                continue
        runs.append(Run(position, index, 1, 1))
    return runs


class Indices(NamedTuple):
    """Indices of one dimension whose values are known."""

    dim: int
    shape: torch.Size
    runs: list[Run]


def known_indices(
    tensor: Tensor, indices: Sequence[Tensor | None], has_data: Callable[[Tensor], bool]
) -> Indices | None:
    """Return the indices of a tensor, if they are of one dimension, have values, and make few runs; else None.

    Args:
        tensor: the tensor.
        indices: the index of each dimension, as ``aten.index`` has it: numbers, or a mask; None takes all elements.
        has_data: returns whether an index has values.

    Raises:
        IndexError: an index is out of bounds, or a mask has another length.
    """
    given = [(dim, index) for dim, index in enumerate(indices) if index is not None]
    if len(given) != 1 or not has_data(given[0][1]) or given[0][1].is_floating_point():
        return None
    dim, index = given[0]
    size = tensor.shape[dim]
    if index.dtype in (torch.bool, torch.uint8):
        if index.dim() != 1:
            return None
        if len(index) != size:
            raise IndexError(f"a mask of {len(index)} elements does not fit dimension {dim} with size {size}")
        index = index.nonzero()[:, 0]
    numbers = index.flatten().tolist()
    outside = next((number for number in numbers if not -size <= number < size), None)
    if outside is not None:
        raise IndexError(f"index {outside} is out of bounds for dimension {dim} with size {size}")
    runs = runs_of([number + size if number < 0 else number for number in numbers])
    return Indices(dim, index.shape, runs) if len(runs) <= _MOST_RUNS else None


def without_known_masks(indices: Sequence[Tensor | None], has_data: Callable[[Tensor], bool]) -> list[Tensor | None]:
    """Return indices with numbers in the place of masks that have values: so the shape of the result is known.

    Args:
        indices: see ``known_indices``.
        has_data: returns whether an index has values.
    """
    numbers: list[Tensor | None] = []
    for index in indices:
        if index is not None and index.dtype in (torch.bool, torch.uint8) and has_data(index):
            numbers += index.nonzero().unbind(1)
        else:
            numbers.append(index)
    return numbers
